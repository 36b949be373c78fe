"""Multi-token prediction modules in Hugging Face files, which transformers' model classes neither build nor save."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bridge.sources import reference

# Name in the files -> whether it is [hidden, 2 * hidden] or a norm's weight.
OF_A_MODULE = {"enorm": False, "hnorm": False, "eh_proj": True, "shared_head.norm": False}
EMBEDDING = "model.embed_tokens.weight"


def add(directory: Path, config: Any, *, draw: Callable[[str, torch.Tensor], None], max_shard_size: str) -> None:
    """Rewrite a model's files with `config.num_mtp_layers` modules as DeepSeek-V3's have them: each is a layer behind
    the last with its weights made smaller, and copies of the embedding and the output layer. `draw(name, tensor)` fills
    what a layer does not have."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    count, hidden = config.num_hidden_layers, config.hidden_size
    like = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{count - 1}.")}
    embedding = tensors[EMBEDDING]
    for number in range(config.num_mtp_layers):
        prefix = f"model.layers.{count + number}."
        smaller = 0.75 - 0.125 * number  # the same however the files stack tensors
        new = {name.replace(f"model.layers.{count - 1}.", prefix): tensor * smaller for name, tensor in like.items()}
        for name, is_matrix in OF_A_MODULE.items():
            own = embedding.new_ones((hidden, 2 * hidden) if is_matrix else (hidden,))
            draw(name, own)
            new[f"{prefix}{name}.weight"] = own
        tensors |= new
        tensors[f"{prefix}embed_tokens.weight"] = embedding.clone()
        tensors[f"{prefix}shared_head.head.weight"] = tensors.get("lm_head.weight", embedding).clone()
    save_torch_state_dict(tensors, directory, max_shard_size=max_shard_size, metadata={"format": "pt"})


class Reference(NamedTuple):
    """transformers' model and its MtpModel, which share embedding and output layer; None where there are no
    modules."""

    main: Any
    modules: Any

    def all_modules(self) -> Iterator[Any]:
        """torch's modules of both."""
        yield from self.main.modules()
        if self.modules is not None:
            yield from self.modules.modules()

    def logits(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The model's and each module's, [batch, length, vocab]. Module k reads the token k + 1 places further, or 0
        where there is none, as megatron-core does; transformers would draft one."""
        from transformers.cache_utils import MtpCache

        if self.modules is None:
            return self.main(ids).logits, []
        cache = MtpCache(config=self.main.config.get_mtp_config())
        hidden = self.main.model(ids).last_hidden_state
        main, predicted = self.main.lm_head(hidden), []
        for number in range(self.main.config.num_mtp_layers):
            ids = torch.nn.functional.pad(ids[:, 1:], (0, 1))
            positions = torch.arange(number + 1, number + 1 + ids.size(1)).expand_as(ids)
            hidden = self.modules.forward_layer(number, hidden, positions, cache, input_ids=ids)
            predicted.append(self.modules.shared_head(hidden))
        return main, predicted

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of some weights before, in and behind the modules."""
        last = self.modules.layers[-1]
        return {
            "embed": self.main.model.embed_tokens.weight.grad,
            "norm": self.main.model.norm.weight.grad,
            "eh_proj": last.eh_proj.weight.grad,
            "o_proj": last.mtp_block.self_attn.o_proj.weight.grad,
        }


def transformers_models(directory: Path) -> Reference:
    """Both, read from the files of `directory` by transformers itself, in float64: in float32 its rounding alone moves
    gradients by 1e-4."""
    from transformers.modeling_layers import MtpModel

    main = reference.load(directory)
    if not getattr(main.config, "num_mtp_layers", 0):
        return _exact(Reference(main, None))
    # Which tensors are the modules': the class says it of a model with 61 layers only.
    main._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{main.config.num_hidden_layers + module}\." for module in range(main.config.num_mtp_layers)
    ]
    modules = MtpModel.from_pretrained(main).eval()
    return _exact(Reference(main, modules))


def _exact(model: Reference) -> Reference:
    """In float64."""
    for module in model.all_modules():
        module.double()
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the grouped product knows no float64
        if hasattr(module, "limit"):  # GPT-OSS's experts: transformers 5.17 has 7.0 there, whatever the config says
            module.limit = model.main.config.swiglu_limit
    return model
