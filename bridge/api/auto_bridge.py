"""AutoBridge: Hugging Face models as megatron-core models and back, under the names other programs already call."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge import parallel
from bridge.api import saving, source
from bridge.api.models import parse_dtype
from bridge.api.provider import Provider
from bridge.api.saving import Assets
from bridge.api.tasks import ConversionTask, HFWeightTuple, chunks_of, describe, stream, tasks
from bridge.config import effect, layout
from bridge.config.routing import route
from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.errors import BridgeError, ConfigError, ConversionError
from bridge.models import family
from bridge.models.hf import config as hf_config
from bridge.models.mcore_config import transformer_config
from bridge.sources.described import model_of
from bridge.sources.load import load_initial, same_section, stored_dtype
from bridge.weights import locate


class AutoBridge:
    """One Hugging Face model: its configuration, and where its weights and tokenizer are.

    Arguments known from such bridges elsewhere that are not supported here raise ConfigError when they ask for
    something. Methods that take a live `model` are collectives: all ranks call them; `model` is this rank's list of
    chunks (or one chunk), bare or in Float16Module and DistributedDataParallel, in any layout.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        *,
        path: str | Path | None = None,
        hf_config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """section: the model as a `model` section. path: directory or repository id. Use the from_... methods."""
        self._section = dict(section)
        self._path = path
        self._hf_config = dict(hf_config or {})
        self._dtype = dtype

    # ---- which models ----

    @staticmethod
    def list_supported_models() -> list[str]:
        """Names of the Hugging Face classes of all families."""
        return sorted(family.by_name(name).architecture for name in family.known_names())

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether this model can be converted: its class, its model_type and every field of its configuration."""
        return cls.why_unsupported(config) is None

    @staticmethod
    def why_unsupported(config: Any) -> str | None:
        """One line naming the first field of a transformers config (or a dict of one) that is not understood, or None.

        A config that does not name its class in `architectures` is taken for the causal language model of its
        model_type.
        """
        try:
            routed = route({"model": hf_config.to_mcore(_fields(config))})
            layout.check_model(routed, world_size=1)
            effect.check(routed)
            transformer_config(routed, dtype=torch.float32, meta=True)
        except BridgeError as error:
            return str(error)
        return None

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """`supports` for the config.json of a directory or repository; False when there is none."""
        source.refuse("can_handle", {"trust_remote_code": trust_remote_code})
        try:
            return cls.supports(hf_config.read(source.directory(path, key="path", weights=False)))
        except BridgeError:
            return False

    # ---- making one ----

    @classmethod
    def from_hf_config(cls, config: Any) -> "AutoBridge":
        """From a transformers config or a dict of one, without weights. Raises ConversionError as `supports` says."""
        fields = _fields(config)
        bridge = cls(hf_config.to_mcore(fields), hf_config=fields)
        hf_config.tell_unread(fields)
        return bridge

    @classmethod
    def from_hf_pretrained(
        cls, path: str | Path, torch_dtype: torch.dtype | str | None = None, **unsupported: Any
    ) -> "AutoBridge":
        """From a directory or repository id; weights are read when they are needed.

        torch_dtype: of models built from it ("bf16", torch.bfloat16, "auto"); None and "auto": as stored.
        """
        source.refuse("from_hf_pretrained", unsupported)
        fields = hf_config.read(source.directory(path, key="path", weights=False))
        dtype = None if torch_dtype in (None, "auto") else parse_dtype(torch_dtype)
        bridge = cls(hf_config.to_mcore(fields), path=path, hf_config=fields, dtype=dtype)
        hf_config.tell_unread(fields)
        return bridge

    @classmethod
    def from_auto_config(cls, megatron_path: str | Path, hf_model_id: str | Path, **unsupported: Any) -> "AutoBridge":
        """From the architecture of a Megatron checkpoint, with the tokenizer of a Hugging Face directory.

        A checkpoint of megatron-core's own scripts, which has no model.yaml, is what that directory's config.json says,
        as far as its tensors bear it out.
        """
        source.refuse("from_auto_config", unsupported)
        found = locate.locate(megatron_path, key="megatron_path")
        own = (found.root / locate.MODEL_YAML).is_file()
        reference = None if own else source.directory(hf_model_id, key="hf_model_id", weights=False)
        return cls(model_of(found, reference=reference, key="megatron_path").section, path=hf_model_id)

    @staticmethod
    def get_hf_model_id_from_checkpoint(path: str | Path) -> str | None:
        """The directory in a Megatron checkpoint that stands for its Hugging Face model: configuration and tokenizer.

        None when the checkpoint has none, being trained from random weights.
        """
        assets = locate.locate(path, key="path").root / locate.HF_ASSETS
        return str(assets) if (assets / "config.json").is_file() else None

    # ---- what it is ----

    @property
    def hf_config(self) -> dict[str, Any]:
        """The fields of config.json."""
        return dict(self._hf_config) or hf_config.to_hf(self._section, dtype=str(self.dtype).removeprefix("torch."))

    @property
    def dtype(self) -> torch.dtype:
        """What models are built in unless told otherwise: as asked, as most weights are stored, as the config says."""
        if self._dtype is not None:
            return self._dtype
        if self._path is not None:
            with contextlib.suppress(ConversionError):  # a directory without weights
                return stored_dtype(self._directory(weights=True))
        named = self._hf_config.get("dtype") or self._hf_config.get("torch_dtype") or "float32"
        return parse_dtype(str(named).removeprefix("torch.") if not isinstance(named, torch.dtype) else named)

    @property
    def transformer_config(self) -> TransformerConfig:
        """megatron-core's configuration of one process, as a model would be built from it."""
        return transformer_config(route({"model": self._section}), dtype=self.dtype)

    # ---- live models ----

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> Provider:
        """The settings of the model to be; `provide_distributed_model` of it loads the weights if asked to.

        hf_path: directory of other weights of the same model. Raises ConfigError when there are no weights to load.
        """
        if not load_weights and hf_path is not None:
            raise ConfigError("hf_path: has no effect with load_weights=False; leave one of the two out")
        if load_weights and hf_path is None and self._path is None:
            raise ConfigError(
                "load_weights: True, but this bridge knows no weights; give hf_path or load_weights=False"
            )
        weights = (lambda: self._weights(hf_path)) if load_weights else None
        return Provider(self._section, dtype=lambda: self.dtype, weights=weights)

    def to_megatron_model(
        self,
        load_weights: bool = True,
        hf_path: str | Path | None = None,
        *,
        wrap_with_ddp: bool = False,
        parallelism: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Any]:
        """This rank's model chunks. parallelism: attributes for the provider, `{"tensor_model_parallel_size": 2}`;
        options: those of `Provider.provide_distributed_model`."""
        provider = self.to_megatron_provider(load_weights=load_weights, hf_path=hf_path)
        for name, value in (parallelism or {}).items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp, **options)

    def load_hf_weights(self, model: Any, hf_path: str | Path | None = None, **unsupported: Any) -> Any:
        """Copy weights into a live model, in its dtype; the model. An optimizer with copies of its own must be told.

        Raises ConfigError when the directory holds another architecture, ConversionError naming a tensor that is
        missing, left over or damaged.
        """
        source.refuse("load_hf_weights", unsupported)
        chunks = chunks_of(model)
        load_initial(chunks, self._weights(hf_path), describe(chunks, section=self._section).routed, key="hf_path")
        return model

    def get_conversion_tasks(self, model: Any, hf_path: str | Path | None = None) -> list[ConversionTask]:
        """What an export consists of, the same on every rank: cut it into parts for `export_hf_weights`, as by
        num_bytes. hf_path is not needed: the model says which tensors there are."""
        source.refuse("get_conversion_tasks", {"hf_path": hf_path} if hf_path is not None else {})
        chunks = chunks_of(model)
        return tasks(chunks, describe(chunks, section=self._section))

    def export_hf_weights(
        self,
        model: Any,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Sequence[ConversionTask] | None = None,
        **unsupported: Any,
    ) -> Iterator[HFWeightTuple]:
        """Every weight as `(param_name, weight)`: whole tensors, on every rank, one at a time, in the model's dtype.

        They are copies: training may go on while they are used. cpu: moved there, else on the model's device.
        conversion_tasks: only these, in their order. All ranks must run through the iterator together.
        """
        source.refuse("export_hf_weights", unsupported)
        chunks = chunks_of(model)
        todo = self.get_conversion_tasks(chunks) if conversion_tasks is None else list(conversion_tasks)
        return stream(chunks, todo, cpu=cpu, progress=saving.progress_of(todo) if show_progress else None)

    # ---- directories ----

    def save_hf_pretrained(
        self,
        model: Any,
        path: str | Path,
        show_progress: bool = True,
        source_path: str | Path | None = None,
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        **unsupported: Any,
    ) -> None:
        """Write a Hugging Face directory: configuration, tokenizer (from source_path, else this bridge's) and weights.

        Rank 0 writes. Raises ConversionError on every rank when `path` exists and `overwrite` is false.
        """
        source.refuse("save_hf_pretrained", unsupported)
        chunks = chunks_of(model)
        saving.save_hf(
            chunks,
            path,
            describe(chunks, section=self._section),
            assets=self._assets(source_path),
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            show_progress=show_progress,
        )

    def save_hf_weights(
        self,
        model: Any,
        path: str | Path,
        show_progress: bool = True,
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        **unsupported: Any,
    ) -> None:
        """Write the safetensors files alone, into a directory that may hold other files. Rank 0 writes."""
        source.refuse("save_hf_weights", unsupported)
        chunks = chunks_of(model)
        saving.save_hf_weights(
            chunks,
            path,
            describe(chunks, section=self._section),
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            show_progress=show_progress,
        )

    def save_megatron_model(self, model: Any, path: str | Path, *, overwrite: bool = False, **unsupported: Any) -> None:
        """Write a Megatron checkpoint of the weights, without optimizer: each rank its shards. `load_megatron_model`,
        train.py's init.path and convert.py read it, at any layout."""
        source.refuse("save_megatron_model", unsupported)
        chunks = chunks_of(model)
        described = describe(chunks, section=self._section)
        saving.save_megatron(chunks, path, described, assets=self._assets(None), overwrite=overwrite)

    def load_megatron_model(
        self,
        path: str | Path,
        *,
        mp_overrides: Mapping[str, Any] | None = None,
        wrap_with_ddp: bool = False,
        **options: Any,
    ) -> list[Any]:
        """A live model with the weights of a Megatron checkpoint (run, checkpoints or one iteration) of any layout.

        mp_overrides: attributes for the provider, the layout wanted. Raises ConfigError when the checkpoint holds
        another architecture than this bridge.
        """
        section = same_section(Path(path), route({"model": self._section}), key="path")
        provider = Provider(section, dtype=lambda: self._dtype or stored_dtype(Path(path)), weights=lambda: Path(path))
        for name, value in (mp_overrides or {}).items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp, **options)

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        show_progress: bool = True,
        overwrite: bool = False,
        **unsupported: Any,
    ) -> "AutoBridge":
        """Write a Megatron checkpoint from a directory or repository id, tensor by tensor; its bridge.

        For one process without process groups; no model is built. torch_dtype casts the weights.
        """
        source.refuse("import_ckpt", unsupported)
        _alone("import_ckpt")
        hf = source.directory(hf_model_id, key="hf_model_id", weights=True)
        dtype = None if torch_dtype in (None, "auto") else parse_dtype(torch_dtype)
        with _progress_shown(show_progress):
            import_hf(hf, megatron_path, dtype=dtype, overwrite=overwrite)
        return cls.from_hf_pretrained(hf_model_id)

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        **unsupported: Any,
    ) -> None:
        """Write a Hugging Face directory from a Megatron checkpoint, tensor by tensor. The checkpoint carries its
        configuration and tokenizer. For one process without process groups."""
        source.refuse("export_ckpt", unsupported)
        _alone("export_ckpt")
        found = locate.locate(megatron_path, key="megatron_path")
        section = same_section(Path(megatron_path), route({"model": self._section}), key="megatron_path")
        model = None if (found.root / locate.MODEL_YAML).is_file() else section
        with _progress_shown(show_progress):
            export_hf(megatron_path, hf_path, overwrite=overwrite, max_shard_size=max_shard_size, model=model)

    def _directory(self, *, weights: bool) -> Path:
        assert self._path is not None
        return source.directory(self._path, key="path", weights=weights)

    def _weights(self, hf_path: str | Path | None) -> Path:
        if hf_path is not None:
            return source.directory(hf_path, key="hf_path", weights=True)
        if self._path is None:
            raise ConfigError("hf_path: None, but this bridge knows no weights; give a Hugging Face directory")
        return self._directory(weights=True)

    def _assets(self, path: str | Path | None) -> Assets:
        if path is not None:
            return Assets(source.directory(path, key="source_path", weights=False))
        if self._path is not None:
            return Assets(self._directory(weights=False))
        return Assets(config=self._hf_config)


def _fields(config: Any) -> dict[str, Any]:
    """A dict, or a transformers config object as one."""
    fields: dict[str, Any] = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return fields


def _alone(method: str) -> None:
    if parallel.is_initialized():
        raise ConfigError(f"{method}: needs a process without process groups; call it before they are made")


def _progress_shown(shown: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO())
