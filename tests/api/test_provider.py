"""The model to be: its settings, the wrappers around it, and the process groups it finds or makes."""

import pytest
import torch

import bridge
from bridge import parallel
from bridge.errors import BridgeError, ConfigError
from tests.api.layouts import LAYOUTS
from tests.distributed import run_distributed

AutoBridge = bridge.AutoBridge


def test_provider_attributes(tiny_hf):
    provider = AutoBridge.from_hf_pretrained(tiny_hf("llama", dtype=torch.bfloat16)).to_megatron_provider()
    assert (provider.hidden_size, provider.tensor_model_parallel_size, provider.vocab_size) == (48, 1, 259)
    assert provider.bf16 is True and provider.params_dtype == torch.bfloat16
    assert provider.activation_func is torch.nn.functional.silu
    provider.params_dtype, provider.recompute_granularity = torch.float32, "full"
    provider.recompute_method, provider.recompute_num_layers = "uniform", 1
    assert provider.params_dtype == torch.float32 and provider.bf16 is False
    provider.finalize()
    assert provider.recompute_method == "uniform" and provider.pipeline_dtype == torch.float32
    for name, value, message in (
        ("tensor_model_paralel_size", 2, "did you mean 'tensor_model_parallel_size'"),
        ("tensor_model_parallel_size", "two", "tensor_model_parallel_size: two does not fit; set a whole number"),
        ("lr", 0.1, "^lr: not a field of megatron-core's TransformerConfig"),
        ("grad_scale_func", print, "grad_scale_func: cannot be set"),
    ):
        with pytest.raises(ConfigError, match=message):
            setattr(provider, name, value)
    with pytest.raises(AttributeError, match="'Provider' object has no attribute 'seq_lenght'"):
        provider.seq_lenght  # noqa: B018
    assert not hasattr(provider, "__deepcopy__")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_model_parallel_size": 3}, "num_attention_heads % tensor_model_parallel_size must be 0"),
        (LAYOUTS["pp2_vpp2"] | {"overlap_p2p_comm": False}, "computes wrong gradients"),
        ({"expert_model_parallel_size": 2}, "needs a model with model.num_moe_experts"),
        ({"sequence_parallel": True}, "TP > 1 must hold"),
        ({"qk_layernorm": True}, "cannot be expressed in the config of a LlamaForCausalLM"),
        ({"attention_output_gate": True}, "cannot be expressed in the config of a LlamaForCausalLM"),
    ],
)
def test_finalize_refuses(tiny_hf, settings, message):
    provider = AutoBridge.from_hf_pretrained(tiny_hf("llama")).to_megatron_provider()
    for name, value in settings.items():
        setattr(provider, name, value)
    with pytest.raises(BridgeError, match=message):
        provider.finalize()


def test_building(tiny_hf):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    auto = AutoBridge.from_hf_pretrained(tiny_hf("llama"), torch_dtype="bfloat16")
    calls = []
    with parallel.single_process():
        provider = auto.to_megatron_provider()
        provider.register_post_wrap_hook(lambda model: calls.append(type(model[0])))
        (model,) = provider.provide_distributed_model(
            DistributedDataParallelConfig(), pre_wrap_hook=lambda model: calls.append(type(model[0]))
        )
        assert isinstance(model, DistributedDataParallel) and isinstance(model.module, Float16Module)
        assert calls == [type(model.module.module), DistributedDataParallel]
        (bare,) = auto.to_megatron_model(bf16=False, wrap_with_ddp=False)
        assert bare.decoder.final_layernorm.weight.dtype == torch.float32
        chunk = auto.to_megatron_provider(load_weights=False).provide(pre_process=True, post_process=True)
        weight = chunk.decoder.final_layernorm.weight
        assert not torch.equal(weight, model.module.module.decoder.final_layernorm.weight)
        assert auto.load_hf_weights(chunk) is chunk
        assert torch.equal(weight, model.module.module.decoder.final_layernorm.weight)
        with pytest.raises(ConfigError, match="^pre_process: False, but this pipeline stage has True"):
            auto.to_megatron_provider().provide(pre_process=False)
        random = auto.to_megatron_provider(load_weights=False)
        drawn = []
        for seed in (7, 8):  # of the weights, in one call as in the other, whatever is drawn before
            random.initialize_model_parallel(seed=seed)
            alone = random.provide()
            torch.rand(3)
            whole = random.provide_distributed_model(wrap_with_ddp=False)[0].module
            drawn += [chunk.decoder.layers[1].mlp.linear_fc1.weight for chunk in (alone, whole)]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
        assert not torch.equal(drawn[0], drawn[2])
        with pytest.raises(ConfigError, match="^ddp_config: has no effect with wrap_with_ddp=False"):
            auto.to_megatron_model(ddp_config={"overlap_grad_reduce": True})


def groups_of_others(path):
    """torch's process group is another program's: the bridge makes megatron-core's groups in it, and no others."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    auto = AutoBridge.from_hf_pretrained(path)
    with pytest.raises(KeyError):
        auto.to_megatron_model(
            parallelism={"tensor_model_parallel_size": 2}, pre_wrap_hook=lambda _: {}["fails after groups were made"]
        )
    assert dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    provider = auto.to_megatron_provider()
    provider.pipeline_model_parallel_size = 2
    provider.initialize_model_parallel(seed=7)
    drawn = torch.rand(1).item()
    provider.initialize_model_parallel(seed=7)
    assert torch.rand(1).item() == drawn
    messages = []
    for name, value in (("tensor_model_parallel_size", 2), ("virtual_pipeline_model_parallel_size", 2)):
        other = auto.to_megatron_provider()
        other.pipeline_model_parallel_size = 2 if name.startswith("virtual") else 1
        other.overlap_p2p_comm, other.batch_p2p_comm = name.startswith("virtual"), not name.startswith("virtual")
        setattr(other, name, value)
        with pytest.raises(ConfigError) as refused:
            other.provide_distributed_model()
        messages.append(str(refused.value))
    return messages


def test_process_groups_of_another_program(tiny_hf):
    for messages in run_distributed(groups_of_others, 2, tiny_hf("llama")):
        assert messages == [
            "parallelism.tensor_model_parallel_size: 2, but this process group has 1; set that",
            "parallelism.virtual_pipeline_model_parallel_size: 2, but this process group has 1; set that",
        ]


def expert_groups(path):
    parallel.initialize(LAYOUTS["tp2_ep2"])
    messages = []
    for layout in ({}, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}):
        with pytest.raises(ConfigError) as refused:
            bridge.load_model(path, parallelism={"tensor_model_parallel_size": 2, **layout})
        messages.append(str(refused.value))
    return messages


def test_sizes_of_expert_groups_are_checked(tiny_hf):
    for messages in run_distributed(expert_groups, 2, tiny_hf("qwen3_moe")):
        assert messages == [
            "parallelism.expert_model_parallel_size: 1, but this process group has 2; set that",
            "parallelism.expert_tensor_parallel_size: 2, but this process group has 1; set that",
        ]
