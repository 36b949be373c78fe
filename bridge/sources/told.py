"""What a checkpoint itself says about its model: its tensors, and the arguments Megatron-LM's training script saved.

All under the names of `model` keys. Tensors tell shapes; what a forward pass does besides (heads of one width, rotary
base, eps, activation, ...) they do not, and `untold` lists it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bridge.errors import ConversionError
from bridge.weights.dist_files import DistFiles
from bridge.weights.ledger import OPTIMIZER_PREFIXES, name_some

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+?)(?:\[\d+\])?$")

# Facts for which there are several right answers at the same shapes, in the order in which they are asked for.
ALWAYS = ("family", "num_layers", "hidden_size", "num_attention_heads")
GROUPED = ("num_query_groups", "kv_channels")
LATENT = ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
EXPERTS = ("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax")
AFTER = ("layernorm_epsilon", "activation_func", "position_embedding_type", "max_sequence_length", "vocab_size")
# A `model` section may leave these to megatron-core's defaults, as everywhere; a wrong width then shows in the shapes.
MAY_BE_DEFAULT = frozenset({*GROUPED, "moe_router_score_function", "moe_router_pre_softmax"})


class Facts(NamedTuple):
    """`model`: keys and values. `evidence`: for those that come from tensors, the name of one that shows it.
    `hints`: what is known of the keys that are not, as text."""

    model: dict[str, Any]
    evidence: dict[str, str]
    hints: tuple[str, ...] = ()


def untold(known: Mapping[str, Any]) -> list[str]:
    """The facts that `known` lacks and no tensor can tell."""
    attention = LATENT if known.get("multi_latent_attention") else GROUPED
    experts = EXPERTS if known.get("num_moe_experts") else ()
    rotary = ("rotary_base",) if known.get("position_embedding_type", "rope") == "rope" else ()
    return [name for name in (*ALWAYS, *attention, *experts, *AFTER, *rotary) if known.get(name) is None]


def of_tensors(dist: DistFiles) -> Facts:
    """The facts that the shapes of a checkpoint's tensors tell. Raises ConversionError when it holds no GPT model.

    `dist` has one key per layer (`key_layouts.canonical`).
    """
    weights = [key for key in dist.tensors if not key.startswith(OPTIMIZER_PREFIXES)]
    numbers = {int(found[1]) for found in map(_LAYER.match, weights) if found}
    if EMBEDDING not in dist.tensors or not numbers:
        raise ConversionError(
            f"{dist.directory}: holds no GPT model of megatron-core ({EMBEDDING} or decoder.layers is missing, there "
            f"are {name_some(weights) or 'no tensors'})"
        )
    shapes = _shapes_by_layer(dist, weights)
    rows, hidden = dist.spec(EMBEDDING).shape
    model: dict[str, Any] = {"num_layers": len(numbers), "hidden_size": hidden}
    evidence = {"num_layers": f"decoder.layers.{max(numbers)}", "hidden_size": EMBEDDING}
    model["share_embeddings_and_output_weights"] = OUTPUT not in dist.tensors
    evidence["share_embeddings_and_output_weights"] = f"{OUTPUT} {'is' if OUTPUT in dist.tensors else 'is not'} there"
    model["normalization"] = "LayerNorm" if "decoder.final_layernorm.bias" in dist.tensors else "RMSNorm"
    if "embedding.position_embeddings.weight" in dist.tensors:
        length = dist.spec("embedding.position_embeddings.weight").shape[0]
        model |= {"position_embedding_type": "learned_absolute", "max_sequence_length": length}
    model |= _mlp(shapes)
    attention, hints = _attention(shapes)
    experts = [key for key in weights if key.endswith("mlp.router.weight")]
    if experts:
        model["num_moe_experts"] = dist.spec(experts[0]).shape[0]
        evidence["num_moe_experts"] = experts[0]
    return Facts(model | attention, evidence, (f"vocab_size <= {rows}, the rows of {EMBEDDING}", *hints))


def _shapes_by_layer(dist: DistFiles, keys: Iterable[str]) -> dict[str, set[tuple[int, ...]]]:
    """Name inside a layer -> the shapes it has in the layers, those of an expert without the number of experts."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for key in keys:
        if found := _LAYER.match(key):
            shapes.setdefault(found[2], set()).add(dist.spec(key).shape)
    return shapes


