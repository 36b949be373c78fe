"""AutoBridge: which models, settings of a model to be, live models of any layout, directories."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bridge
from bridge import parallel
from bridge.convert.verify import verify
from bridge.errors import ConfigError, ConversionError
from tests import hf_models, plain_megatron
from tests.api.layouts import LAYOUTS
from tests.distributed import run_distributed

AutoBridge = bridge.AutoBridge


def tensors(directory):
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_supported_models():
    listed = AutoBridge.list_supported_models()
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"} <= set(listed)
    assert listed == sorted(listed)


@pytest.mark.parametrize("variant", hf_models.variants())
def test_supports_every_variant_as_object_and_as_dict(variant):
    config = hf_models.config(variant)
    reasons = {AutoBridge.why_unsupported(config), AutoBridge.why_unsupported(config.to_dict())}
    assert reasons == {None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: .*LlamaForSequenceClassification"),
        ({"architectures": ["MyLlamaForCausalLM"]}, "architectures: .*MyLlamaForCausalLM"),
        ({"model_type": "lama"}, "model_type: lama is not supported.*did you mean 'llama'"),
        ({"attention_chunk_size": 5}, "attention_chunk_size: 5: transformers reads"),
        ({"hidden_act": "mish"}, "hidden_act: mish"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": 5, "num_key_value_heads": 3}, "num_attention_heads % num_query_groups must be 0"),
    ],
)
def test_supports_is_exact(changes, reason):
    config = hf_models.config("llama").to_dict() | changes
    assert not AutoBridge.supports(config)
    found = AutoBridge.why_unsupported(config)
    assert found is not None and "\n" not in found and re.search(reason, found), found


def test_can_handle(tiny_hf, tmp_path):
    path = tiny_hf("llama")
    assert AutoBridge.can_handle(path) and AutoBridge.can_handle(str(path))
    assert not AutoBridge.can_handle(tmp_path) and not AutoBridge.can_handle(tmp_path / "none")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert not AutoBridge.can_handle(path)


def test_a_repository_in_the_cache(tiny_hf, tmp_path, monkeypatch):
    """Offline, an id means what huggingface_hub has in its cache."""
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.parent.mkdir(parents=True)
    tiny_hf("llama").rename(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert AutoBridge.can_handle("org/tiny") and not AutoBridge.can_handle("org/other")
    with parallel.single_process():
        model = AutoBridge.from_hf_pretrained("org/tiny").to_megatron_model()
        assert same(dict(bridge.export_weights(model)), tensors(snapshot))
    with pytest.raises(ConfigError, match="^path: org/other is not a directory, and cannot be fetched as a repository"):
        AutoBridge.from_hf_pretrained("org/other")
    with pytest.raises(ConfigError, match="^path: /none/at/all does not exist"):
        AutoBridge.from_hf_pretrained("/none/at/all")


def test_from_config_only(tmp_path):
    auto = AutoBridge.from_hf_config(hf_models.config("qwen3"))
    assert auto.hf_config["model_type"] == "qwen3"
    assert auto.transformer_config.num_layers == 4 and auto.transformer_config.params_dtype == torch.float32
    with pytest.raises(ConfigError, match="^load_weights: True, but this bridge knows no weights"):
        auto.to_megatron_provider()
    with parallel.single_process():
        model = auto.to_megatron_model(load_weights=False)
        auto.save_hf_pretrained(model, tmp_path / "hf", show_progress=False)
        with pytest.raises(ConfigError, match="^hf_path: None, but this bridge knows no weights"):
            auto.load_hf_weights(model)
    assert AutoBridge.can_handle(tmp_path / "hf")
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert saved["eos_token_id"] == hf_models.BASE["eos_token_id"]
    assert hf_models.logits(tmp_path / "hf", hf_models.prompts()).isfinite().all()


def test_another_architecture_is_refused(tiny_hf):
    auto = AutoBridge.from_hf_pretrained(tiny_hf("llama"))
    with parallel.single_process():
        model = auto.to_megatron_model()
        with pytest.raises(ConfigError, match="model.family is llama .*not the model in"):
            auto.load_hf_weights(model, tiny_hf("qwen3"))


def test_a_model_of_plain_megatron_core(tiny_hf):
    """Programs that build GPTModel by themselves use the bridge for its weights alone."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    path = tiny_hf("llama")
    auto = AutoBridge.from_hf_pretrained(path)
    with parallel.single_process():
        config = auto.transformer_config
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
            vocab_size=259,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        auto.load_hf_weights(model)
        assert same(dict(auto.export_hf_weights(model, show_progress=False)), tensors(path))
        with pytest.raises(ConfigError, match="^model: was not built by this package; use the methods of"):
            next(bridge.export_weights([model]))


