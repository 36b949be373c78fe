"""Rules about experts divided over processes."""

from bridge.config import divisibility
from bridge.config.divisibility import divisors, either, nearest
from bridge.config.layout.sizes import Fields, Layout
from bridge.errors import ConfigError


def experts(fields: Fields, layout: Layout) -> None:
    experts = fields.get("num_moe_experts")
    ep, etp = fields.number("expert_model_parallel_size"), fields.number("expert_tensor_parallel_size", layout.tp)
    if experts is None:
        for number in (ep, etp):
            if number.key and number.value > 1:
                raise ConfigError(f"{number.key}: {number.value} needs a model with model.num_moe_experts; set it to 1")
        return
    etp_key = etp.key or "parallelism.expert_tensor_parallel_size"
    divisibility.require(fields.number("num_moe_experts"), by=[ep])
    dense = fields.number("ffn_hidden_size", 4 * fields.get("hidden_size"))
    own = fields.get("moe_ffn_hidden_size") is not None
    divisibility.require(fields.number("moe_ffn_hidden_size") if own else dense, by=[etp._replace(key=etp_key)])
    if layout.ep == 1 and layout.etp < layout.tp:
        # tensor_parallel/layers.py marks expert weights for the expert groups only if EP > 1.
        larger = nearest(divisors(experts)[1:], layout.tp)
        more = f", or parallelism.expert_model_parallel_size to {either(larger)}" if larger else ""
        raise ConfigError(
            f"{etp_key}: with EP = 1, ETP >= TP must hold or the ranks' experts drift apart, but "
            f"{layout.etp} < {layout.tp}; set {etp_key} to {layout.tp}{more}"
        )
    if layout.tp > 1 and not fields.get("sequence_parallel", False):
        raise ConfigError(
            f"parallelism.sequence_parallel: must be true for experts with TP > 1, but it is false with "
            f"TP = {layout.tp}; set it to true"
        )
    if layout.etp > 1 and fields.get("add_bias_linear", True):
        raise ConfigError(
            f"{etp_key}: ETP = 1 must hold for experts with biases, but ETP = {layout.etp}; "
            f"set {etp_key} to 1, or model.add_bias_linear to false"
        )
    if layout.ep > 1 and fields.get("use_cpu_initialization", False):
        raise ConfigError(
            f"{fields.key('use_cpu_initialization')}: gives all {layout.ep} EP ranks the same experts; set it to false"
        )