def _only(shapes: Mapping[str, set[tuple[int, ...]]], name: str) -> tuple[int, ...] | None:
    """The one shape a tensor has in all layers that have it."""
    found = shapes.get(name, set())
    return next(iter(found)) if len(found) == 1 else None


def _mlp(shapes: Mapping[str, set[tuple[int, ...]]]) -> dict[str, Any]:
    model: dict[str, Any] = {}
    places = (("ffn_hidden_size", "mlp."), ("moe_ffn_hidden_size", "mlp.experts.experts."))
    for key, place in places:
        first, second = _only(shapes, f"{place}linear_fc1.weight"), _only(shapes, f"{place}linear_fc2.weight")
        if first and second:
            model |= {key: second[-1], "gated_linear_unit": first[-2] == 2 * second[-1]}
    return model


def _attention(shapes: Mapping[str, set[tuple[int, ...]]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    if any(".linear_kv_down_proj." in f".{name}" for name in shapes):
        return {"multi_latent_attention": True}, ()
    qkv, output = _only(shapes, "self_attention.linear_qkv.weight"), _only(shapes, "self_attention.linear_proj.weight")
    norm = _only(shapes, "self_attention.q_layernorm.weight")
    if not qkv or not output:
        return {}, ()
    if norm and norm[0] < output[1] and output[1] % norm[0] == 0:  # one norm for every head: its width is the head's
        heads, groups = output[1] // norm[0], (qkv[0] - output[1]) // norm[0] // 2
        if groups and heads % groups == 0:
            return {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": norm[0]}, ()
    return {}, (
        f"num_attention_heads x kv_channels = {output[1]}",
        f"num_query_groups x kv_channels = {(qkv[0] - output[1]) // 2}",
    )


# `model` key -> the argument of Megatron-LM's training script with the same meaning, where the names differ.
RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "max_sequence_length": "max_position_embeddings",
    "num_moe_experts": "num_experts",
}
SAME_NAME = """
add_bias_linear add_qkv_bias ffn_hidden_size hidden_size kv_channels moe_ffn_hidden_size moe_router_pre_softmax
moe_router_score_function moe_router_topk moe_shared_expert_intermediate_size multi_latent_attention normalization
num_attention_heads num_layers position_embedding_type q_lora_rank kv_lora_rank qk_head_dim qk_layernorm
qk_pos_emb_head_dim rotary_base rotary_interleaved rotary_percent v_head_dim
"""
ONLY_LATENT = frozenset({"q_lora_rank", "kv_lora_rank", *LATENT})
ONLY_EXPERTS = frozenset({"moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", *EXPERTS})
ONLY_ROTARY = frozenset({"rotary_base", "rotary_interleaved", "rotary_percent"})


def of_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in the arguments of Megatron-LM's training script, as its core_transformer_config_from_args reads them.

    The size of the vocabulary is not among them: what is stored there is padded.
    """
    if not args:
        return {}
    model = {name: args.get(RENAMED.get(name, name)) for name in (*SAME_NAME.split(), *RENAMED)}
    if not model["multi_latent_attention"]:
        model = {name: value for name, value in model.items() if name not in ONLY_LATENT}
    if not model["num_moe_experts"]:
        model = {name: value for name, value in model.items() if name not in ONLY_EXPERTS}
    if model["position_embedding_type"] != "rope":
        model = {name: value for name, value in model.items() if name not in ONLY_ROTARY}
    grouped = args.get("group_query_attention")
    model["num_query_groups"] = args.get("num_query_groups") if grouped else model["num_attention_heads"]
    if "untie_embeddings_and_output_weights" in args:
        model["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    model |= _activation(args)
    return {name: value for name, value in model.items() if value is not None}


def _activation(args: Mapping[str, Any]) -> dict[str, Any]:
    for flag, name, gated in (
        ("swiglu", "silu", True),
        ("quick_geglu", "quick_gelu", True),
        ("squared_relu", "squared_relu", False),
    ):
        if args.get(flag):
            return {"activation_func": name, "gated_linear_unit": gated}
    return {"activation_func": "gelu", "gated_linear_unit": False} if "swiglu" in args else {}