def test_a_checkpoint_of_plain_megatron_core(tiny_hf, tmp_path):
    """No model.yaml: the Hugging Face directory says which model it is, and the tensors must agree."""
    path, saved = tiny_hf("llama"), tmp_path / "saved"
    run_distributed(plain_megatron.save, 2, "llama", path, saved, {"tp": 2, "pp": 1}, None, "", fresh=True)
    auto = AutoBridge.from_auto_config(saved, path)
    auto.export_ckpt(saved, tmp_path / "hf", show_progress=False)
    assert same(tensors(tmp_path / "hf"), tensors(path))
    with parallel.single_process():
        model = auto.load_megatron_model(saved)
        assert same(dict(auto.export_hf_weights(model, show_progress=False)), tensors(path))
    with pytest.raises(ConfigError, match="^reference: num_moe_experts is"):
        AutoBridge.from_auto_config(saved, tiny_hf("qwen3_moe_no_dense"))


def export_in_parts(path, parallelism, folder):
    """Everything on two ranks, wrapped: whole, in chunks of tasks, both kinds of directories, and back."""
    auto = AutoBridge.from_hf_pretrained(path)
    model = auto.to_megatron_model(parallelism=parallelism, wrap_with_ddp=True)
    whole = dict(auto.export_hf_weights(model, show_progress=False))
    tasks = auto.get_conversion_tasks(model)
    assert sum(task.num_bytes for task in tasks) == sum(weight.nbytes for weight in whole.values())
    assert [name for task in tasks for name in task.hf_names] == list(whole)
    parts = {}
    for start in reversed(range(0, len(tasks), 3)):
        for weight in auto.export_hf_weights(model, True, False, conversion_tasks=tasks[start : start + 3]):
            parts[weight.param_name] = weight.weight
    (folder / "beside").mkdir(exist_ok=True)
    (folder / "beside" / "tokenizer.json").write_text("{}")
    auto.save_hf_weights(model, folder / "beside", max_shard_size="50KB", show_progress=False)
    refused = []
    for save in (auto.save_hf_weights, auto.save_hf_pretrained):
        with pytest.raises(ConversionError) as error:
            save(model, folder / "beside", show_progress=False)
        refused.append(str(error.value))
    auto.save_hf_pretrained(model, folder / "hf", show_progress=False)
    auto.save_megatron_model(model, folder / "megatron")
    with pytest.raises(ConversionError, match="^path: .* exists"):
        auto.save_megatron_model(model, folder / "megatron")
    again = auto.load_megatron_model(folder / "megatron", mp_overrides=parallelism)
    loaded = dict(auto.export_hf_weights(again, show_progress=False))
    return whole, parts, loaded, refused


CASES = [("llama", "tp2_sp"), ("qwen3_tied", "pp2"), ("qwen3", "pp2_vpp2"), ("llama", "dp2")]
CASES += [("qwen3_moe", "ep2"), ("qwen3_moe", "tp2_ep2"), ("gpt_oss", "ep2"), ("deepseek_v3", "ep2")]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_two_ranks_export_save_and_load(tiny_hf, tmp_path, variant, layout):
    path = tiny_hf(variant, dtype=torch.bfloat16)
    expected = tensors(path)
    for name in expected:
        if name.endswith("e_score_correction_bias"):  # float32 in megatron-core whatever the weights are
            expected[name] = expected[name].float()
    for whole, parts, loaded, refused in run_distributed(
        export_in_parts, 2, path, LAYOUTS[layout], tmp_path, fresh=True
    ):
        for found in (whole, parts, loaded):
            assert same(found, expected)
        assert all(message.startswith("path: ") and "exists" in message for message in refused)
    assert same(tensors(tmp_path / "beside"), expected)
    assert (tmp_path / "beside" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "beside").glob(".partial*"))
    assert same(tensors(tmp_path / "hf"), expected)
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    report = verify(path, tmp_path / "megatron")
    assert report["passed"], report
    assert (tmp_path / "megatron" / "hf" / "tokenizer.json").exists()


