"""Log-probabilities from a divided vocabulary equal those of torch on all logits, and transformers', with gradients."""

import pytest
import torch

import bridge
from bridge import parallel
from bridge.errors import ConfigError
from tests import hf_models
from tests.api.layouts import LAYOUTS
from tests.distributed import run_distributed

TOKENS, VOCAB, PADDED = 37, 259, 320  # on two ranks the second one has 99 true columns; on four the last has none


def drawn(dtype, size):
    """The same logits and labels on every rank; this rank's columns of them."""
    generator = torch.Generator().manual_seed(5)
    whole = (8 * torch.randn(3, TOKENS, size, generator=generator)).to(dtype)
    labels = torch.randint(VOCAB, (3, TOKENS), generator=generator)
    labels[0, :3] = torch.tensor([0, VOCAB - 1, -100])
    return whole, labels, torch.randn(3, TOKENS, generator=generator)


def on_ranks(dtype, temperature, tp):
    parallel.initialize({"tensor_model_parallel_size": tp})
    return ours(dtype, temperature, tp)


def ours(dtype, temperature, tp=1):
    whole, labels, weights = drawn(dtype, PADDED)
    width = PADDED // tp
    part = whole[..., parallel.rank("tp") * width :][..., :width].clone().requires_grad_()
    found = bridge.logprobs_from_logits(part, labels, vocab_size=VOCAB, temperature=temperature)
    (found * weights).sum().backward()
    return found.detach(), part.grad


def expected(dtype, temperature):
    whole, labels, weights = drawn(dtype, PADDED)
    leaf = whole.clone().requires_grad_()
    every = torch.log_softmax(leaf[..., :VOCAB].float() / temperature, dim=-1)
    result = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, 0.0)
    (result * weights).sum().backward()
    return result.detach(), leaf.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_to_torch_on_whole_logits(dtype, temperature, tp, monkeypatch):
    monkeypatch.setattr("bridge.api.token_logprobs.CHUNK", 5 * PADDED)  # several chunks; workers fork with the default
    if tp == 1:
        with parallel.single_process():
            results = [ours(dtype, temperature)]
    else:
        results = run_distributed(on_ranks, tp, dtype, temperature, tp)
    values, gradient = expected(dtype, temperature)
    for found, _ in results:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, values, atol=2e-5, rtol=0)
    whole = torch.cat([grad for _, grad in results], dim=-1)
    assert whole.dtype == dtype
    assert not whole[..., VOCAB:].any()
    assert not whole[0, 2].any()  # the label that stands for none
    if dtype == torch.bfloat16:  # autograd rounds twice, we once: at most one unit in the last place
        torch.testing.assert_close(whole, gradient, atol=1e-6, rtol=2**-7)
    else:
        torch.testing.assert_close(whole, gradient, atol=1e-6, rtol=1e-5)


def test_gradient_is_the_derivative():
    with parallel.single_process():
        whole, labels, _ = drawn(torch.float64, VOCAB)
        leaf = whole[:1, :4].clone().requires_grad_()

        def compute(logits):  # without position 1, whose label is beyond this vocabulary
            return bridge.logprobs_from_logits(logits, labels[:1, :4], vocab_size=VOCAB - 3, temperature=0.7)[:, [0, 3]]

        assert torch.autograd.gradcheck(compute, (leaf,), eps=1e-6, atol=1e-5)
        assert bridge.logprobs_from_logits(leaf, labels[:1, :4], vocab_size=VOCAB - 3)[0, 1].isnan()


def test_far_apart_logits_stay_finite():
    with parallel.single_process():
        logits = torch.tensor([[3e4, -3e4, 0.0]])
        for label, value in ((0, 0.0), (1, -6e4), (2, -3e4)):
            assert bridge.logprobs_from_logits(logits, torch.tensor([label]), vocab_size=3).item() == value


def test_memory_is_one_gradient(monkeypatch):
    """What autograd keeps is the logits themselves: no tensor of their size is made in the forward pass."""
    monkeypatch.setattr("bridge.api.token_logprobs.CHUNK", VOCAB)
    with parallel.single_process():
        whole, labels, _ = drawn(torch.bfloat16, VOCAB)
        leaf = whole.clone().requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            bridge.logprobs_from_logits(leaf, labels, vocab_size=VOCAB)
        large = [tensor for tensor in kept if tensor.numel() >= leaf.numel()]
        assert [tensor.data_ptr() for tensor in large] == [leaf.data_ptr()]


