"""Rules about experts divided over processes."""

from bridge.config import divisibility
from bridge.config.divisibility import divisors, either, nearest
from bridge.config.layout.sizes import Layout
from bridge.config.routing import Routed
from bridge.errors import ConfigError


def experts(routed: Routed, layout: Layout) -> None:
    experts = routed.get("num_moe_experts")
    ep, etp = routed.number("expert_model_parallel_size"), routed.number("expert_tensor_parallel_size", layout.tp)
    if experts is None:
        for number in (ep, etp):
            if number.key and number.value > 1:
                raise ConfigError(f"{number.key}: {number.value} needs a model with model.num_moe_experts; set it to 1")
        return
    etp_key = etp.key or "parallelism.expert_tensor_parallel_size"
    divisibility.require(routed.number("num_moe_experts"), by=[ep])
    width = "ffn_hidden_size" if routed.given.get("moe_ffn_hidden_size") is None else "moe_ffn_hidden_size"
    divisibility.require(routed.number(width), by=[etp._replace(key=etp_key)])
    if layout.ep == 1 and layout.etp != layout.tp:
        # tensor_parallel/layers.py marks expert weights for the expert groups only if EP > 1: else their gradients go
        # over the data-parallel group of the dense weights, which holds the same slice of an expert only if ETP = TP.
        larger = nearest(divisors(experts)[1:], layout.tp)
        more = f", or parallelism.expert_model_parallel_size to {either(larger)}" if larger else ""
        raise ConfigError(
            f"{etp_key}: with EP = 1, ETP = TP must hold or the ranks' experts drift apart, but "
            f"{layout.etp} != {layout.tp}; set {etp_key} to {layout.tp}{more}"
        )
    if layout.tp > 1 and not routed.get("sequence_parallel"):
        raise ConfigError(
            f"parallelism.sequence_parallel: must be true for experts with TP > 1, but it is false with "
            f"TP = {layout.tp}; set it to true"
        )
    if layout.etp > 1 and routed.get("add_bias_linear"):
        raise ConfigError(
            f"{etp_key}: ETP = 1 must hold for experts with biases, but ETP = {layout.etp}; "
            f"set {etp_key} to 1, or model.add_bias_linear to false"
        )
    if routed.get("moe_token_dispatcher_type") == "allgather" and routed.get("variable_seq_lengths"):
        raise ConfigError(
            f"{routed.key('moe_token_dispatcher_type')}: allgather needs ranks with equally many tokens, but "
            "variable_seq_lengths is true; set it to alltoall"
        )