def test_a_stream_holds_one_tensor(tiny_hf):
    with parallel.single_process():
        auto = AutoBridge.from_hf_pretrained(tiny_hf("llama"))
        model = auto.to_megatron_model()
        alive = []
        for _, weight in auto.export_hf_weights(model, show_progress=False):
            alive = [other for other in alive if other() is not None] + [weakref.ref(weight)]
            assert len(alive) <= 4  # query, key and value are parts of one Megatron tensor


def test_checkpoints_without_a_model(tiny_hf, tmp_path, capsys):
    path = tiny_hf("llama")
    auto = AutoBridge.import_ckpt(path, tmp_path / "megatron", show_progress=False)
    auto.export_ckpt(tmp_path / "megatron", tmp_path / "hf", show_progress=False)
    assert same(tensors(tmp_path / "hf"), tensors(path))
    assert capsys.readouterr().err == ""
    found = AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "megatron")
    assert AutoBridge.from_hf_pretrained(found).hf_config == auto.hf_config
    again = AutoBridge.from_auto_config(tmp_path / "megatron", path)
    again.export_ckpt(tmp_path / "megatron", tmp_path / "again", show_progress=False)
    assert same(tensors(tmp_path / "again"), tensors(path))
    other = AutoBridge.from_hf_pretrained(tiny_hf("qwen3"))
    with pytest.raises(ConfigError, match="model.family is qwen3.*not the model in"):
        other.export_ckpt(tmp_path / "megatron", tmp_path / "other")
    half = AutoBridge.import_ckpt(path, tmp_path / "half", torch_dtype=torch.bfloat16, show_progress=False)
    half.export_ckpt(tmp_path / "half", tmp_path / "half_hf", show_progress=False)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(tmp_path / "half_hf").values())
    with parallel.single_process():
        with pytest.raises(ConfigError, match="^import_ckpt: needs a process without process groups"):
            AutoBridge.import_ckpt(path, tmp_path / "more")
        with pytest.raises(ConfigError, match="^export_ckpt: needs a process without process groups"):
            auto.export_ckpt(tmp_path / "megatron", tmp_path / "more")


def test_unsupported_arguments_are_named(tiny_hf, tmp_path):
    path = tiny_hf("llama")
    auto = AutoBridge.from_hf_pretrained(path, trust_remote_code=False, device_map=None)
    for call, name in (
        (lambda: AutoBridge.can_handle(path, trust_remote_code=True), "trust_remote_code"),
        (lambda: AutoBridge.from_hf_pretrained(path, trust_remote_code=True), "trust_remote_code"),
        (lambda: AutoBridge.from_hf_pretrained(path, device_map="auto"), "device_map"),
        (lambda: AutoBridge.from_hf_pretrained(path, load_in_8bit=True), "load_in_8bit"),
        (lambda: AutoBridge.import_ckpt(path, tmp_path / "m", trust_remote_code=True), "trust_remote_code"),
        (lambda: auto.export_ckpt(path, tmp_path / "m", strict=False), "strict"),
        (lambda: auto.to_megatron_model(use_torch_fsdp2=True), "use_torch_fsdp2"),
        (lambda: auto.load_hf_weights([], allowed_mismatched_params=["x"]), "allowed_mismatched_params"),
        (lambda: auto.export_hf_weights([], merge_adapter_weights=False), "merge_adapter_weights"),
        (lambda: auto.export_hf_weights([], weight_dtype=torch.bfloat16), "weight_dtype"),
        (lambda: auto.save_hf_pretrained([], tmp_path / "m", push_to_hub=True), "push_to_hub"),
        (lambda: auto.save_hf_weights([], tmp_path / "m", distributed_save=True), "distributed_save"),
        (lambda: auto.save_megatron_model([], tmp_path / "m", low_memory_save=True), "low_memory_save"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: .* is not supported by "):
            call()
    with pytest.raises(TypeError, match=r"export_hf_weights\(\) got an unexpected keyword argument 'cpus'"):
        auto.export_hf_weights([], cpus=True)
    assert not (tmp_path / "m").exists()


def test_command_line_reads_a_saved_model(tiny_hf, tmp_path):
    auto = AutoBridge.from_hf_pretrained(tiny_hf("llama"))
    with parallel.single_process():
        auto.save_megatron_model(auto.to_megatron_model(), tmp_path / "megatron")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "convert.py"), "mode=export", "megatron=megatron", "hf=exported"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert same(tensors(tmp_path / "exported"), tensors(tmp_path / "hf_llama"))
