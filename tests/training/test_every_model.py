"""The contract of training: every variant of every family has the gradients of transformers; some of every family, with
every kind of layer between them, take the same steps at every layout; a gradient's norm counts each parameter once.

Every layout is one world for all models. Measured: losses within 2e-7 of one process's, norms within 3e-6.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests import families, hf_gradients, hf_models, hf_predictions
from tests.distributed import run_distributed
from tests.hf_gradients import Balance, Written
from tests.models.test_families import WITH_EXPERTS
from tests.training.every_model import ROUNDING, Seen, Task, micro_batches, train_all

REL = 1e-5
TOLERANCE = 1e-4  # of a gradient's norm; float32 rounds less
STEPS = 3
TIMEOUT = 900.0  # seconds for a world, on a machine that others use as well

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
# With two stages, sends in batches compute something else in megatron-core 0.16.1.
VPP2 = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
ETP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}

# Between them: biases everywhere and nowhere, tied weights, windows, both kinds of qk-norm, factors on embedding,
# branches, logits and attention, layers without rope, unequal layers, norms behind branches, caps, two rotary
# embeddings, learned positions, tensors of query, key and value together, LayerNorm; latent attention with and without
# a latent of queries, prediction modules, both kinds of routing, dense layers among others, shared experts with and
# without a gate, experts with biases, sinks.
SOME_DENSE = """llama_all_bias llama_yarn_options llama_tied qwen2_window qwen3 granite_all_bias granite_tied
smollm3_window smollm3_yarn seed_oss_tied llama_nemotron_all_bias llama_nemotron_empty gemma2 gemma3_untied glm4 olmo2
nemotron_yarn phi3_partial starcoder2 gpt2_no_dropout""".split()  # noqa: SIM905
SOME_WITH_EXPERTS = """deepseek_v3 deepseek_v3_yarn deepseek_v3_tied deepseek_v2_lite olmoe_tied_bias qwen3_moe
qwen2_moe mixtral_window glm4_moe_tied ernie4_5_moe gpt_oss gpt_oss_tied""".split()  # noqa: SIM905
ALL = hf_models.variants()

ALL_WITH_EXPERTS = [name for name in ALL if hf_models.VARIANTS[name].family in WITH_EXPERTS and "_dense" not in name]
# The plain model of each family, and those.
PLAIN = [next(iter(families.facts(name).VARIANTS)) for name in families.names()]
MANY = [name for name in ALL if name in {*PLAIN, *SOME_DENSE, *SOME_WITH_EXPERTS}]
MANY_WITH_EXPERTS = [name for name in MANY if name in ALL_WITH_EXPERTS]


class Layout(NamedTuple):
    ranks: int
    parallelism: dict[str, Any]
    variants: list[str]
    steps: int


LAYOUTS = {
    "tp2_sp": Layout(2, TP2_SP, MANY, STEPS),
    "pp2": Layout(2, PP2, MANY, STEPS),
    "ep2": Layout(2, EP2, MANY_WITH_EXPERTS, STEPS),
    "tp2_ep2": Layout(2, TP2_SP | EP2, MANY_WITH_EXPERTS, STEPS),
    "tp2": Layout(2, TP2, SOME_DENSE, 1),
    "dp2": Layout(2, {}, SOME_DENSE, 1),
    "dp2_sharded": Layout(2, SHARDED, SOME_DENSE + SOME_WITH_EXPERTS, 1),
    "tp2_sp_sharded": Layout(2, TP2_SP | SHARDED, SOME_DENSE + SOME_WITH_EXPERTS, 1),
    "pp2_vpp2_sharded": Layout(2, PP2 | VPP2 | SHARDED, SOME_DENSE + SOME_WITH_EXPERTS, 1),
    "cp2": Layout(2, CP2, SOME_DENSE + SOME_WITH_EXPERTS, 1),
    "tp2_ep2_sharded": Layout(2, TP2_SP | EP2 | SHARDED, SOME_WITH_EXPERTS, 1),
    "tp2_ep2_etp2": Layout(4, TP2_SP | ETP2, SOME_WITH_EXPERTS, 1),
    "pp2_ep2_sharded": Layout(4, PP2 | EP2 | SHARDED, SOME_WITH_EXPERTS, 1),
}
# Slices of an expert would each add its whole bias.
REFUSED = "expert_tensor_parallel_size: ETP = 1 must hold for experts with biases"
REFUSES = ("tp2_sp", "tp2_sp_sharded", "tp2_ep2_etp2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Every variant and its gradients."""
    folder = tmp_path_factory.mktemp("hf")
    for name in ALL:
        hf_models.save(name, folder / name, tokenizer=False)
    return {name: hf_gradients.write(folder / name, micro_batches(0)) for name in ALL}


