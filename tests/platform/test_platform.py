"""The choice of device, the values it allows, and megatron-core's CUDA calls on a machine without CUDA."""

import contextlib
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from bridge import platform
from bridge.errors import BridgeError, ConfigError
from bridge.platform import adapt, defaults, devices

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@without_cuda
def test_counting_devices_imports_no_torch():
    code = "import sys; from bridge import platform; print(platform.num_devices(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


@without_cuda
def test_cpu():
    assert platform.device() == torch.device("cpu")
    assert platform.backend() == "gloo"
    assert not platform.has_transformer_engine()
    assert platform.peak_memory_bytes() > 2**20


def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0.1")
    with pytest.raises(BridgeError, match="megatron-core: 0.0.1 .*; pip install"):
        adapt.check_version()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("transformer_impl", "transformer_engine", "needs Transformer Engine, which this run does not have; set local"),
        ("fp8", "hybrid", "hybrid needs Transformer Engine"),
        ("fp4", "e2m1", "needs Transformer Engine"),
        ("moe_grouped_gemm", True, "needs Transformer Engine"),
        ("cross_entropy_loss_fusion", True, "needs CUDA"),
        ("cuda_graph_impl", "local", "set none"),
        ("tp_comm_overlap", True, "needs Transformer Engine"),
        ("attention_backend", "flash", "set auto"),
        ("gradient_accumulation_fusion", True, "set false"),
        ("moe_token_dispatcher_type", "flex", "needs CUDA and DeepEP.*set alltoall"),
        ("cp_comm_type", "a2a", "set all_gather"),
        ("hierarchical_context_parallel_sizes", [2, 2], "set null"),
    ],
)
@without_cuda
def test_wishes_this_machine_cannot_meet(field: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=f"^precision.{field}: .*{message}"):
        platform.check({"num_layers": 2, field: value}, {field: f"precision.{field}"})


def test_defaults_pass_their_own_check():
    platform.check(platform.default_fields(), {})


def test_defaults_and_limits_with_transformer_engine(monkeypatch: pytest.MonkeyPatch):
    for module in (devices, defaults):
        monkeypatch.setattr(module, "on_cuda", lambda: True)
        monkeypatch.setattr(module, "has_transformer_engine", lambda: True)
    fields = platform.default_fields()
    assert fields["transformer_impl"] == "transformer_engine"
    assert fields["gradient_accumulation_fusion"] is False  # no Apex here
    platform.check({**fields, "fp8": "hybrid", "moe_grouped_gemm": True}, {})
    with pytest.raises(ConfigError, match="gradient_accumulation_fusion: true needs Apex"):
        platform.check({"gradient_accumulation_fusion": True}, {})
    with pytest.raises(ConfigError, match="fp8: hybrid needs Transformer Engine's layers"):
        platform.check({"transformer_impl": "local", "fp8": "hybrid"}, {})  # megatron-core would train in bf16


TENSORWISE = "a Blackwell GPU with fp8_recipe=tensorwise, .*; set false, or fp8_recipe=delayed"
CHANNELS = "128 channels per head or a Blackwell GPU, .*; set false"


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"hidden_size": 1024, "num_attention_heads": 8}, None),
        ({"kv_channels": 128, "fp8_recipe": "tensorwise"}, TENSORWISE),
        ({"hidden_size": 1024, "num_attention_heads": 8, "kv_channels": 64}, CHANNELS),
        ({"hidden_size": 1024, "num_attention_heads": 16}, CHANNELS),
        ({"kv_channels": 128, "multi_latent_attention": True, "qk_head_dim": 128}, CHANNELS),
    ],
)
def test_attention_in_fp8_on_hopper_and_blackwell(
    fields: dict[str, Any], needs: str | None, monkeypatch: pytest.MonkeyPatch
):
    for module in (devices, defaults):
        monkeypatch.setattr(module, "on_cuda", lambda: True)
        monkeypatch.setattr(module, "has_transformer_engine", lambda: True)
    asked = {"fp8": "hybrid", "fp8_dot_product_attention": True, **fields}
    monkeypatch.setattr(defaults, "compute_capability", lambda: (10, 0))
    platform.check(asked, {})
    monkeypatch.setattr(defaults, "compute_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=f"attention: true needs {needs}") if needs else contextlib.nullcontext():
        platform.check(asked, {})


@pytest.mark.parametrize(("asked", "told"), [({"apply_query_key_layer_scaling": True}, "1"), ({}, "0")])
def test_transformer_engine_is_told_what_it_reads_from_the_environment(
    asked: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NVTE_APPLY_QK_LAYER_SCALING", "another model's")
    platform.set_switches(asked)
    assert os.environ["NVTE_APPLY_QK_LAYER_SCALING"] == told


def test_every_named_field_exists():
    from bridge.config import mcore_fields

    fields = {name: field for part in mcore_fields.targets().values() for name, field in part.items()}
    limits = (
        *defaults.NEEDS_CUDA,
        *defaults.NEEDS_TRANSFORMER_ENGINE,
        *defaults.NEEDS_PACKAGES,
        *defaults.NEEDS_BLACKWELL,
    )
    named = {limit.field for limit in limits} | defaults.WITH_TRANSFORMER_ENGINE.keys()
    assert named | defaults.WITHOUT_TRANSFORMER_ENGINE.keys() <= fields.keys()


@without_cuda
def test_cuda_calls_land_on_the_cpu():
    platform.prepare()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1], pin_memory=True).cuda(non_blocking=True).device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(1).type() == "torch.FloatTensor"  # only megatron-core's optimizers are told otherwise
    with torch.device("meta"):
        assert torch.empty(2).is_meta
    start, end = torch.cuda.Event(), torch.cuda.Event()
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0


@without_cuda
def test_random_states_of_tensor_parallel_regions():
    from bridge import parallel

    with parallel.single_process(seed=7):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        outside = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            first = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), outside)
        with get_cuda_rng_tracker().fork():
            assert not torch.equal(torch.rand(3), first)
    with parallel.single_process(seed=7), get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(3), first)


@without_cuda
def test_generators_that_graphs_draw_from_are_kept_as_plain_states():
    """Transformer Engine's tracker holds generators: a checkpoint with one could not be read without pickle."""
    from bridge import parallel
    from bridge.platform.random_state import random_state, set_random_state

    with parallel.single_process(seed=7):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        generator = torch.Generator().manual_seed(11)
        get_cuda_rng_tracker().states_["model-parallel-rng"] = generator
        state = random_state()
        assert {type(value) for value in state["tracker"].values()} == {torch.Tensor}
        first = torch.rand(3, generator=generator)
        set_random_state(state)
        assert get_cuda_rng_tracker().get_states()["model-parallel-rng"] is generator
        assert torch.equal(torch.rand(3, generator=generator), first)


@pytest.mark.parametrize(
    ("message", "category", "module", "shown"),
    [
        ("`torch.distributed.all_gather_into_tensor` is deprecated.", FutureWarning, "torch.distributed.x", False),
        ("`torch.distributed.all_gather_into_tensor` is deprecated.", FutureWarning, "my_corpus", True),
        ("the disk is slow", UserWarning, "torch.utils.data", True),
        ("Apex is not installed", UserWarning, "megatron.core.optimizer", False),
    ],
)
def test_only_what_a_user_cannot_act_on_is_left_out(message: str, category: type[Warning], module: str, shown: bool):
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        adapt.ignore_warnings()
        warnings.warn_explicit(message, category, "file.py", 1, module=module)
    assert bool(seen) == shown
