"""Settings survive: every field of megatron-core's classes arrives in the live object that owns it, or is refused.

A field is set to another value than its default in a run where it can act; the run is built and takes a step. There is
no third outcome: a value that is accepted and lost, or a stack trace.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphScope
from megatron.core.utils import get_model_config, unwrap_model

from bridge import parallel
from bridge.config import effect, layout, mcore_fields, routing
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.models import ddp
from bridge.training import batches, settings, setup
from tests.distributed import run_distributed
from tests.training import every_field, refused_fields, runs
from tests.training.refused_fields import NOT_FROM_YAML, REFUSED, UNREAD

TIMEOUT = 400.0  # seconds for all fields of a world, on a machine that others use as well
BASE = {"model": runs.MODEL, "optimizer": runs.ADAM, "precision": runs.FP32}
# What megatron-core makes of the values of tests.training.every_field that it does not keep as they are.
FORMS: dict[str, Any] = {
    "activation_func": torch.nn.functional.gelu,
    "autocast_dtype": torch.bfloat16,
    "cuda_graph_scope": [CudaGraphScope.attn],
    "exp_avg_dtype": torch.bfloat16,
    "exp_avg_sq_dtype": torch.bfloat16,
    "main_params_dtype": torch.float16,
    "no_rope_freq": [0, 1],
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
    "window_size": (4, 0),
}
TEXTS = ("attention_backend", "pipeline_model_parallel_layout")  # compared as str() has them
# OptimizerConfig field -> where torch's optimizer has it.
IN_TORCH: dict[str, Any] = {
    "adam_beta1": lambda group: group["betas"][0],
    "adam_beta2": lambda group: group["betas"][1],
    "adam_eps": lambda group: group["eps"],
    "sgd_momentum": lambda group: group["momentum"],
}


def world_size(name: str) -> int:
    """Processes that the field's run needs."""
    asked = every_field.settings_of(name)
    sizes = [asked.get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "pipeline_model", "context")]
    replicas = max(asked.get("expert_model_parallel_size", 1), asked.get("num_distributed_optimizer_instances", 1))
    return max(sizes[0] * sizes[1] * sizes[2], replicas)


def configuration(name: str, folder: Path) -> RunConfig:
    """A run of one step with the field of that name set."""
    sections: dict[str, Any] = {"model": {}, "parallelism": {}, "optimizer": {}, "precision": {}}
    for key, value in every_field.settings_of(name).items():
        section = next((section for section, keys in BASE.items() if key in keys), None)
        sections[section or routing.home(key).split(".")[0]][key] = value
    return runs.config(folder, name=name, train={"steps": 2}, scheduler={"lr_warmup_steps": 0}, **sections)


def outcome(name: str, folder: Path) -> str:
    """`live`, or the message of the ConfigError. Fails where the value is neither refused nor there."""
    for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):  # of the model built before
        os.environ.pop(variable, None)
    job = None
    try:
        config = configuration(name, folder)
        routed = config.routed
        layout.check(routed, world_size=world_size(name), sequence_length=16, train=config.train)
        data = setup.prepare_data(config)
        setup.join(config)
        job = setup.build(config, data)
    except ConfigError as error:
        return str(error)
    else:
        check_arrived(name, job)
        chunks = range(len(job.state.model))
        read = [batches.training(job.datasets.train, train=config.train, consumed=0, num_workers=0) for _ in chunks]
        assert runs.one_step(job, read, micro_batch_size=1, num_microbatches=2).updated is not None
        return "live"
    finally:
        ddp.release(job.state.model if job else [])
        parallel.teardown(keep_world=os.environ.get("WORLD_SIZE", "1") != "1")  # or a group's threads stay


