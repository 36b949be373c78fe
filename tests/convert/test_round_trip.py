"""Hugging Face -> Megatron -> Hugging Face gives every tensor back bit by bit, under its name, in its dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge import parallel
from bridge.config.routing import route
from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.models import family, gpt
from bridge.weights import locate
from bridge.weights.dist_files import open_dist
from tests import families, hf_models
from tests.distributed import run_distributed


def tensors(directory):
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def round_trip(source, tmp_path, **options):
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back", **options)
    return tmp_path / "back"


@pytest.mark.parametrize("variant", hf_models.variants())
def test_bit_equal_from_and_into_several_files(variant, tiny_hf, tmp_path):
    source = tiny_hf(variant, dtype=torch.bfloat16, max_shard_size="40KB", tokenizer=False)
    assert len(list(source.glob("*.safetensors"))) > 3
    back = round_trip(source, tmp_path, max_shard_size="30KB")
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_same(tensors(back), tensors(source))


FUSED = [name for name in families.names() if "fused_experts" in family.by_name(name).spellings]


@pytest.mark.parametrize("name", FUSED)
def test_names_that_transformers_writes_without_its_conversions(name, tmp_path):
    """Such as all experts of a layer in one tensor: they come back as they were, and are the same model."""
    variant = next(iter(families.facts(name).VARIANTS))
    usual = hf_models.save(variant, tmp_path / "usual", tokenizer=False)
    hf_models.save(variant, tmp_path / "hf", tokenizer=False, save_original_format=False)
    assert tensors(tmp_path / "hf").keys() != tensors(usual).keys()
    back = round_trip(tmp_path / "hf", tmp_path)
    assert_same(tensors(back), tensors(tmp_path / "hf"))
    import_hf(usual, tmp_path / "same")
    first, second = (open_dist(locate.locate(tmp_path / place).directory) for place in ("megatron", "same"))
    assert_same({key: first.read(key) for key in first.tensors}, {key: second.read(key) for key in second.tensors})


def test_transformers_loads_the_export(tiny_hf, tmp_path):
    """Same logits and same tokens from the exported folder as from the source."""
    from transformers import AutoTokenizer

    source = tiny_hf("qwen3", max_shard_size="60KB")
    back = round_trip(source, tmp_path, max_shard_size="50KB")
    ids = hf_models.prompts()
    assert torch.equal(hf_models.logits(back, ids), hf_models.logits(source, ids))
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (source, back))
    assert ours("Grüße, 世界")["input_ids"] == theirs("Grüße, 世界")["input_ids"]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())


def test_every_tensor_keeps_a_dtype_of_its_own(tiny_hf, tmp_path):
    """Also where tensors of different dtypes are fused into one: q is fp32, k bf16, v fp16."""
    source = tiny_hf("llama")
    mixed = tensors(source)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {name: mixed[name].to(dtypes[index % 3]) for index, name in enumerate(mixed)}
    assert len({mixed[f"model.layers.0.self_attn.{name}_proj.weight"].dtype for name in "qkv"}) > 1
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    assert_same(tensors(round_trip(source, tmp_path)), mixed)


def test_special_values_survive(tiny_hf, tmp_path):
    source = tiny_hf("llama", dtype=torch.bfloat16)
    changed = tensors(source)
    changed["model.norm.weight"][:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    changed["lm_head.weight"].view(torch.int16)[0, :3] = torch.tensor([0x7FC1, -64, 1], dtype=torch.int16)
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    assert_same(tensors(round_trip(source, tmp_path)), changed)


def test_old_hub_files(tiny_hf, tmp_path):
    """Old keys in config.json, inv_freq buffers, a stored copy of a tied output layer."""
    source = tiny_hf("llama_tied", dtype=torch.float16)
    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": config.pop("dtype")}
    (source / "config.json").write_text(json.dumps(config))
    stored = tensors(source)
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(6) for n in range(4)}
    tied = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(stored | extra | tied, source / "model.safetensors", metadata={"format": "pt"})
    back = round_trip(source, tmp_path)
    assert_same(tensors(back), stored | tied)
    ids = hf_models.prompts()
    assert torch.equal(hf_models.logits(back, ids), hf_models.logits(source, ids))


def test_casts_are_explicit(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    wanted = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    import_hf(source, tmp_path / "half", dtype=torch.bfloat16)
    export_hf(tmp_path / "half", tmp_path / "a")
    import_hf(source, tmp_path / "full")
    export_hf(tmp_path / "full", tmp_path / "b", dtype=torch.bfloat16)
    for name in ("a", "b"):
        assert_same(tensors(tmp_path / name), wanted)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"


def test_padding_of_the_vocabulary_is_zero_and_cut(tiny_hf, tmp_path):
    """A checkpoint of 259 tokens with rows padded to 320 exports 259."""
    from bridge.weights.dist_files import DistWriter

    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron")
    directory = locate.locate(tmp_path / "megatron").directory
    dist = open_dist(directory)
    whole = {key: dist.read(key) for key in dist.tensors}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole[key] = torch.cat([whole[key], torch.full((61, 48), 7.0)])
    with DistWriter(directory) as writer:
        for key, tensor in whole.items():
            writer.write(key, tensor)
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_import_pads_the_vocabulary_when_asked_to(tiny_hf, tmp_path):
    source = tiny_hf("llama_tied")
    import_hf(source, tmp_path / "megatron", make_vocab_size_divisible_by=128)
    export_hf(tmp_path / "megatron", tmp_path / "back")
    embedding = open_dist(locate.locate(tmp_path / "megatron").directory).read("embedding.word_embeddings.weight")
    assert embedding.shape[0] == 384
    assert not embedding[259:].any()
    assert_same(tensors(tmp_path / "back"), tensors(source))


def load_by_mcore(root, parallelism):
    """Plain megatron-core: its model, its sharded state dict, its load. The logits of the last stage."""
    from megatron.core import dist_checkpointing

    found = locate.locate(root)
    routed = route({"model": locate.read_model_section(found.root), "parallelism": parallelism})
    parallel.initialize(routed.transformer)
    (model,) = gpt.build(routed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    names = set(state)
    loaded = dist_checkpointing.load(state, str(found.directory))  # with what common.pt holds, as from any checkpoint
    model.load_state_dict({name: value for name, value in loaded.items() if name in names})
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("parallelism", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_megatron_core_loads_an_import_at_any_layout(tiny_hf, tmp_path, parallelism):
    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron")
    ranks = run_distributed(load_by_mcore, 2 if parallelism else 1, tmp_path / "megatron", parallelism)
    norm = tensors(source)["model.norm.weight"]
    down = tensors(source)["model.layers.3.mlp.down_proj.weight"]
    assert torch.equal(ranks[-1]["decoder.final_layernorm.weight"], norm)
    last = "decoder.layers.1" if "pipeline_model_parallel_size" in parallelism else "decoder.layers.3"
    parts = [rank[f"{last}.mlp.linear_fc2.weight"] for rank in ranks]
    together = torch.cat(parts, dim=1) if "tensor_model_parallel_size" in parallelism else parts[-1]
    assert torch.equal(together, down)
    assert not any(parameter.isnan().any() for rank in ranks for parameter in rank.values())


def test_gpt2_of_the_hub_has_no_prefix(tiny_hf, tmp_path):
    source = tiny_hf("gpt2", tokenizer=False)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    assert short.keys() != tensors(source).keys()
    save_file(short, source / "model.safetensors", metadata={"format": "pt"})
    back = round_trip(source, tmp_path)
    assert_same(tensors(back), short)
    ids = hf_models.prompts()
    assert torch.equal(hf_models.logits(back, ids), hf_models.logits(source, ids))
