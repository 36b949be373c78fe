"""The model to be: its settings, to change before it is built, then process groups, chunks and wrappers."""

import functools
import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig

from bridge import parallel, platform
from bridge.api.source import refuse
from bridge.config import annotation, effect, layout, mcore_fields, own_fields
from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.config.complete import complete
from bridge.config.routing import Routed, route
from bridge.errors import ConfigError, did_you_mean
from bridge.models import ddp, gpt
from bridge.models.hf import config as hf_config
from bridge.models.mcore_config import ACTIVATIONS, TYPED
from bridge.sources.load import load_initial

Hook = Callable[[list[Any]], list[Any] | None]
PRECISION = ("bf16", "fp16", "params_dtype")
DTYPE_WORDS = {getattr(torch, attribute): word for word, attribute in annotation.DTYPES.items()}


class Provider:
    """Attributes are megatron-core's configuration fields: parallel sizes, recomputation, dispatchers, dropout, ...

    Setting one checks its name and type at once; `finalize()` checks them together. What no Hugging Face config of the
    architecture can express is refused there, not when the trained model is saved.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        *,
        dtype: Callable[[], torch.dtype],
        weights: Callable[[], Path] | None = None,
    ) -> None:
        """section: the `model` section. dtype: of the weights, unless precision attributes are set. weights: directory
        that `provide_distributed_model` loads, None for random ones."""
        self._section = dict(section)
        self._given: dict[str, Any] = {}
        self._default_dtype = dtype
        self._config: Any = None
        self._seed = 1234
        self._loads = weights is not None
        self._hooks: dict[str, list[Hook]] = {"pre": [], "post": []}
        if weights is not None:
            self.register_pre_wrap_hook(lambda chunks: load_initial(chunks, weights(), self.routed, key="hf_path"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name not in _settable():
            hint = did_you_mean(name, _settable())
            raise ConfigError(
                f"{name}: not a field of megatron-core's TransformerConfig or an argument of its GPTModel{hint}"
            )
        given = {**self._given, name: _plain(value)}
        _route(self._section, given)
        self._given, self._config = given, None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._config is not None and hasattr(self._config, name):
            return getattr(self._config, name)
        values = {**complete(self._section), **self._precision(), **self._given}
        if name not in values:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = values[name]
        return TYPED[name](value) if name in TYPED and value is not None else value

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return platform.device()

    @property
    def routed(self) -> Routed:
        """The settings by destination in megatron-core."""
        return _route(self._section, self._given)

    def finalize(self) -> None:
        """Check all settings together: layout rules, megatron-core's own, and that the model can be exported.

        Raises ConfigError, ConversionError. Building calls this as well.
        """
        routed = self.routed
        layout.check_model(routed, world_size=parallel.num_processes() or _smallest_world(routed))
        effect.check(routed)
        if any(_is_model_key(name, self._section) for name in self._given):
            hf_config.to_hf(self._section | _split(self._section, self._given)[0], dtype="float32")
        self._config = gpt.transformer_config(routed, dtype=self._dtype())

    def initialize_model_parallel(self, seed: int | None = None, **unsupported: Any) -> None:
        """Make the process groups of these sizes and seed the generators; groups that exist are checked, and seeded
        anew when a seed is given. It is also the seed of random weights; without one both have 1234."""
        refuse("initialize_model_parallel", unsupported)
        routed = self.routed
        self._seed = self._seed if seed is None else seed
        made = parallel.join(routed, seed=self._seed)
        if not made and seed is not None:
            parallel.seed_generators(routed.transformer, seed=seed)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Any:
        """One chunk of this rank's model, with random weights: a GPTModel, not wrapped. Process groups must exist.

        The weights follow from the seed of `initialize_model_parallel`, whatever the layout.

        pre_process and post_process may only say what the pipeline stage does anyway.
        """
        self.finalize()
        parallel.join(self.routed)
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks and vp_stage is None:
            raise ConfigError(
                f"vp_stage is None, but the model has {chunks} chunks on each stage; pass vp_stage=0 to {chunks - 1}, "
                "or call provide_distributed_model"
            )
        chunk: Any = gpt.build(self.routed, dtype=self._dtype(), only_stage=vp_stage, seed=self._seed)[0]
        for name, asked in (("pre_process", pre_process), ("post_process", post_process)):
            if asked not in (None, getattr(chunk, name)):
                raise ConfigError(f"{name}: {asked}, but this pipeline stage has {not asked}; leave it out")
        return chunk

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | Mapping[str, Any] | None = None,
        *,
        wrap_with_ddp: bool = True,
        bf16: bool | None = None,
        fp16: bool | None = None,
        pre_wrap_hook: Hook | list[Hook] | None = None,
        post_wrap_hook: Hook | None = None,
        **unsupported: Any,
    ) -> list[Any]:
        """This rank's chunks with their weights, as megatron-core's schedules and optimizers take them.

        Process groups are made unless they exist. bf16 and fp16 chunks are in Float16Module; with wrap_with_ddp all are
        in DistributedDataParallel. Hooks get the list of chunks before and after that, and may return another.
        """
        refuse("provide_distributed_model", unsupported)
        for name, value in (("bf16", bf16), ("fp16", fp16)):
            if value is not None:
                setattr(self, name, value)
        self.finalize()
        routed = self.routed
        with parallel.joined(routed):
            seed = None if self._loads else self._seed
            chunks: list[Any] = gpt.build(routed, dtype=self._dtype(), seed=seed)
            for hook in [*self._hooks["pre"], *_listed(pre_wrap_hook)]:
                chunks = hook(chunks) or chunks
            chunks = list(gpt.in_float16_module(chunks))
            if wrap_with_ddp:
                settings = ddp_config or {}
                if isinstance(settings, Mapping):
                    settings = DistributedDataParallelConfig(**settings)
                chunks = list(ddp.wrap(chunks, settings))
            elif ddp_config is not None:
                raise ConfigError("ddp_config: has no effect with wrap_with_ddp=False; leave one of the two out")
        for hook in [*self._hooks["post"], *_listed(post_wrap_hook)]:
            chunks = hook(chunks) or chunks
        return chunks

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Call `hook` with the list of bare chunks, before the wrappers."""
        self._hooks["pre"].insert(0 if prepend else len(self._hooks["pre"]), hook)

    def register_post_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Call `hook` with the list of wrapped chunks."""
        self._hooks["post"].insert(0 if prepend else len(self._hooks["post"]), hook)

    def _dtype(self) -> torch.dtype | None:
        """What the model is built in; None: the precision attributes say it."""
        return None if self._given.keys() & PRECISION else self._default_dtype()

    def _precision(self) -> dict[str, Any]:
        """The precision attributes as long as none is set."""
        dtype = self._dtype()
        if dtype is None:
            return {}
        half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        return half | {"params_dtype": DTYPE_WORDS[dtype]}


@functools.cache
def _settable() -> frozenset[str]:
    fields = mcore_fields.targets()
    own = own_fields.annotations().keys() | {"make_vocab_size_divisible_by"}
    return frozenset(fields["transformer"].keys() | fields["gpt"].keys() | own)


def _is_model_key(name: str, section: Mapping[str, Any]) -> bool:
    """Whether a setting belongs to the architecture, which checkpoints and exports describe, not to this run."""
    if name in section or name in own_fields.annotations() or name == "make_vocab_size_divisible_by":
        return True
    return name not in NOT_ARCHITECTURE and name not in mcore_fields.model_parallel()


def _split(section: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the architecture, and the others."""
    model = {name: value for name, value in given.items() if _is_model_key(name, section)}
    return model, {name: value for name, value in given.items() if name not in model}


def _route(section: Mapping[str, Any], given: Mapping[str, Any]) -> Routed:
    model, others = _split(section, given)
    return route({"model": {**section, **model}, "parallelism": others})


def _plain(value: Any) -> Any:
    """A value of megatron-core's as YAML would write it."""
    if isinstance(value, torch.dtype):
        return DTYPE_WORDS.get(value, str(value))
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, tuple):
        return list(value)
    words = [word for word, function in ACTIVATIONS.items() if function is value]
    return words[0] if words else value


def _listed(hooks: Hook | list[Hook] | None) -> list[Hook]:
    return list(hooks) if isinstance(hooks, list) else [hooks] if hooks else []


def _smallest_world(routed: Routed) -> int:
    """The fewest processes that these sizes can divide; used where nothing says how many there will be."""
    tp, pp = routed.get("tensor_model_parallel_size"), routed.get("pipeline_model_parallel_size")
    experts = routed.get("expert_model_parallel_size") * routed.get("expert_tensor_parallel_size", tp)
    return math.lcm(tp * pp * routed.get("context_parallel_size"), pp * experts)
