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
BLOCK = 512  # queries that a mask is made for at a time


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
        self.cap: float | None = getattr(config, "attn_logit_softcapping", None)
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
        lengths = None if packed_seq_params is None else _lengths(packed_seq_params)
        if packed:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if self.cp_group.size() > 1:
            key = gather_from_sequence_parallel_region(key.contiguous(), group=self.cp_group)
            value = gather_from_sequence_parallel_region(value.contiguous(), group=self.cp_group)
        with self._generator():
            q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            out = self._attend(q, k, v, lengths)
        out = out.permute(2, 0, 1, 3).contiguous()
        return out.view(out.size(0), -1) if packed else out.view(out.size(0), out.size(1), -1)

    def _generator(self) -> AbstractContextManager[None]:
        """What dropout draws from, as tensor ranks have different heads; under sequence parallelism the block forks."""
        if not self.dropout or not self.training or self.config.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int] | None) -> Tensor:
        """[batch, heads, queries, v_channels] from tensors [batch, heads, sequence, channels].

        `lengths`: of the samples that share the row, in tokens of all context-parallel ranks; None: one sample.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            parts = (one.split(lengths, dim=2) if lengths else (one,) for one in (query, key, value))
            found = [self._causal(q, k, v, first=k.size(2) - q.size(2)) for q, k, v in zip(*parts, strict=True)]
            return _joined(found)
        # A rank has two pieces of every sample, and the keys of all ranks come rank by rank.
        own = [length // size for length in lengths] if lengths else [query.size(2)]
        by_rank = (one.unflatten(2, (size, -1)).split(own, dim=3) for one in (key, value))
        found = []
        for q, k, v in zip(query.split(own, dim=2), *by_rank, strict=True):
            k, v = _in_order(k), _in_order(v)
            for half, number in zip(q.chunk(2, dim=2), (rank, 2 * size - 1 - rank), strict=True):
                found.append(self._causal(half, k, v, first=number * half.size(2)))
        return torch.cat(found, dim=2)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, *, first: int) -> Tensor:
        """Attention within one sample, whose keys are all given and whose queries are those from position `first` on.

        Where a mask is needed it is made for BLOCK queries at a time and the keys these see, so that memory grows with
        the length of the sample, not with its square.
        """
        queries = query.size(2)
        options: dict[str, Any] = {
            "dropout_p": self.dropout if self.training else 0.0,
            "scale": self.softmax_scale if self.softmax_scale is not None else 1 / math.sqrt(query.size(-1)),
            "enable_gqa": query.size(1) != key.size(1),
        }
        windowed = self.window is not None and self.window < first + queries - 1
        if not windowed and self.softmax_offset is None and self.cap is None and first == 0:
            # No mask tensor: torch may take its flash kernel.
            return F.scaled_dot_product_attention(
                query, key[:, :, :queries], value[:, :, :queries], is_causal=True, **options
            )
        found = []
        for start in range(0, queries, BLOCK):
            q = query[:, :, start : start + BLOCK]
            begin, end = first + start, first + start + q.size(2)
            seen = slice(max(0, begin - self.window) if self.window is not None else 0, end)
            distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(
                seen.start, end, device=q.device
            )
            allowed = distance >= 0
            if self.window is not None:
                allowed &= distance <= self.window
            found.append(self._masked(q, key[:, :, seen], value[:, :, seen], allowed, options))
        return _joined(found)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention of pairs that are `allowed`, bool [queries, keys]."""
        attend = F.scaled_dot_product_attention if self.cap is None else partial(capped_attention, cap=self.cap)
        if self.softmax_offset is None:
            return attend(query, key, value, attn_mask=allowed, **options)
        # A sink is one more key with value 0 whose logit is the offset: it takes its share of the softmax, no more.
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        logits = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(~allowed, -math.inf)
        sink = self.softmax_offset.to(query.dtype)[:, None, None].expand(-1, query.size(2), 1)
        mask = torch.cat([logits.expand(query.size(1), -1, -1), sink], dim=-1)[None]
        return attend(query, key, value, attn_mask=mask, **options)

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
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention with scores cap * tanh(score / cap), which no kernel of torch's has.

    query [batch, heads, queries, channels]; key, value [batch, groups, keys, channels]; mask [.., queries, keys], bool
    or added to the scores. Keeps all scores.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(1) // key.size(1), dim=1) for t in (key, value))
    scores = softcap((query @ key.transpose(2, 3) * scale).float(), cap)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout_p) @ value


def _joined(parts: list[Tensor]) -> Tensor:
    """Along the queries. One is not copied: attention keeps it for its backward pass, and the next layer the same."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _left_window(window_size: tuple[int, int]) -> int | None:
    """Keys to the left of a query that it may attend to; None: all. The right side must be 0 or -1 (causal anyway)."""
    left, right = window_size
    if right > 0:
        raise ConfigError(
            f"window_size: {list(window_size)} looks {right} tokens ahead; a causal model needs [left, 0]"
        )
    return left if left >= 0 else None


def _lengths(packing: PackedSeqParams) -> list[int]:
    """Of the samples in a row, with their padding."""
    ends = packing.cu_seqlens_q if packing.cu_seqlens_q_padded is None else packing.cu_seqlens_q_padded
    return ends.diff().tolist()


def _in_order(by_rank: Tensor) -> Tensor:
    """[batch, heads, sequence, channels] of a sample from what each context rank has, [batch, heads, ranks, part, ..].

    Of 2 * ranks equal pieces rank r has numbers r and 2 * ranks - 1 - r, which balances causal work.
    """
    early, late = by_rank.chunk(2, dim=3)
    return torch.cat([early, late.flip(2)], dim=2).flatten(2, 3)