def of_layout(path, parallelism, micro_batch_size, grad):
    model = bridge.load_model(path, parallelism=parallelism)
    batch = {"tokens": hf_models.prompts(batch=4)}
    with torch.set_grad_enabled(grad):
        found = bridge.logprobs(model, batch, temperature=0.8, micro_batch_size=micro_batch_size)
    assert found.requires_grad == grad
    return found.detach()


def by_transformers(path, ids):
    every = torch.log_softmax(hf_models.logits(path, ids) / 0.8, dim=-1)
    next_tokens = every[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(next_tokens, (0, 1))


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_one_process_equals_transformers(tiny_hf, micro_batch_size):
    path = tiny_hf("qwen3")
    ids = hf_models.prompts(batch=4)
    with parallel.single_process():
        found = of_layout(path, {}, micro_batch_size, True)
        (model,) = bridge.load_model(path)
        mask = torch.ones(4, 24)
        mask[1, 5:] = 0
        masked = bridge.logprobs(model, {"tokens": ids, "loss_mask": mask, "labels": ids.roll(-1, dims=1)}).detach()
    theirs = by_transformers(path, ids)
    assert found.shape == (4, 24) and found.dtype == torch.float32
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=0)
    assert not masked[1, 5:].any() and masked[1, :5].all() and masked[:, -1].ne(0).sum() == 3


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "pp2", "pp2_vpp2", "cp2"])
def test_every_layout_equals_transformers(tiny_hf, layout):
    path = tiny_hf("qwen3")
    theirs = by_transformers(path, hf_models.prompts(batch=4))
    size = {"pp2": 1, "pp2_vpp2": 2}.get(layout)
    for found in run_distributed(of_layout, 2, path, LAYOUTS[layout], size, layout.startswith("tp"), fresh=True):
        torch.testing.assert_close(found, theirs, atol=1e-4, rtol=0)


def refusals(path, parallelism, micro_batch_size, grad, length):
    model = bridge.load_model(path, parallelism=parallelism)
    with torch.set_grad_enabled(grad), pytest.raises(ConfigError) as refused:
        bridge.logprobs(model, {"tokens": hf_models.prompts(batch=3, length=length)}, micro_batch_size=micro_batch_size)
    return str(refused.value)


@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "grad", "length", "message"),
    [
        ("pp2", None, True, 24, "logprobs: gradients do not cross pipeline stages"),
        ("cp2", None, True, 24, "logprobs: gradients do not cross pipeline stages"),
        ("cp2", None, False, 22, "batch: sequence 22 % 4 must be 0"),
        ("tp2_sp", None, True, 23, "batch: sequence 23 % 2 must be 0"),
        ("pp2", 2, False, 24, "micro_batch_size: 3 % 2 must be 0"),
        ("pp2_vpp2", 1, False, 24, "micro_batch_size: 3 / 1 passes must be a multiple of the 2 pipeline stages"),
    ],
)
def test_what_cannot_be_computed_is_refused(tiny_hf, layout, micro_batch_size, grad, length, message):
    path = tiny_hf("qwen3")
    for found in run_distributed(refusals, 2, path, LAYOUTS[layout], micro_batch_size, grad, length, fresh=True):
        assert found.startswith(message)


def test_wrong_arguments(tiny_hf):
    ids = hf_models.prompts()
    with parallel.single_process():
        model = bridge.load_model(tiny_hf("llama"))
        for batch, message in (
            ({"input_ids": ids}, "^batch: has input_ids; give tokens"),
            ({"tokens": ids, "attention_mask": ids}, "^batch: has tokens, attention_mask; give tokens"),
            ({"tokens": ids, "labels": ids[:, 1:]}, r"^batch: labels has shape \[2, 23\]"),
        ):
            with pytest.raises(ConfigError, match=message):
                bridge.logprobs(model, batch)
        with pytest.raises(ConfigError, match="^temperature: 0 is not positive"):
            bridge.logprobs(model, {"tokens": ids}, temperature=0)
        with pytest.raises(ConfigError, match="^logits: 5 columns on 1 tensor-parallel ranks do not hold vocab_size=6"):
            bridge.logprobs_from_logits(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), vocab_size=6)
        with pytest.raises(ConfigError, match=r"^labels: shape \[2\] does not fit logits \[1, 5\]"):
            bridge.logprobs_from_logits(torch.zeros(1, 5), torch.zeros(2, dtype=torch.int64), vocab_size=5)
