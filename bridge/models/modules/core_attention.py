"""Core attention on torch's scaled_dot_product_attention, used wherever Transformer Engine's is not.

Causal self-attention with grouped queries, different key and value widths, sliding window, softmax sinks, capped
scores, packed sequences, a key-value cache, and context parallelism by gathering keys and values. Exact in all of
these; what it cannot do it refuses.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from bridge import platform
from bridge.errors import ConfigError, shown
from bridge.models.modules.scales import softcap

# TransformerConfig fields that ask something of the core attention which this one does not do; their harmless values.
REFUSED_FIELDS = (
    ("apply_query_key_layer_scaling", False),
    ("attention_softmax_in_fp32", True),
    ("qk_clip", False),
    ("log_max_attention_logit", False),
    ("batch_invariant_mode", False),
)
CAUSAL_MASKS = (AttnMaskType.causal, AttnMaskType.padding_causal)


class CoreAttention(MegatronModule):
    """softmax(q k^T * scale) v for one layer; arguments as those of megatron-core's DotProductAttention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        for field, harmless in REFUSED_FIELDS:
            if getattr(config, field) != harmless:
                raise ConfigError(
                    f"{field}: {shown(getattr(config, field))} needs Transformer Engine's attention; "
                    f"set {shown(harmless)}"
                )
        if attention_type != "self":
            raise ConfigError(f"attention: {attention_type!r} attention needs Transformer Engine; only 'self' is here")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        cap = getattr(config, "attn_logit_softcapping", None)
        self.attend = F.scaled_dot_product_attention if cap is None else partial(capped_attention, cap=cap)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = _left_window(config.window_size) if windowed else None
        self._make_sink(config)

    def _make_sink(self, config: TransformerConfig) -> None:
        """softmax_type: vanilla has no sink, off-by-one a sink of logit 0, learnable one logit per head."""
        heads = divide(config.num_attention_heads, self.tp_group.size())
        device = None if config.use_cpu_initialization else platform.device()
        zeros = torch.zeros(heads, dtype=config.params_dtype, device=device)
        if config.softmax_type == "learnable":
            self.register_parameter("softmax_offset", torch.nn.Parameter(zeros))
        else:
            sink = zeros if config.softmax_type == "off-by-one" else None
            self.register_buffer("softmax_offset", sink, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention output, [sequence, batch, heads * v_channels], or [tokens, heads * v_channels] when packed.

        query [sequence, batch, heads, channels], key and value [keys, batch, groups, channels], or without the batch
        dimension when packed. More keys than queries mean a cache: the queries are the last positions. `attention_mask`
        must be None: which pairs attend follows from causality, window and packing alone.
        """
        decoding = attn_mask_type == AttnMaskType.no_mask and query.size(0) == 1
        assert decoding or attn_mask_type is None or attn_mask_type in CAUSAL_MASKS, attn_mask_type
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("CoreAttention computes its own causal mask; pass attention_mask=None, no bias")
        packed = packed_seq_params is not None
        if packed:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if self.cp_group.size() > 1:
            if packed:
                raise ConfigError(
                    f"context_parallel_size: {self.cp_group.size()} splits every sequence of a packed row, which "
                    "only Transformer Engine's attention supports; set parallelism.context_parallel_size=1, or leave "
                    "packed_seq_params out"
                )
            key = gather_from_sequence_parallel_region(key.contiguous(), group=self.cp_group)
            value = gather_from_sequence_parallel_region(value.contiguous(), group=self.cp_group)
        with self._generator():
            out = self._attend(query, key, value, packed_seq_params)
        out = out.permute(2, 0, 1, 3).contiguous()
        return out.view(out.size(0), -1) if packed else out.view(out.size(0), out.size(1), -1)

    def _generator(self) -> AbstractContextManager[None]:
        """What dropout draws from, as tensor ranks have different heads; under sequence parallelism the block forks."""
        if not self.dropout or not self.training or self.config.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams | None) -> Tensor:
        """[batch, heads, queries, v_channels] from tensors [sequence, batch, heads, channels]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        options: dict[str, Any] = {
            "dropout_p": self.dropout if self.training else 0.0,
            "scale": self.softmax_scale if self.softmax_scale is not None else 1 / math.sqrt(q.size(-1)),
            "enable_gqa": q.size(1) != k.size(1),
        }
        windowed = self.window is not None and self.window < k.size(2) - 1
        plain = not windowed and self.softmax_offset is None and packing is None and q.size(2) == k.size(2)
        if plain:  # no mask tensor: torch may take its flash kernel
            return self.attend(q, k, v, is_causal=True, **options)
        allowed = self._allowed(q.size(2), k.size(2), packing, q.device)
        if self.softmax_offset is None:
            return self.attend(q, k, v, attn_mask=allowed, **options)
        # A sink is one more key with value 0 whose logit is the offset: it takes its share of the softmax, no more.
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        logits = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, -math.inf)
        sink = self.softmax_offset.to(q.dtype)[:, None, None].expand(-1, q.size(2), 1)
        mask = torch.cat([logits.expand(q.size(1), -1, -1), sink], dim=-1)[None]
        return self.attend(q, k, v, attn_mask=mask, **options)

    def _allowed(self, queries: int, keys: int, packing: PackedSeqParams | None, device: torch.device) -> Tensor:
        """Which query may attend to which key: bool [queries, keys]."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            key_positions = torch.arange(keys, device=device)
            query_positions = key_positions[-queries:]
        else:
            query_positions = _zigzag(queries, rank, size, device)
            key_positions = torch.cat([_zigzag(queries, r, size, device) for r in range(size)])
        distance = query_positions[:, None] - key_positions[None, :]
        allowed = distance >= 0
        if self.window is not None:
            allowed &= distance <= self.window
        if packing is not None:
            sequence = torch.bucketize(key_positions, packing.cu_seqlens_q[1:].to(device), right=True)
            allowed &= sequence[-queries:, None] == sequence[None, :]
        return allowed

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The learnable sinks, split over tensor ranks by head; nothing for the other softmax types."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cap: float,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention with scores cap * tanh(score / cap), which no kernel of torch's has.

    query [batch, heads, queries, channels]; key, value [batch, groups, keys, channels]; mask [.., queries, keys], bool
    or added to the scores. Keeps all scores, so memory grows with queries times keys.
    """
    if is_causal:
        attn_mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(1) // key.size(1), dim=1) for t in (key, value))
    scores = softcap((query @ key.transpose(2, 3) * scale).float(), cap)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout_p) @ value


def _left_window(window_size: tuple[int, int]) -> int | None:
    """Keys to the left of a query that it may attend to; None: all. The right side must be 0 or -1 (causal anyway)."""
    left, right = window_size
    if right > 0:
        raise ConfigError(
            f"window_size: {list(window_size)} looks {right} tokens ahead; a causal model needs [left, 0]"
        )
    return left if left >= 0 else None


def _zigzag(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Positions held by context rank `rank`: of 2 * size chunks it has numbers rank and 2 * size - 1 - rank, which
    balances causal work. `length` counts the positions of one rank."""
    chunk = length // 2
    first = torch.arange(chunk, device=device)
    return torch.cat([first + rank * chunk, first + (2 * size - 1 - rank) * chunk])
