"""A live model of any layout takes its weights from either kind of directory, and gives them back."""

import json

import pytest
import torch
from safetensors.torch import load_file

import bridge
from bridge import parallel
from bridge.config.routing import route
from bridge.convert.import_ import import_hf
from bridge.errors import BridgeError, ConfigError, ConversionError
from bridge.models import gpt
from bridge.models.hf import config as hf_config
from bridge.sources.load import load_initial
from tests import hf_models, plain_megatron
from tests.distributed import run_distributed

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
    "dp2": {},
}


def load_and_export(path, layout, target):
    model = bridge.load_model(path, parallelism=LAYOUTS[layout])
    exported = dict(bridge.export_weights(model))
    bridge.save_hf(model, target, max_shard_size="50KB")
    return exported if parallel.rank() == 1 else len(model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["llama", "qwen3_tied"])
def test_two_ranks_load_and_export_bit_equal(tiny_hf, tmp_path, variant, layout):
    """259 tokens on two tensor ranks: one row of padding in the model, none in the export."""
    source = tiny_hf(variant, dtype=torch.bfloat16)
    theirs = load_file(source / "model.safetensors")
    import_hf(source, tmp_path / "megatron")
    for path in (source, tmp_path / "megatron"):
        target = tmp_path / f"export_of_{path.name}"
        num_chunks, exported = run_distributed(load_and_export, 2, path, layout, target)
        assert num_chunks == (2 if layout == "pp2_vpp2" else 1)
        assert exported.keys() == theirs.keys()
        assert all(
            torch.equal(exported[name], tensor) and tensor.dtype == exported[name].dtype
            for name, tensor in theirs.items()
        )
        saved = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert saved.keys() == theirs.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in theirs.items())
        ids = hf_models.prompts()
        assert torch.equal(hf_models.logits(target, ids), hf_models.logits(source, ids))
        assert (target / "tokenizer.json").exists()


def saved_at_tp2(root, target):
    """A torch_dist folder of several ranks' files, written by plain megatron-core, read at another layout."""
    model = bridge.load_model(root, parallelism=LAYOUTS["tp2"])
    state = model[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
    if parallel.is_main():
        target.mkdir(parents=True)
    parallel.barrier()
    plain_megatron.save_checkpoint(state, target)
    return gpt.padded_vocab_size(model[0].routed)


def test_reads_what_two_tensor_ranks_saved(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron")
    target = tmp_path / "run" / "checkpoints" / "iter_0000007"
    assert run_distributed(saved_at_tp2, 2, tmp_path / "megatron", target, fresh=True) == [260, 260]
    target.with_name("latest_checkpointed_iteration.txt").write_text("7")
    target.with_name("model.yaml").write_text((tmp_path / "megatron" / "model.yaml").read_text())
    with parallel.single_process():
        exported = dict(bridge.export_weights(bridge.load_model(tmp_path / "run")))
    theirs = load_file(source / "model.safetensors")
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in theirs.items())


def initialise(path, **changes):
    routed = route({"model": hf_config.to_mcore(hf_config.read(path)) | changes})
    with parallel.single_process(routed.transformer):
        load_initial(gpt.build(routed), path, routed)


def test_keys_that_are_no_architecture_may_differ(tiny_hf):
    initialise(tiny_hf("llama"), hidden_dropout=0.1, max_sequence_length=128, make_vocab_size_divisible_by=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96, "kv_channels": 24}, r"^model.hidden_size is 96 \(there 48\), model.kv_channels is 24"),
        ({"rotary_base": 10000}, r"^model.rotary_base is 10000 \(there 1234"),
        (
            {"layernorm_epsilon": 1e-6},
            r"^model.layernorm_epsilon is 1e-06 \(there 0.005\): not the model in .*hf_llama",
        ),
        ({"qk_layernorm": True}, r"^model.qk_layernorm is true \(there false\)"),
        ({"window_size": [7, 0]}, r"^model.window_size is \[7, 0\] \(there null\)"),
        ({"family": "mistral"}, r"^model.family is mistral \(there llama\)"),
    ],
)
def test_other_architecture_is_named(tiny_hf, changes, message):
    with pytest.raises(ConfigError, match=message):
        initialise(tiny_hf("llama"), **changes)


def test_unusable_paths(tmp_path, tiny_hf):
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "neither a Hugging Face directory")):
        with pytest.raises(ConfigError, match=f"^path: .*{message}"):
            bridge.load_model(path)
    source = tiny_hf("llama")
    (source / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="no safetensors file"):
        bridge.load_model(source)


def test_options_of_load_model(tiny_hf):
    source = tiny_hf("llama", dtype=torch.float16)
    with parallel.single_process():
        assert bridge.load_model(source)[0].decoder.final_layernorm.weight.dtype == torch.float16
        (model,) = bridge.load_model(source, dtype="fp32")
        assert model.decoder.final_layernorm.weight.dtype == torch.float32
        with pytest.raises(BridgeError, match="^dtype: 'fp33' is not one of fp32, .*did you mean 'fp32'"):
            bridge.load_model(source, dtype="fp33")
        with pytest.raises(
            ConfigError, match="^parallelism.tensor_model_parallel_size: 2, but this process group has 1"
        ):
            bridge.load_model(source, parallelism={"tensor_model_parallel_size": 2})
    with pytest.raises(ConfigError, match="^parallelism: 1 process, but the layout needs a multiple of 2"):
        bridge.load_model(source, parallelism={"tensor_model_parallel_size": 2})


def test_save_hf_refuses_and_describes(tiny_hf, tmp_path):
    source = tiny_hf("llama_tied", dtype=torch.bfloat16)
    with parallel.single_process():
        model = bridge.load_model(source, dtype="fp32")
        bridge.save_hf(model, tmp_path / "out")
        with pytest.raises(ConversionError, match="^path: .* exists"):
            bridge.save_hf(model, tmp_path / "out")
        bridge.save_hf(model, tmp_path / "out", overwrite=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"]
