"""RMSNorm of queries and keys over all heads together, as in OLMo 2 and OLMoE (transformers' Olmo2Attention)."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from bridge import parallel, platform
from bridge.errors import ConfigError


class FullWidthNorm(MegatronModule):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the channels of all `num_heads` heads of a token.

    Tensor ranks hold the heads, and the weight [num_heads * channels], in equal parts, so the sum of squares runs over
    ranks. Every rank's output depends on every rank's input through that sum: its gradient is summed over ranks too.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, *, num_heads: int) -> None:
        super().__init__(config=config)
        self.group, self.eps = parallel.group("tp"), eps
        self.width = num_heads * hidden_size
        device = None if config.use_cpu_initialization else platform.device()
        weight = torch.ones(self.width // self.group.size(), dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x, [..., heads of this rank, channels]; float32 inside."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        scaled = flat * torch.rsqrt(squares / self.width + self.eps) * self.weight
        return scaled.to(x.dtype).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, split over tensor ranks by head."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def use(layer: Any, config: Any) -> None:
    """Give self-attention these norms where `qk_layernorm_full_width` asks for them. Raises ConfigError."""
    if not config.qk_layernorm_full_width:
        return
    attention = layer.submodules.self_attention
    ranks, groups = config.tensor_model_parallel_size, config.num_query_groups
    if config.qk_layernorm:  # megatron-core would sum the gradients of both weights over tensor ranks
        raise _refused("is a different norm from qk_layernorm; set only one of the two")
    if config.normalization != "RMSNorm" or attention.module is MLASelfAttention:
        raise _refused("needs model.normalization=RMSNorm and attention that is not latent")
    if groups % ranks:
        raise _refused(
            f"needs whole query groups on each tensor rank, but {groups} % {ranks} = {groups % ranks}; "
            "set parallelism.tensor_model_parallel_size to a divisor of model.num_query_groups"
        )
    attention.submodules.q_layernorm = ModuleSpec(FullWidthNorm, params={"num_heads": config.num_attention_heads})
    attention.submodules.k_layernorm = ModuleSpec(FullWidthNorm, params={"num_heads": groups})


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"model.qk_layernorm_full_width: true {reason}")
