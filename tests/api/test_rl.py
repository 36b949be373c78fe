"""One reinforcement-learning step in every layout: load, train, stream the weights to a rollout model, train on.

The rollout model and the reference are transformers'; the step is plain SGD, so that the reference can take it too.
"""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

import bridge
from bridge import parallel
from bridge.objectives.next_token import NextToken
from bridge.objectives.objective import Loss
from tests import hf_models
from tests.api.layouts import LAYOUTS
from tests.distributed import run_distributed

LR, BATCH = 0.5, 4
CASES = [("llama", "alone"), ("llama", "tp2_sp"), ("qwen3", "pp2"), ("qwen3_tied", "pp2_vpp2"), ("qwen3", "dp2")]
CASES += [("qwen3_moe", "ep2"), ("qwen3_moe", "tp2_ep2")]


def rollouts():
    """Prompts with answers, and the advantage of every token."""
    tokens = hf_models.prompts(batch=BATCH)
    advantages = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    advantages[:, :6] = 0  # the prompt
    advantages[:, -1] = 0  # nothing follows it
    return tokens, advantages


@dataclass(frozen=True)
class Policy(NextToken):
    """Raises the log-probability of tokens with an advantage."""

    numbers = ("logprob",)

    def keys(self, chunk):
        return super().keys(chunk) + (("advantages",) if chunk.post_process else ())

    def loss(self, output, batch):
        count = torch.tensor(output.numel())
        return Loss((output * batch["advantages"]).sum(), count, {"logprob": (-output.sum(), count)})


def train_step(model, optimizer):
    tokens, advantages = rollouts()
    mine = slice(parallel.rank("dp"), None, parallel.size("dp"))
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones(tokens.shape),
        "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
        "advantages": advantages,
    }
    micros = [{name: batch[name][row : row + 1] for name in batch} for row in range(BATCH)[mine]]
    numbers = bridge.forward_backward(model, micros, Policy())
    assert optimizer.step()[0]
    return numbers


def rl_step(path, parallelism, folder):
    """What a framework does, on this rank; what it saw."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    auto = bridge.AutoBridge.from_hf_pretrained(path)
    provider = auto.to_megatron_provider(load_weights=True)
    for name, value in parallelism.items():
        setattr(provider, name, value)
    provider.calculate_per_token_loss = True
    if provider.num_moe_experts:
        provider.moe_router_load_balancing_type = "none"
    provider.finalize()
    provider.initialize_model_parallel(seed=1)
    model = provider.provide_distributed_model(ddp_config={"grad_reduce_in_fp32": True})
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=LR, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0), model
    )
    for chunk in model:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    tokens, _ = rollouts()
    size = 1 if len(model) == 1 else 2

    numbers = train_step(model, optimizer)
    streamed = {}
    for name, weight in auto.export_hf_weights(model, cpu=True, show_progress=False):
        assert not weight.requires_grad
        streamed[name] = weight
    with torch.no_grad():
        logprobs = bridge.logprobs(model, {"tokens": tokens}, micro_batch_size=size)
    auto.save_hf_pretrained(model, folder / "saved", show_progress=False)
    kept = {name: weight.clone() for name, weight in streamed.items()}
    train_step(model, optimizer)
    for name, weight in streamed.items():
        assert torch.equal(weight, kept[name]), f"{name}: the stream shares memory with the model"
    with torch.no_grad():
        later = bridge.logprobs(model, {"tokens": tokens}, micro_batch_size=size)
    return streamed, logprobs, later, numbers


def of_transformers(model, tokens):
    every = torch.log_softmax(model(tokens).logits.float(), dim=-1)
    return every.gather(-1, tokens.roll(-1, dims=1)[..., None])[..., 0]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_rl_step(tiny_hf, tmp_path, variant, layout):
    from transformers import AutoModelForCausalLM

    path = tiny_hf(variant)
    world_size = 1 if layout == "alone" else 2
    results = run_distributed(rl_step, world_size, path, LAYOUTS[layout], tmp_path, fresh=True)
    streamed, logprobs, later, numbers = results[0]
    for others in results[1:]:
        assert all(torch.equal(others[0][name], weight) for name, weight in streamed.items())
        assert torch.equal(others[1], logprobs) or layout == "dp2"
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == streamed.keys() == load_file(path / "model.safetensors").keys()
    assert all(torch.equal(saved[name], weight) for name, weight in streamed.items())

    # The rollout model answers as the live one did before it trained on.
    tokens, advantages = rollouts()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rollout = type(reference).from_pretrained(None, config=reference.config, state_dict=streamed).eval()
    with torch.no_grad():
        theirs = of_transformers(rollout, tokens)
    torch.testing.assert_close(logprobs[:, :-1], theirs[:, :-1], atol=1e-4, rtol=0)
    assert (later - logprobs).abs().max() > 1e-2

    # And the step was the right one.
    with torch.no_grad():
        assert numbers["logprob"] == pytest.approx(of_transformers(reference, tokens).mean().item(), rel=1e-5)
        assert (of_transformers(reference, tokens) - theirs).abs().max() > 1e-2
    loss = -(of_transformers(reference, tokens) * advantages).sum() / tokens.numel()
    loss.backward()
    rolled = dict(rollout.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            step = LR * parameter.grad
            error = (rolled[name] - (parameter - step)).norm() / step.norm()
            assert error < 1e-4, f"{name}: the step is off by {error:.1e} of its length"
