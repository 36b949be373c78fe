"""CoreAttention against attention written out with an explicit score matrix."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType

from bridge import parallel
from bridge.errors import ConfigError
from bridge.models.mcore_config import Config
from bridge.models.modules import core_attention
from bridge.models.modules.core_attention import CoreAttention
from tests.distributed import run_distributed

HEADS, GROUPS, CHANNELS, BATCH = 4, 2, 8, 2


@pytest.fixture(autouse=True)
def one_process():
    with parallel.single_process():
        torch.manual_seed(0)
        yield


def attention(**fields) -> CoreAttention:
    config = Config(
        num_layers=2,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        **{"attention_dropout": 0.0, **fields},
    )
    layer_number = 1
    built = CoreAttention(config, layer_number, AttnMaskType.causal, "self")
    if config.softmax_type == "learnable":
        torch.nn.init.normal_(built.softmax_offset)
    return built


def tensors(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(queries, BATCH, HEADS, CHANNELS)
    k, v = torch.randn(2, keys, BATCH, GROUPS, CHANNELS)
    return q, k, v


def by_hand(q, k, v, *, window=None, sink=None, segment=None, cap=None) -> torch.Tensor:
    """One query, head and batch entry at a time: softmax over the keys it may see, a sink's weight going nowhere."""
    out = torch.zeros(q.size(0), BATCH, HEADS, CHANNELS)
    offset = k.size(0) - q.size(0)
    for i in range(q.size(0)):
        position = i + offset
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            seen = [
                j
                for j in range(position + 1)
                if (window is None or position - j <= window) and (segment is None or segment[j] == segment[position])
            ]
            for b in range(BATCH):
                scores = (k[seen, b, group] @ q[i, b, head]) / math.sqrt(CHANNELS)
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                extra = torch.zeros(0) if sink is None else sink[head].detach().reshape(1)
                weights = torch.cat([scores, extra]).softmax(0)[: len(seen)]
                out[i, b, head] = weights @ v[seen, b, group]
    return out.flatten(2)


@pytest.mark.parametrize("queries", [12, 3, 1], ids=["all", "chunk", "decode"])
@pytest.mark.parametrize("window", [None, 0, 3, 10, 11])
@pytest.mark.parametrize("softmax", ["vanilla", "off-by-one", "learnable"])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_equals_attention_by_hand(queries: int, window: int | None, softmax: str, cap: float | None):
    window_size = None if window is None else (window, 0)
    core = attention(softmax_type=softmax, window_size=window_size, attn_logit_softcapping=cap)
    q, k, v = tensors(queries, 12)
    with torch.no_grad():
        out = core(q, k, v, attn_mask_type=AttnMaskType.causal)
    torch.testing.assert_close(
        out, by_hand(q, k, v, window=window, sink=core.softmax_offset, cap=cap), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize("softmax", ["vanilla", "learnable"])
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 2])
def test_packed_sequences_do_not_see_each_other(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softmax: str, cap: float | None, block: int
):
    monkeypatch.setattr(core_attention, "BLOCK", block)
    window_size = None if window is None else (window, 0)
    core = attention(softmax_type=softmax, window_size=window_size, attn_logit_softcapping=cap)
    q, k, v = tensors(12, 12)
    packing = packed(0, 5, 6, 12)
    segment = [0] * 5 + [1] + [2] * 6
    expected = by_hand(q, k, v, window=window, sink=core.softmax_offset, segment=segment, cap=cap)
    for b in range(BATCH):
        out = core(q[:, b], k[:, b], v[:, b], packed_seq_params=packing)
        torch.testing.assert_close(out, expected[:, b], atol=1e-5, rtol=1e-5)


def packed(*ends: int) -> PackedSeqParams:
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(ends, dtype=torch.int32))


def divided(segment: list[int], cases: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What this context-parallel rank computes of the samples in a row, in each of `cases`."""
    parallel.initialize({"context_parallel_size": 2})
    packing, here = packed(0, 4, 12, 16), own_tokens(segment, rank=parallel.rank("cp"))
    found = []
    for fields in cases:
        torch.manual_seed(0)
        core = attention(**fields, context_parallel_size=2)
        q, k, v = (tensor[here, 0] for tensor in tensors(16, 16))
        found.append(core(q, k, v, packed_seq_params=packing).detach())
    return found


def own_tokens(segment: list[int], *, rank: int) -> list[int]:
    """Of each sample in four quarters, the first and the last, or the two between."""
    found = []
    for one in sorted(set(segment)):
        places = [place for place, number in enumerate(segment) if number == one]
        quarter = len(places) // 4
        quarters = [places[at : at + quarter] for at in range(0, len(places), quarter)]
        found += quarters[rank] + quarters[3 - rank]
    return found


def test_context_ranks_have_their_parts_of_every_packed_sequence():
    segment = [0] * 4 + [1] * 8 + [2] * 4
    cases = [{}, {"window_size": (2, 0)}, {"softmax_type": "off-by-one"}]
    ranks = run_distributed(divided, 2, segment, cases)
    for number, fields in enumerate(cases):
        torch.manual_seed(0)
        core = attention(**fields)
        q, k, v = tensors(16, 16)
        expected = by_hand(q, k, v, window=core.window, sink=core.softmax_offset, segment=segment)[:, 0]
        for rank, found in enumerate(ranks):
            torch.testing.assert_close(found[number], expected[own_tokens(segment, rank=rank)], atol=1e-5, rtol=1e-5)


def test_masks_of_a_long_row_do_not_grow_with_its_square():
    """A row of 32,768 tokens with a window: a mask of it would have 1,073,741,824 entries."""
    core = attention(window_size=(16, 0))
    q, k, v = (torch.randn(1 << 15, 1, heads, CHANNELS) for heads in (HEADS, GROUPS, GROUPS))
    with torch.no_grad():
        found = core(q, k, v)
        last = core(q[-100:], k[-100:], v[-100:])
    torch.testing.assert_close(found[-50:], last[-50:], atol=1e-5, rtol=1e-5)


def test_layers_without_window_by_pattern():
    core = attention(window_size=(2, 0), window_attn_skip_freq=[0, 1])
    q, k, v = tensors(12, 12)
    torch.testing.assert_close(core(q, k, v), by_hand(q, k, v), atol=1e-5, rtol=1e-5)


def dropped(sequence_parallel: bool) -> list[float]:
    """Attention with dropout of the same tensors on every tensor rank, under the generator its block would choose."""
    fields = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    parallel.initialize(fields)
    core = attention(attention_dropout=0.5, **fields)
    q, k, v = tensors(12, 12)
    with get_cuda_rng_tracker().fork() if sequence_parallel else nullcontext():
        return core(q, k, v).flatten().tolist()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_drop_different_weights(sequence_parallel: bool):
    """Their heads are different ones of the model: with equal masks dropout would average over half as much."""
    one, other = run_distributed(dropped, 2, sequence_parallel, fresh=True)
    assert one != other


def test_what_it_cannot_do_it_refuses():
    q, k, v = tensors(4, 4)
    with pytest.raises(NotImplementedError, match="causal mask"):
        attention()(q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(AssertionError):
        attention()(q, k, v, attn_mask_type=AttnMaskType.no_mask)
    with pytest.raises(ConfigError, match=r"window_size: \[4, 1\]"):
        attention(window_size=(4, 1))
    with pytest.raises(ConfigError, match="qk_clip"):
        attention(qk_clip=True)
