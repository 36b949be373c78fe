"""The same weights give the same loss and gradients however the model is divided."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge import parallel
from bridge.config.routing import route
from bridge.models import family, gpt
from bridge.models.hf import config as hf_config
from bridge.weights import into_model, shards
from bridge.weights.hf_files import open_hf
from tests import hf_models
from tests.distributed import run_distributed

LENGTH = 24
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,  # with two stages batched sends are silently wrong in megatron-core 0.16.1
        "batch_p2p_comm": False,
    },
    "cp2": {"context_parallel_size": 2},
}
# Between them: biases everywhere, tied weights, a window in half of the layers, qk-norm, an attention factor, factors
# on embedding, branches and logits, layers without rope, an output projection alone without bias, unequal layers,
# norms behind branches, caps on scores and logits, two rotary embeddings, neighbouring pairs, norms over all heads,
# an attention factor on some channels, query, key and value in one tensor, LayerNorm, learned positions.
VARIANTS = (
    "llama_all_bias",
    "llama_yarn_options",
    "llama_tied",
    "qwen2_window",
    "qwen3",
    "granite_all_bias",
    "granite_tied",
    "smollm3_window",
    "smollm3_yarn",
    "seed_oss_tied",
    "llama_nemotron_all_bias",
    "llama_nemotron_empty",
    "gemma2",
    "gemma3_untied",
    "glm4",
    "olmo2",
    "nemotron_yarn",
    "phi3_partial",
    "starcoder2",
    "gpt2_no_dropout",
)


def loss_and_gradients(parallelism: dict[str, Any], directories: dict[str, str]) -> dict[str, Any]:
    """For each variant the loss summed over tokens and ranks, and every whole gradient under its checkpoint key."""
    first = next(iter(directories.values()))
    wanted = route({"model": hf_config.to_mcore(hf_config.read(first)), "parallelism": parallelism})
    parallel.initialize(wanted.transformer, seed=1)
    results = {}
    for variant, directory in directories.items():
        section = hf_config.to_mcore(hf_config.read(directory))
        routed = route({"model": section, "parallelism": {"pipeline_dtype": "fp32", **parallelism}})
        results[variant] = _step(routed, section, directory)
    parallel.teardown()
    return results


def _step(routed: Any, section: dict[str, Any], directory: str) -> tuple[float, dict[str, torch.Tensor]]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = gpt.build(routed)
    table = family.by_name(routed.family).table(section)
    into_model.load_hf(chunks, open_hf(directory), table=table, vocab_size=section["vocab_size"])
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.calculate_per_token_loss = True
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, bucket_size=10**9)
    models = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(range(2)) for _ in models],
        model=models,
        num_microbatches=2,
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    for model in models:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.main_grad)  # so that the weight machinery puts gradients together
    gradients = {key: whole.clone() for key, whole in shards.gather(chunks)}
    rows = section["vocab_size"]
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if key in gradients:
            assert not gradients[key][rows:].any(), "padding rows have a gradient"
            gradients[key] = gradients[key][:rows]
    total = torch.tensor([float(sum(loss["sum"].item() for loss in losses))])
    torch.distributed.all_reduce(total)
    return total.item() / parallel.size("tp") / parallel.size("dp"), gradients


def _forward(data: Any, model: Any) -> Any:
    from megatron.core.utils import get_batch_on_this_cp_rank

    ids = hf_models.prompts(length=LENGTH + 1, seed=next(data))
    batch = {"ids": ids[:, :-1], "labels": ids[:, 1:], "positions": torch.arange(LENGTH).expand(2, -1)}
    batch = get_batch_on_this_cp_rank(batch, cp_group=parallel.group("cp"))
    output = model(batch["ids"], batch["positions"], None, labels=batch["labels"])

    def loss(per_token: torch.Tensor) -> Any:
        total = per_token.sum()
        return total, torch.tensor(per_token.numel(), dtype=torch.int), {"sum": total.detach()}

    return output, loss


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hf")
    return {name: str(hf_models.save(name, Path(folder, name), tokenizer=False)) for name in VARIANTS}


@pytest.fixture(scope="module")
def alone(directories: dict[str, str]) -> dict[str, Any]:
    (result,) = run_distributed(loss_and_gradients, 1, {}, directories, fresh=True)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_divided_model_equals_whole_model(layout: str, directories: dict[str, str], alone: dict[str, Any]):
    for result in run_distributed(loss_and_gradients, 2, LAYOUTS[layout], directories, fresh=True):
        assert_same(result, alone)


def assert_same(result: dict[str, Any], alone: dict[str, Any]) -> None:
    for variant, (loss, gradients) in result.items():
        expected_loss, expected = alone[variant]
        assert loss == pytest.approx(expected_loss, rel=1e-6), variant
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[key], atol=1e-5, rtol=1e-4, msg=lambda m, k=(variant, key): f"{k} {m}"
            )