def check_arrived(name: str, job: setup.Job) -> None:
    """The value of field `name` is in every live object that has such a field; looked up without bridge's help."""
    wanted = FORMS.get(name, every_field.value_of(name))
    found = []
    targets = mcore_fields.targets()
    for chunk in job.state.model:
        model = unwrap_model(chunk)
        if name in targets["gpt"]:
            found.append(getattr(model, "true_vocab_size" if name == "vocab_size" else name))
        if hasattr(get_model_config(chunk), name):
            found.append(getattr(get_model_config(chunk), name))
        if name in targets["ddp"]:
            found.append(getattr(chunk.ddp_config, name))
    if name in targets["optimizer"]:
        found += [getattr(part.config, name) for part in job.state.optimizer.chained_optimizers]
    if name in IN_TORCH:
        found += [IN_TORCH[name](group) for group in job.state.optimizer.param_groups]
    assert found, f"{name} is nowhere"
    for live in found:
        assert (str(live).removeprefix("AttnBackend.") if name in TEXTS else live) == wanted, (name, live)


def outcomes(names: list[str], folder: Path) -> dict[str, str]:
    os.chdir(folder)  # config_logger_dir is relative to it
    found = {}
    for name in names:
        print(f"--- {name}", flush=True)
        found[name] = outcome(name, folder)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcomes of all fields: of those that need two processes in one pair of them, of the others in one."""
    names = {size: [name for name in every_field.names() if world_size(name) == size] for size in (1, 2)}
    (alone,) = run_distributed(outcomes, 1, names[1], tmp_path_factory.mktemp("one"), timeout=TIMEOUT, fresh=True)
    first, second = run_distributed(outcomes, 2, names[2], tmp_path_factory.mktemp("two"), timeout=TIMEOUT, fresh=True)
    assert first == second
    return alone | first


@pytest.mark.parametrize("name", every_field.names())
def test_a_field_arrives_or_is_refused(name: str, found: dict[str, str]):
    outcome = found[name]
    if name not in REFUSED:
        assert outcome == "live"
        return
    key, _, message = outcome.partition(": ")
    assert key.partition(".")[2] in every_field.settings_of(name), outcome
    assert message and "\n" not in message
    assert any(way in message for way in ("set ", "leave ")), f"no way out: {outcome}"


def test_lists_of_fields_are_of_fields():
    known = set(every_field.names())
    together = [name for names in every_field.TOGETHER for name in names.split()]
    assert {*REFUSED, *together, *every_field.VALUES} <= known
    assert len(together) == len(set(together))


# Read by the config itself, or by this program where it makes process groups, random generators and buffers.
READ_WHERE_THEY_ARE_DECLARED = {
    "disable_bf16_reduced_precision_matmul",
    "embedding_init_method_std",
    "expert_tensor_parallel_size",
    "hierarchical_context_parallel_sizes",
    "init_method_std",
    "pipeline_model_parallel_comm_backend",
    "tp_comm_bootstrap_backend",
    "use_te_rng_tracker",
}
NOT_TRAINING = ("inference", "export", "post_training", "quantization", "ssm", "distributed/fsdp")
OTHER_MODELS = tuple(f"models/{name}" for name in ("T5", "bert", "mamba", "multimodal", "retro"))


# Part of the reason why a field is refused -> all files of megatron-core that may read it, or the folders they are in.
ONLY_READ_IN = {
    "reads it nowhere": (),
    "Megatron-FSDP": ("distributed/fsdp/",),
    "only GPT models": ("ssm/",),
    "optimizer is adam or sgd": ("optimizer/muon.py",),
    "megatron-core's own attention": ("transformer/dot_product_attention.py",),
    "Apex's norms": ("fusions/fused_layer_norm.py", "transformer/torch_norm.py"),
}


def test_what_is_accepted_is_read_by_what_trains():
    read = {
        name
        for name, files in refused_fields.readers().items()
        if not all(file.startswith(NOT_TRAINING + OTHER_MODELS) for file in files)
    }
    targets = mcore_fields.targets()
    fields = {name for part in ("transformer", "ddp", "optimizer") for name in targets[part]}
    unread = UNREAD.keys() | effect.OLD_NAMES.keys()
    assert fields - unread - NOT_FROM_YAML - read == READ_WHERE_THEY_ARE_DECLARED


@pytest.mark.parametrize("said", ONLY_READ_IN)
def test_what_is_refused_as_unread_is_read_nowhere_else(said: str):
    found = {name: refused_fields.readers().get(name, []) for name, reason in UNREAD.items() if said in reason}
    assert found
    assert not [name for name, files in found.items() if not all(file.startswith(ONLY_READ_IN[said]) for file in files)]


def test_the_list_of_refused_fields_is_current():
    assert refused_fields.LIST.read_text() == refused_fields.listed(), "run python -m tests.training.refused_fields"


def losses(folder: Path, overlapped: bool) -> list[float]:
    """Of eight steps with experts on two ranks."""
    asked = {**every_field.MIXED, "overlap_moe_expert_parallel_comm": overlapped}
    experts = {name: value for name, value in every_field.EXPERTS.items() if name in asked}
    precision = {name: value for name, value in every_field.BF16.items() if name in asked}
    layout_keys = {name: value for name, value in asked.items() if name not in experts | precision}
    run_config = runs.config(
        folder,
        name=str(overlapped),
        model=experts,
        precision=precision,
        parallelism=layout_keys,
        train={"steps": 8, "global_batch_size": 8},
    )
    return runs.losses(runs.train(run_config).lines)


def test_mixing_two_micro_batches_changes_nothing(tmp_path: Path):
    """megatron-core's plan of one micro-batch's backward and another's forward pass gives the plain schedule's loss."""
    plain = run_distributed(losses, 2, tmp_path, False)[0]
    mixed = run_distributed(losses, 2, tmp_path, True)[0]
    assert mixed == pytest.approx(plain, abs=2e-3)  # bf16: the order of sums differs
    assert plain[-1] != pytest.approx(plain[0], abs=2e-2)


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A built run, with its process groups."""
    config = runs.config(
        tmp_path,
        model={"attention_dropout": 0.25, "add_attention_bias": True},
        parallelism={"overlap_grad_reduce": True, "bucket_size": 1000, "tensor_model_parallel_size": 1},
    )
    setup.join(config)
    job = setup.build(config, setup.prepare_data(config))
    yield job
    ddp.release(job.state.model)
    parallel.teardown()


