"""Norms behind a branch: after attention's output projection and the MLP's second one, before the residual is added.

Gemma 2 (Gemma Team 2024, arXiv 2408.00118) and GLM-4-0414 have them besides the norms before a branch, OLMo 2 (OLMo
Team 2025, arXiv 2501.00656) instead of those. The norm belongs to the projection, so megatron-core's layer needs no
change.
"""

from functools import cache
from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from bridge.errors import ConfigError, shown
from bridge.models.modules.norm import Norm


@cache
def with_output_norm(linear: type) -> type:
    """`linear`, a row-parallel layer of megatron-core, with a norm of its whole output, named post_layernorm.

    The bias is added before the norm, so none is left to the caller. Under sequence parallelism the output is a slice
    of the sequence, whole in its channels, which is all a norm needs.
    """

    class WithOutputNorm(linear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = Norm(config, output_size, eps=config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            output, bias = super().forward(x)
            return self.post_layernorm(output if bias is None else output + bias), None

    WithOutputNorm.__name__ = f"{linear.__name__}WithOutputNorm"
    return WithOutputNorm


def place_norms(layer: ModuleSpec, config: Any) -> None:
    """Change a layer's specification, local or Transformer Engine's, as `norm_placement` says.

    Raises ConfigError for layers with experts and for Transformer Engine's fused MLP, which have no such projection.
    """
    placement = config.norm_placement
    if placement == "pre":
        return
    parts: Any = layer.submodules
    if parts.mlp.module is not MLP:
        raise ConfigError(
            f"model.norm_placement: {shown(placement)} is for dense MLPs, not for {parts.mlp.module.__name__}; set pre"
        )
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    attention.linear_proj = with_output_norm(attention.linear_proj)
    mlp.linear_fc2 = with_output_norm(mlp.linear_fc2)
    if placement == "post":
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        for holder, name in ((attention, "linear_qkv"), (mlp, "linear_fc1")):
            if getattr(holder, name) is TELayerNormColumnParallelLinear:
                setattr(holder, name, TEColumnParallelLinear)
