"""Twenty steps from init.path against a plain PyTorch and transformers loop on the same data, with the same AdamW."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed import run_distributed
from tests.training.runs import ADAM, config, sample_ids, train

STEPS, BATCH, WARMUP = 20, 4, 3
OPTIMIZER = {**ADAM, "clip_grad": 0.5}


class Step(NamedTuple):
    loss: float
    grad_norm: float


def learning_rate(step: int, *, peak: float) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then half a cosine down to a tenth at the last step."""
    low, high = peak / 10, peak
    if step <= WARMUP:
        return low + (high - low) * step / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def plain_loop(directory: Path, data: Any, sample_ids: list[int], *, peak: float) -> list[Step]:
    """The whole of it: no megatron-core, no code of ours but the samples."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, OPTIMIZER["adam_beta2"]),
        eps=1e-8,
    )
    steps = []
    for step in range(STEPS):
        samples = [data[index] for index in sample_ids[step * BATCH : (step + 1) * BATCH]]
        tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        # In 64 bits: clip_grad_norm_ takes torch's norm in 32, which for nine million numbers is off by more than 1e-4.
        norm = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]).norm()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), OPTIMIZER["clip_grad"], norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak)
        optimizer.step()
        steps.append(Step(loss.item(), norm.item()))
    return steps


def compare(directory: Path, tmp_path: Path, *, data: dict[str, Any], peak: float) -> None:
    """Both loops from the weights in `directory`; learning rates rise to `peak`."""
    from bridge.models.hf import config as hf_config

    model = hf_config.to_mcore(hf_config.read(directory))
    run = config(
        tmp_path,
        whole_model=model,
        optimizer={**OPTIMIZER, "lr": peak, "min_lr": peak / 10},
        scheduler={"lr_warmup_steps": WARMUP, "lr_warmup_init": peak / 10},
        data=data,
        init={"path": str(directory)},
        log={"sample_ids": True},
        train={"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "eval_interval": None},
    )
    lines = run_distributed(train, 1, run, fresh=True)[0].lines
    (ids,) = sample_ids(run.run_dir)
    expected = plain_loop(directory, training_samples(run), ids, peak=peak)

    ours = [Step(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    assert [step.loss for step in ours] == pytest.approx([step.loss for step in expected], rel=1e-4)
    assert [step.grad_norm for step in ours] == pytest.approx([step.grad_norm for step in expected], rel=1e-4)
    rates = [line["lr"] for line in lines if "loss" in line]
    assert rates == pytest.approx([learning_rate(step, peak=peak) for step in range(STEPS)])
    assert expected[-1].loss != pytest.approx(expected[0].loss, rel=1e-2)  # something was learnt


def training_samples(run: Any) -> Any:
    """The training dataset of `run`, built in this process."""
    from bridge.training import setup

    return setup.prepare_data(run).build(seed=run.train.seed).train


@pytest.mark.parametrize("variant", ["llama", "qwen2_tied"])
def test_tiny_model(tmp_path: Path, tiny_hf: Callable[..., Path], variant: str) -> None:
    data = {"vocab_size": 259, "sequence_length": 32}
    compare(tiny_hf(variant), tmp_path, data=data, peak=1e-3)


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories15m", "minimind2"])
def test_real_model(tmp_path: Path, real_model: Callable[[str], Path], name: str) -> None:
    directory = real_model(name)
    data = {"source": "stdlib", "tokenizer": str(directory), "sequence_length": 64, "cache_dir": str(tmp_path)}
    compare(directory, tmp_path, data=data, peak=1e-4)