def _lose_in_a_part(job: Any) -> None:
    unwrap_model(job.state.model[0]).decoder.layers[1].self_attention.config.attention_dropout = 0.0


def _lose_in_ddp(job: Any) -> None:
    job.state.model[0].ddp_config.bucket_size = None


def _lose_in_the_optimizer(job: Any) -> None:
    job.state.optimizer.chained_optimizers[0].config.clip_grad = 0.0


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (_lose_in_a_part, "model.attention_dropout: 0.25 did not reach decoder.layers.1.self_attention, which has"),
        (_lose_in_ddp, "parallelism.bucket_size: 1000 did not reach megatron-core's DistributedDataParallel, which"),
        (_lose_in_the_optimizer, "optimizer.clip_grad: 1.0 did not reach megatron-core's optimizer, which has 0.0"),
    ],
)
def test_a_value_lost_after_the_build_is_found(job: setup.Job, lose: Any, message: str):
    routed = job.config.routed
    settings.check(routed, model=job.state.model, optimizer=job.state.optimizer)
    lose(job)
    with pytest.raises(ConfigError) as caught:
        settings.check(routed, model=job.state.model, optimizer=job.state.optimizer)
    assert str(caught.value).startswith(message)


def test_process_groups_of_another_size_are_found(job: setup.Job):
    routed = job.config.routed
    asked = replace(routed, ddp=routed.ddp | {"num_distributed_optimizer_instances": 2})
    with pytest.raises(ConfigError, match="num_distributed_optimizer_instances: 2 did not reach"):
        settings.check(asked, model=job.state.model, optimizer=job.state.optimizer)
