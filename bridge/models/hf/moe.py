"""Fields of Hugging Face configs about experts: how many, how wide, in which layers, and how tokens reach them.

The coefficient of the balancing loss is taken over as a number: megatron-core adds the loss of each layer, scaled so
that a balanced layer gives 1, where transformers (with output_router_logits) multiplies shares and scores averaged over
all layers, scaled to num_experts_per_tok. With one layer that has experts they differ by that factor alone. No torch
here.
"""

from collections.abc import Callable
from typing import Any

from bridge.config.complete import moe_layers
from bridge.models.hf.fields import Part, Values, refused


def experts(*names: str, per_token: tuple[str, ...] = ("num_experts_per_tok",)) -> Part:
    """Experts per layer and experts per token. The first of each tuple is the name on the hub, which is written; the
    others are names that transformers 5 gives it, and win because the first is always filled in with its default."""

    def read(hf: Values) -> dict[str, Any]:
        count, chosen = _last(hf, names), _last(hf, per_token)
        if not 1 <= chosen <= count:
            raise refused(per_token[0], chosen, f"it needs a whole number from 1 to {names[0]} ({count})")
        return {"num_moe_experts": int(count), "moe_router_topk": int(chosen)}

    def write(model: Values) -> dict[str, Any]:
        if model["num_moe_experts"] is None:
            raise refused("model.num_moe_experts", None, "every model of this family has experts")
        return {names[0]: model["num_moe_experts"], per_token[0]: model["moe_router_topk"]}

    return Part((*names, *per_token), ("num_moe_experts", "moe_router_topk"), read, write)


def _last(hf: Values, names: tuple[str, ...]) -> int:
    return int(next(hf[name] for name in reversed(names) if hf.get(name) is not None))


def width_of_experts(hf_name: str = "intermediate_size") -> Part:
    """The width of an expert under the name of the MLP's, in families without dense layers."""
    keys = ("ffn_hidden_size", "moe_ffn_hidden_size")

    def write(model: Values) -> dict[str, Any]:
        if not all(moe_layers(model)):
            raise refused("model.moe_layer_freq", model["moe_layer_freq"], "every layer of this family has experts")
        return {hf_name: model["moe_ffn_hidden_size"]}

    return Part((hf_name,), (*keys, "moe_layer_freq"), lambda hf: dict.fromkeys(keys, int(hf[hf_name])), write)


def softmax_weights(hf_name: str | None = "norm_topk_prob") -> Part:
    """Softmax scores, whose chosen ones are divided by their sum or not; without a field always.

    A softmax over all experts, divided by the sum over the chosen, is a softmax over the chosen alone; which
    megatron-core has for more than one expert per token.
    """

    def read(hf: Values) -> dict[str, Any]:
        normed = hf_name is None or bool(hf[hf_name])
        if normed and hf.get("num_experts_per_tok") == 1:
            return {"moe_router_pre_softmax": True, "norm_topk_prob": True}
        return {"moe_router_pre_softmax": not normed}

    def write(model: Values) -> dict[str, Any]:
        normed = model["norm_topk_prob"]
        normed = not model["moe_router_pre_softmax"] if normed is None else normed
        if not hf_name and not normed:
            raise refused("model.moe_router_pre_softmax", True, "this family divides the weights by their sum")
        return {hf_name: normed} if hf_name else {}

    return Part((hf_name,) if hf_name else (), ("moe_router_pre_softmax", "norm_topk_prob"), read, write)


def sigmoid_weights() -> Part:
    """Sigmoid scores, whose chosen ones are divided by their sum or not (norm_topk_prob)."""

    def by_default(topk: int) -> bool:
        return topk > 1  # megatron-core leaves the score of a single expert as it is

    def read(hf: Values) -> dict[str, Any]:
        wanted = bool(hf["norm_topk_prob"])
        return {} if wanted == by_default(int(hf["num_experts_per_tok"])) else {"norm_topk_prob": wanted}

    def write(model: Values) -> dict[str, Any]:
        own = model["norm_topk_prob"]
        return {"norm_topk_prob": by_default(model["moe_router_topk"]) if own is None else own}

    return Part(("norm_topk_prob",), ("norm_topk_prob",), read, write)


