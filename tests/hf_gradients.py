"""Loss and gradients of a training step as transformers computes them, in the form of its files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import hf_predictions
from tests.hf_predictions import Reference

OF_PREDICTIONS = 0.1  # weight of the losses of all prediction modules together, megatron-core's default


class Balance(NamedTuple):
    """Coefficients of the losses that balance experts: megatron-core's aux_loss and the z-loss."""

    aux: float
    z: float


BALANCE = Balance(aux=0.5, z=0.02)


class Written(NamedTuple):
    """loss in nats per token. plain, balanced: directories with the gradients, without balancing losses and with them;
    the same one where there are no experts. num_parameters: those that have a gradient."""

    loss: float
    num_parameters: int
    plain: Path
    balanced: Path


def write(directory: Path, batches: Sequence[Tensor]) -> Written:
    """Train on `batches`, token ids [sequences, length + 1] of a micro-batch each, and write gradients of the mean over
    all their tokens into `directory`.

    In float64: what transformers rounds in float32 is 1e-4 of some gradients.
    """
    model = hf_predictions.transformers_models(directory)
    seen = _watch_routers(model)
    parameters = [parameter for parameter in _parameters(model) if parameter.requires_grad]
    balancing: list[Any] = [0.0] * len(parameters)
    num_tokens, total = sum(ids[:, 1:].numel() for ids in batches), 0.0
    for ids in batches:
        seen.clear()
        loss, objective = _losses(model, ids)
        total += loss.item()
        (objective / num_tokens).backward(retain_graph=bool(seen))
        if seen:  # megatron-core takes the mean over micro-batches of a balancing loss, which is one of a micro-batch
            of_batch: Any = sum(balancing_loss(logits, model.main.config, BALANCE) for logits in seen) / len(batches)
            more = torch.autograd.grad(of_batch, parameters, allow_unused=True)
            balancing = [a if b is None else a + b for a, b in zip(balancing, more, strict=True)]
    # ERNIE's correction of the choice of experts is a parameter there, without a gradient, and a buffer here.
    num_parameters = sum(parameter.numel() for parameter in parameters if parameter.grad is not None)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    balanced = plain = _save(model, parameters, gradients, directory / "plain")
    if seen:
        both = [one + other for one, other in zip(gradients, balancing, strict=True)]
        balanced = _save(model, parameters, both, directory / "balanced")
    return Written(total / num_tokens, num_parameters, plain, balanced)


def _losses(model: Reference, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of token losses, and that with the prediction modules' weighed as in DeepSeek-V3 (2412.19437, 2.2)."""
    tokens, labels = ids[:, :-1], ids[:, 1:]
    main, predicted = model.logits(tokens)
    loss = objective = F.cross_entropy(main.flatten(0, 1), labels.flatten(), reduction="sum")
    for number, logits in enumerate(predicted, 1):
        further = F.cross_entropy(logits[:, :-number].flatten(0, 1), labels[:, number:].flatten(), reduction="sum")
        objective = objective + OF_PREDICTIONS / len(predicted) * further
    return loss, objective


def balancing_loss(logits: Tensor, config: Any, balance: Balance) -> Tensor:
    """megatron-core's losses of one layer, from a micro-batch's router logits [tokens, experts].

    Switch Transformer's (2101.03961, eq. 4 to 6) for several experts per token, scaled so that even use of all experts
    gives `aux`, and ST-MoE's z-loss (2202.08906, eq. 5).
    """
    experts, chosen = logits.size(-1), getattr(config, "num_experts_per_tok", None) or config.moe_k
    scores = logits.sigmoid() if _by_sigmoid(config) else logits.softmax(-1)
    scores = scores / scores.sum(-1, keepdim=True)
    share = F.one_hot(scores.topk(chosen).indices, experts).sum(1).to(scores).mean(0) / chosen
    return balance.aux * experts * (share * scores.mean(0)).sum() + balance.z * logits.logsumexp(-1).square().mean()


def _by_sigmoid(config: Any) -> bool:
    return config.model_type in ("deepseek_v3", "glm4_moe")


def _watch_routers(model: Reference) -> list[Tensor]:
    """Where the logits of every router will be, in the order they are computed."""
    seen: list[Tensor] = []
    for module in model.all_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    return seen


def _parameters(model: Reference) -> Iterator[Tensor]:
    """Each once."""
    unique = {id(parameter): parameter for module in model.all_modules() for parameter in module.parameters(False)}
    return iter(unique.values())


def _save(model: Reference, parameters: Sequence[Tensor], values: Sequence[Tensor], directory: Path) -> Path:
    """The model's files with `values` in place of its parameters, as transformers would name and shape them."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.float()
    model.main.save_pretrained(directory)
    if model.modules is not None:
        _add_modules(model, directory)
    return directory


def _add_modules(model: Reference, directory: Path) -> None:
    """The modules' tensors, named as in files: the block is a layer like the last one, which lends it its names."""
    file = directory / "model.safetensors"
    tensors, last = load_file(file), model.main.config.num_hidden_layers - 1
    layer = model.main.model.layers[last]
    for number, module in enumerate(model.modules.layers, last + 1):
        layer.load_state_dict(module.mtp_block.state_dict())
        model.main.save_pretrained(directory)
        like = f"model.layers.{last}."
        block = {name: tensor for name, tensor in load_file(file).items() if name.startswith(like)}
        prefix = f"model.layers.{number}."
        tensors |= {name.replace(like, prefix): tensor for name, tensor in block.items()}
        for name in hf_predictions.OF_A_MODULE:
            own = name.replace("shared_head.norm", "post_norm")
            tensors[f"{prefix}{name}.weight"] = module.get_parameter(f"{own}.weight").data
    save_file(tensors, file, metadata={"format": "pt"})
