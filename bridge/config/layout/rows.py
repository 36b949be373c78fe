"""Rules about rows that samples share, or that are padded (data.packing, data.padding_free)."""

from collections.abc import Mapping
from typing import Any

from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown


def row_length_may_vary(routed: Routed) -> bool:
    """Whether micro-batches may have rows of different lengths: what needs one length is not used."""
    return _needs_one_length(routed) is None


def _needs_one_length(routed: Routed) -> tuple[str, Any, str] | None:
    """A key and its value that need micro-batches of one length, and what to set instead; None: there is none."""
    if routed.get("pipeline_model_parallel_size") > 1 and not routed.get("variable_seq_lengths"):
        return "variable_seq_lengths", False, "true"
    if routed.get("num_moe_experts") is not None and routed.get("moe_token_dispatcher_type") == "allgather":
        return "moe_token_dispatcher_type", "allgather", "alltoall"
    if routed.get("tp_comm_overlap"):
        return "tp_comm_overlap", True, "false"
    if routed.get("cuda_graph_impl") not in (None, "none"):
        return "cuda_graph_impl", routed.get("cuda_graph_impl"), "none"
    return None


def check(routed: Routed, data: Mapping[str, Any]) -> None:
    """Raises ConfigError where rows of `data`, the checked section, would give something else than their samples."""
    packing, padding_free = data.get("packing"), data.get("padding_free")
    if packing is None:  # a source whose rows are full
        return
    if padding_free and (found := _needs_one_length(routed)):
        name, value, instead = found
        raise ConfigError(
            f"data.padding_free: true makes micro-batches of different lengths, but {routed.key(name)} is "
            f"{shown(value)}; set it to {instead}, or data.packing=true instead, whose rows have one length"
        )
    _check_experts(routed, joined=bool(packing or padding_free))
    if packing or padding_free:
        _check_joined(routed, "data.packing" if packing else "data.padding_free")


def _check_experts(routed: Routed, *, joined: bool) -> None:
    if routed.get("num_moe_experts") is None:
        return
    if (factor := routed.get("moe_expert_capacity_factor")) is not None:
        raise ConfigError(
            f"{routed.key('moe_expert_capacity_factor')}: {factor} would let padding tokens take the places of real "
            "ones; leave it out"
        )
    kinds = routed.get("moe_router_load_balancing_type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    if "sinkhorn" in kinds or "seq_aux_loss" in kinds:
        kind = "sinkhorn" if "sinkhorn" in kinds else "seq_aux_loss"
        reason = "balances each row, not each sample in it" if joined else "cannot leave padding tokens out"
        raise ConfigError(
            f"{routed.key('moe_router_load_balancing_type')}: {kind} {reason}; set it to aux_loss, which balances a "
            "micro-batch as a whole"
        )
    if routed.get("mtp_num_layers"):
        raise ConfigError(
            f"{routed.key('mtp_num_layers')}: {routed.get('mtp_num_layers')} prediction modules with experts would "
            "count padding tokens in their balancing losses; set it to null"
        )


def _check_joined(routed: Routed, key: str) -> None:
    """What cannot be done for samples that share a row."""
    rope = (routed.get("rope_parameters") or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise ConfigError(
            f"{key}: true with model.rope_parameters.rope_type={rope} would rotate a sample by the length of the "
            f"longest one in its row; set {key}=false"
        )
    if routed.get("mtp_num_layers") and routed.get("recompute_granularity") == "full":
        raise ConfigError(
            f"{routed.key('recompute_granularity')}: full cannot repeat a prediction module (model.mtp_num_layers="
            f"{routed.get('mtp_num_layers')}) for samples that share a row; set it to selective, or {key}=false"
        )
    for name, harmless in (
        ("overlap_moe_expert_parallel_comm", False),
        ("fused_single_qkv_rope", False),
        ("cuda_graph_impl", "none"),
    ):
        value = routed.get(name)
        if value not in (None, harmless):
            raise ConfigError(
                f"{routed.key(name)}: {shown(value)} knows no samples that share a row; set it to {shown(harmless)}, "
                f"or {key}=false"
            )