def scaling(hf_name: str = "routed_scaling_factor") -> Part:
    """A factor on the weights of all experts but the shared ones."""

    def read(hf: Values) -> dict[str, Any]:
        factor = float(hf[hf_name])
        if factor == 0.0:
            raise refused(hf_name, factor, "megatron-core takes 0 for no scaling")
        return {} if factor == 1.0 else {"moe_router_topk_scaling_factor": factor}

    return Part(
        (hf_name,),
        ("moe_router_topk_scaling_factor",),
        read,
        lambda model: {hf_name: float(model["moe_router_topk_scaling_factor"] or 1.0)},
    )


def groups(*, best: int) -> Part:
    """`topk_group` of `n_group` groups of experts are open to a token: those whose `best` experts have the highest sum
    of scores. Which is 2 in DeepSeek-V3 and 1 (the maximum) in DeepSeek-V2."""
    keys = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_score_topk")

    def read(hf: Values) -> dict[str, Any]:
        count, chosen = hf["n_group"] or 1, hf["topk_group"] or 1
        if count == chosen == 1:
            return {}
        return dict(zip(keys, (int(count), int(chosen), best), strict=True))

    def write(model: Values) -> dict[str, Any]:
        count, chosen, own = (model[key] for key in keys)
        if not chosen:
            return {"n_group": 1, "topk_group": 1}
        if (own or model["moe_router_topk"] // chosen) != best:
            raise refused(f"model.{keys[2]}", own, f"this family scores a group by its best {best}")
        return {"n_group": count, "topk_group": chosen}

    return Part(("n_group", "topk_group"), keys, read, write)


def jitter(hf_name: str = "router_jitter_noise") -> Part:
    """Noise on the input of the router in training. transformers' reaches the experts as well, ours does not."""

    def read(hf: Values) -> dict[str, Any]:
        return {"moe_input_jitter_eps": float(hf[hf_name])} if hf[hf_name] else {}

    return Part(
        (hf_name,),
        ("moe_input_jitter_eps",),
        read,
        lambda model: {hf_name: float(model["moe_input_jitter_eps"] or 0.0)},
    )


def aux_loss(hf_name: str = "router_aux_loss_coef") -> Part:
    """The coefficient of the balancing loss; a list, for several losses, has no counterpart and is not written."""

    def write(model: Values) -> dict[str, Any]:
        coefficient = model["moe_aux_loss_coeff"]
        return {} if isinstance(coefficient, list) else {hf_name: float(coefficient)}

    return Part((hf_name,), ("moe_aux_loss_coeff",), lambda hf: {"moe_aux_loss_coeff": float(hf[hf_name])}, write)


def _layer_part(
    hf_names: tuple[str, ...], read: Callable[[Values], list[bool]], write: Callable[[list[bool]], dict[str, Any]]
) -> Part:
    """`read` tells which layers have experts, `write` is told."""

    def frequency(hf: Values) -> dict[str, Any]:
        layers = read(hf)
        return {} if all(layers) else {"moe_layer_freq": [int(layer) for layer in layers]}

    return Part(hf_names, ("moe_layer_freq",), frequency, lambda model: write(moe_layers(model)))


def layers_by_step() -> Part:
    """Experts in every `decoder_sparse_step`-th layer but for those in `mlp_only_layers`."""

    def by_step(step: int, count: int) -> list[bool]:
        return [(layer + 1) % step == 0 for layer in range(count)]

    def read(hf: Values) -> list[bool]:
        dense = set(hf["mlp_only_layers"] or ())
        pattern = by_step(hf["decoder_sparse_step"], hf["num_hidden_layers"])
        return [with_experts and layer not in dense for layer, with_experts in enumerate(pattern)]

    def write(layers: list[bool]) -> dict[str, Any]:
        steps = (step for step in range(1, len(layers) // 2 + 1) if by_step(step, len(layers)) == layers)
        step = next(steps, None)
        dense = [layer for layer, with_experts in enumerate(layers) if not with_experts] if step is None else []
        return {"decoder_sparse_step": step or 1, "mlp_only_layers": dense}

    return _layer_part(("decoder_sparse_step", "mlp_only_layers"), read, write)


def layers_after_dense() -> Part:
    """Experts in all layers but the first `first_k_dense_replace`."""

    def read(hf: Values) -> list[bool]:
        return [layer >= hf["first_k_dense_replace"] for layer in range(hf["num_hidden_layers"])]

    def write(layers: list[bool]) -> dict[str, Any]:
        first = layers.index(True) if any(layers) else len(layers)
        if not all(layers[first:]):
            raise refused("model.moe_layer_freq", list(map(int, layers)), "in this family only first layers are dense")
        return {"first_k_dense_replace": first}

    return _layer_part(("first_k_dense_replace",), read, write)


def layers_between(first: str, last: str, step: str) -> Part:
    """Experts in every `step`-th layer of those from `first` to `last`, -1 for the last there is."""

    def pattern(begin: int, end: int, every: int, count: int) -> list[bool]:
        return [begin <= layer <= end and (layer + 1) % every == 0 for layer in range(count)]

    def read(hf: Values) -> list[bool]:
        count, end = hf["num_hidden_layers"], hf[last]
        return pattern(hf[first], count - 1 if end == -1 else end, hf[step], count)

    def write(layers: list[bool]) -> dict[str, Any]:
        count = len(layers)
        places = [layer for layer, with_experts in enumerate(layers) if with_experts] or [count, count - 1]
        for every in range(1, count + 1):
            if pattern(places[0], places[-1], every, count) == layers:
                return {first: places[0], last: places[-1], step: every}
        raise refused("model.moe_layer_freq", list(map(int, layers)), "in this family it is every n-th of a range")

    return _layer_part((first, last, step), read, write)


SHARED = "moe_shared_expert_intermediate_size"


def shared_expert(hf_name: str = "shared_expert_intermediate_size") -> Part:
    """One shared expert of its own width."""

    def read(hf: Values) -> dict[str, Any]:
        if hf[hf_name] < 1:
            raise refused(hf_name, hf[hf_name], "every layer with experts has a shared one in this family")
        return {SHARED: int(hf[hf_name])}

    def write(model: Values) -> dict[str, Any]:
        if not model[SHARED]:
            raise refused(f"model.{SHARED}", model[SHARED], "this family has a shared expert")
        return {hf_name: model[SHARED]}

    return Part((hf_name,), (SHARED,), read, write)


def shared_experts(hf_name: str = "n_shared_experts", *, may_be_none: bool = False) -> Part:
    """Shared experts as wide as the routed ones, side by side: together one of a multiple of their width."""

    def read(hf: Values) -> dict[str, Any]:
        count = int(hf[hf_name] or 0)
        if count < 1 and not may_be_none:
            raise refused(hf_name, hf[hf_name], "every layer with experts has a shared one in this family")
        return {SHARED: count * int(hf["moe_intermediate_size"])} if count > 0 else {}

    def write(model: Values) -> dict[str, Any]:
        shared, width = model[SHARED] or 0, model["moe_ffn_hidden_size"]
        if shared % width or not (shared or may_be_none):
            raise refused(
                f"model.{SHARED}", model[SHARED], f"in this family it is a multiple of moe_ffn_hidden_size ({width})"
            )
        return {hf_name: shared // width}

    return Part((hf_name,), (SHARED,), read, write)
