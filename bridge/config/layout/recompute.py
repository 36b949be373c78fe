"""Rules about activations that are computed again in the backward pass instead of being kept.

None of them changes a result; the rules are about settings that megatron-core would ignore or stop at later.
"""

from bridge.config.complete import layers
from bridge.config.layout.sizes import Layout
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown

# What each granularity reads besides itself; anything else that is set would do nothing.
READ_BY: dict[str | None, tuple[str, ...]] = {
    None: (),
    "full": ("recompute_method", "recompute_num_layers", "distribute_saved_activations"),
    "selective": ("recompute_modules",),
}
# recompute_modules -> what the model must have for it; None: every model has it.
MODULES = {
    "core_attn": None,
    "layernorm": None,
    "mlp": None,
    "moe": "num_moe_experts",
    "moe_act": "num_moe_experts",
    "shared_experts": "moe_shared_expert_intermediate_size",
    "mla_up_proj": "multi_latent_attention",
}


def recompute(routed: Routed, layout: Layout) -> None:
    granularity = routed.get("recompute_granularity")
    for name in dict.fromkeys(name for names in READ_BY.values() for name in names):
        if routed.get(name) and name not in READ_BY[granularity]:
            fitting = next(other for other, names in READ_BY.items() if name in names)
            raise ConfigError(
                f"{routed.key(name)}: {shown(routed.get(name))} has no effect with "
                f"recompute_granularity={shown(granularity)}; "
                f"set parallelism.recompute_granularity={fitting}, or {routed.key(name)} to null"
            )
    if granularity == "full":
        _full(routed, layout)
    for module in routed.get("recompute_modules", []):
        _module(routed, module)


def _full(routed: Routed, layout: Layout) -> None:
    key = routed.key("recompute_granularity")
    if routed.get("recompute_method") is None or routed.get("recompute_num_layers") is None:
        raise ConfigError(
            f"{key}: full needs recompute_method and recompute_num_layers; set parallelism.recompute_method=uniform "
            "parallelism.recompute_num_layers=1 (every layer by itself), or recompute_method=block for the first N "
            "of each stage"
        )
    name = "distribute_saved_activations"
    if routed.get(name) and (layout.tp == 1 or routed.get("sequence_parallel")):
        have = "sequence_parallel divides them already" if layout.tp > 1 else "TP = 1"
        raise ConfigError(f"{routed.key(name)}: divides activations over tensor ranks, but {have}; set it to false")


def _module(routed: Routed, module: str) -> None:
    key = routed.key("recompute_modules")
    if module not in MODULES:
        raise ConfigError(f"{key}: no module is called {shown(module)}; set some of {', '.join(MODULES)}")
    needed = MODULES[module]
    if needed is not None and not routed.get(needed):
        raise ConfigError(f"{key}: {module} needs a model with model.{needed}; set it without {module}")
    if module == "mlp" and all(kind.experts for kind in layers(routed.given)):
        raise ConfigError(
            f"{key}: mlp is the MLP of layers without experts, but every layer has experts; set moe instead"
        )