def train(
    written: dict[str, Written], layout: Layout, folder: Path, *, balanced: bool = True, tolerance: float = TOLERANCE
) -> dict[str, list[Seen]]:
    """What each rank saw of each variant."""
    tasks = {}
    for name in layout.variants:
        _, num_parameters, plain, with_balance = written[name]
        tasks[name] = Task(plain.parent, with_balance if balanced else plain, num_parameters, balanced)
    ranks = run_distributed(
        train_all, layout.ranks, tasks, layout.parallelism, folder, layout.steps, tolerance, timeout=TIMEOUT
    )
    return {name: [seen[name] for seen in ranks] for name in layout.variants}


@pytest.fixture(scope="module")
def alone(written: dict[str, Written], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """What one process did; in one step, where no layout is compared with it."""
    folder, others = tmp_path_factory.mktemp("alone"), [name for name in ALL if name not in MANY]
    seen = train(written, Layout(1, {}, MANY, STEPS), folder) | train(written, Layout(1, {}, others, 1), folder)
    return {name: one for name, (one,) in seen.items()}


def wrong(seen: Mapping[str, Iterable[Seen]]) -> dict[str, list[str]]:
    found = {name: [line for rank in ranks for line in rank.wrong] for name, ranks in seen.items()}
    return {name: lines[:5] for name, lines in found.items() if lines}


def test_gradients_equal_transformers(written: dict[str, Written], alone: dict[str, Seen], tmp_path: Path):
    """Of every parameter, with balancing losses and without."""
    plain = train(written, Layout(1, {}, ALL_WITH_EXPERTS, 1), tmp_path, balanced=False)
    assert not wrong(plain)
    assert not wrong({name: [seen] for name, seen in alone.items()})
    losses = {name: seen.losses[0] for name, seen in alone.items()}
    assert losses == pytest.approx({name: one.loss for name, one in written.items()}, rel=REL)
    # The balancing losses have a part in the gradient that the comparison can see.
    parts = {name: _part_of_balancing(written[name]) for name in plain}
    assert not {name: part for name, part in parts.items() if part <= 10 * TOLERANCE}


def _part_of_balancing(one: Written) -> float:
    """Of the tensor of which they change the gradient most: the change, as a part of the gradient's norm."""
    plain, balanced = (_tensors(directory) for directory in (one.plain, one.balanced))
    changes = ((balanced[name] - tensor).norm() / (tensor.norm() + ROUNDING) for name, tensor in plain.items())
    return max(change.item() for change in changes)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process(name: str, written: dict[str, Written], alone: dict[str, Seen], tmp_path: Path):
    layout = LAYOUTS[name]
    seen = train(written, layout, tmp_path)
    refused = {variant for variant, ranks in seen.items() if ranks[0].refused}
    assert refused == {v for v in layout.variants if v.startswith("gpt_oss") and name in REFUSES}
    assert all(REFUSED in str(seen[variant][0].refused) for variant in refused)
    trained = {variant: ranks for variant, ranks in seen.items() if variant not in refused}
    assert not wrong(trained)
    off = {}
    for variant, ranks in trained.items():
        expected = alone[variant].losses[: layout.steps] + alone[variant].norms[: layout.steps]
        for one in ranks:
            if one.losses + one.norms != pytest.approx(expected, rel=REL):
                off[variant] = (one.losses, one.norms, expected)
    assert not off


def test_the_balancing_loss_of_one_layer_is_that_of_transformers(tmp_path: Path):
    """But for a factor: even use of all experts gives the number of experts per token there and 1 here. With more
    layers transformers multiplies averages over layers, which no sum of losses of layers does."""
    directory = hf_models.save("qwen3_moe_one_with_experts", tmp_path, tokenizer=False)
    main = hf_predictions.transformers_models(directory).main
    outputs = main(micro_batches(0)[0][:, :-1], output_router_logits=True)
    ours = hf_gradients.balancing_loss(outputs.router_logits[0].flatten(0, -2), main.config, Balance(1.0, 0.0))
    torch.testing.assert_close(outputs.aux_loss, main.config.num_experts_per_tok * ours.float())
