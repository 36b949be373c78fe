"""Ops against hand-written layouts, and the property that split undoes merge."""

import itertools

import pytest
import torch

from bridge.weights.ops import Copy, Flat, Interleaved, Joined, Qkv, Stack, Transposed


@pytest.mark.parametrize("trailing", [(), (3,), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        (Copy(), (5,)),
        (Interleaved(), (8,)),
        (Stack(), (6, 6)),
        (Stack(3), (2, 2, 2)),
        (Joined(Qkv(4, 2, 3), (12, 6, 6)), (24,)),
    ]
    + [
        (Qkv(heads, groups, channels), (heads * channels, groups * channels, groups * channels))
        for (heads, groups), channels in itertools.product([(4, 4), (4, 2), (6, 1), (9, 3)], [1, 8])
    ],
)
def test_split_undoes_merge(op, sizes, trailing, dtype):
    parts = [torch.randint(0, 120, (size, *trailing), dtype=torch.int8).view(torch.int8).to(dtype) for size in sizes]
    fused = op.merge(parts)
    assert fused.shape == (sum(sizes), *trailing)
    for part, again in zip(parts, op.split(fused), strict=True):
        assert again.dtype == dtype
        assert torch.equal(part.contiguous().view(torch.uint8), again.contiguous().view(torch.uint8))


def test_qkv_order_is_queries_key_value_per_group():
    rows = lambda name, n: [f"{name}{i}" for i in range(n)]  # noqa: E731
    names = rows("q", 4) + rows("k", 2) + rows("v", 2)
    codes = torch.arange(8)
    fused = Qkv(num_attention_heads=4, num_query_groups=2, kv_channels=1).merge([codes[:4], codes[4:6], codes[6:]])
    assert [names[i] for i in fused] == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_gate_lies_above_up():
    assert Stack().merge([torch.zeros(2), torch.ones(2)]).tolist() == [0, 0, 1, 1]


def test_pairs_of_gate_and_up_are_taken_apart():
    assert Interleaved().merge([torch.tensor([0, 10, 1, 11, 2, 12])]).tolist() == [0, 1, 2, 10, 11, 12]


def test_shapes_are_told_by_meta_tensors():
    q, k, v = Qkv(4, 2, 8).split(torch.empty(64, 5, device="meta"))
    assert (q.shape, k.shape, v.shape) == ((32, 5), (16, 5), (16, 5))


def test_joined_parts_are_those_of_the_op():
    q, k, v = (torch.randn(rows, 5) for rows in (12, 6, 6))
    (joined,) = Joined(Qkv(4, 2, 3), (12, 6, 6)).split(Qkv(4, 2, 3).merge([q, k, v]))
    assert torch.equal(joined, torch.cat([q, k, v]))


@pytest.mark.parametrize("op", [Copy(), Joined(Qkv(4, 2, 3), (12, 6, 6))])
def test_transposed_weights_lie_on_their_side_and_biases_do_not(op):
    weight, bias = torch.randn(5, 24), torch.randn(24)
    fused = Transposed(op).merge([weight])
    assert torch.equal(fused, op.merge([weight.t()]))
    (back,) = Transposed(op).split(fused)
    assert torch.equal(back, weight)
    assert back.is_contiguous()
    assert torch.equal(Transposed(op).merge([bias]), op.merge([bias]))
    assert torch.equal(Transposed(op).split(op.merge([bias]))[0], bias)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1), (1, 4, 3)])
def test_a_dim_of_one_goes_and_comes_back(shape):
    part = torch.randn(shape)
    fused = Flat().merge([part])
    assert fused.shape == shape[1:]
    (again,) = Flat().split(fused)
    assert torch.equal(again, part)
