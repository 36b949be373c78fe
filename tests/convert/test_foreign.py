"""Checkpoints by plain megatron-core scripts convert, and what we write loads in such scripts."""

import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import bridge
from bridge import parallel
from bridge.config.routing import route
from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.convert.verify import verify
from bridge.errors import ConfigError, ConversionError
from bridge.launch.convert import main
from bridge.models import gpt
from bridge.models.hf import config as hf_config
from bridge.sources.load import load_initial
from bridge.weights import locate, pointer
from bridge.weights.dist_files import open_dist
from tests import hf_models, plain_megatron
from tests.distributed import run_distributed

ONE = {"tp": 1, "pp": 1}
TP2, PP2 = {"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}
SEPARATE = {"non_homogeneous_layers": True}
SINGLETON = {"singleton_local_shards": True}
STACKED = "decoder.layers.self_attention.linear_qkv.weight"


def save(kind, hf, directory, layout=ONE, *, metadata=None, prefix=""):
    ranks = layout["tp"] * layout["pp"]
    run_distributed(plain_megatron.save, ranks, kind, hf, directory, layout, metadata, prefix, fresh=True)
    return directory


@pytest.mark.parametrize(
    ("kind", "layout", "metadata", "prefix", "key"),
    [
        ("llama", ONE, None, "", STACKED),
        ("qwen3_tied", TP2, None, "", "decoder.layers.self_attention.q_layernorm.weight"),
        ("llama", PP2, None, "model.", f"model.{STACKED}"),
        ("llama", PP2, SEPARATE, "", "decoder.layers.3.self_attention.linear_qkv.weight"),
        ("qwen3_tied", TP2, SINGLETON, "", "decoder.layers.3.mlp.linear_fc1.weight_v"),
        ("qwen3_moe_no_dense", PP2, None, "", "decoder.layers.mlp.experts.experts.linear_fc1.weight"),
        ("qwen3_moe_no_dense", ONE, SINGLETON, "", "decoder.layers.0.mlp.experts.experts.7.linear_fc1.weight_w"),
    ],
)
def test_every_naming_converts_with_a_reference(tiny_hf, tmp_path, kind, layout, metadata, prefix, key):
    source = tiny_hf(kind)
    saved = save(kind, source, tmp_path / "saved", layout, metadata=metadata, prefix=prefix)
    assert key in open_dist(saved).tensors
    export_hf(saved, tmp_path / "hf", reference=source)
    theirs, ours = (load_file(path / "model.safetensors") for path in (source, tmp_path / "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert verify(source, saved, reference=source)["passed"]


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory):
    """The Hugging Face source, and the checkpoint as Megatron-LM's script lays it out: tracker file and iteration."""
    folder = tmp_path_factory.mktemp("llama")
    hf_models.save("llama", folder / "hf_llama")
    save("llama", folder / "hf_llama", folder / "run" / "iter_0001000")
    (folder / "run" / pointer.LATEST).write_text("1000")
    return folder


@pytest.fixture
def llama(saved_llama, tmp_path):
    """Source and checkpoint, which the test may change."""
    shutil.copytree(saved_llama, tmp_path, dirs_exist_ok=True)
    return tmp_path / "hf_llama", tmp_path / "run"


def keep_arguments(root, **changes):
    file = root / "iter_0001000" / "common.pt"
    arguments = plain_megatron.training_arguments()
    vars(arguments).update(changes)
    torch.save(torch.load(file, weights_only=False) | {"args": arguments}, file)


def test_a_model_section_instead_of_a_reference(llama, tmp_path):
    source, root = llama
    section = hf_config.to_mcore(hf_config.read(source))
    assert verify(source, root, model=section)["passed"]
    export_hf(root, tmp_path / "hf", model=section)
    assert hf_config.to_mcore(hf_config.read(tmp_path / "hf")) == section


def test_a_live_run_takes_its_own_section(llama, capsys):
    source, root = llama
    section = hf_config.to_mcore(hf_config.read(source))
    theirs = load_file(source / "model.safetensors")
    routed = route({"model": section})
    with parallel.single_process(routed.transformer):
        load_initial(model := gpt.build(routed), root, routed)
        exported = dict(bridge.export_weights(model))
    assert all(torch.equal(exported[name], tensor) for name, tensor in theirs.items())
    assert "init.path:" in (said := capsys.readouterr().out) and "no model.yaml" in said
    wrong = route({"model": section | {"num_layers": 3}})
    with parallel.single_process(routed.transformer), pytest.raises(ConfigError, match="^model: num_layers is 3, but"):
        load_initial(gpt.build(wrong), root, wrong)
    with pytest.raises(ConfigError, match=r"^path: .* has no model.yaml, .*; write its `model` section to"):
        bridge.load_model(root)


UNTOLD = (
    "family, num_attention_heads, num_query_groups, kv_channels, layernorm_epsilon, activation_func, "
    "position_embedding_type, max_sequence_length, vocab_size, rotary_base"
)


def test_the_error_lists_what_is_missing(llama, tmp_path):
    with pytest.raises(ConfigError) as caught:
        export_hf(llama[1], tmp_path / "out" / "hf")
    message = str(caught.value)
    assert message.startswith(
        f"megatron: {llama[1]}/iter_0001000 has no model.yaml, and nothing in it tells its {UNTOLD} ("
    )
    for known in (
        "num_layers=4, hidden_size=48, share_embeddings_and_output_weights=false, normalization=RMSNorm",
        "ffn_hidden_size=88, gated_linear_unit=true",
        "vocab_size <= 384",
        "num_attention_heads x kv_channels = 48, num_query_groups x kv_channels = 24",
        "set model=NAME of conf/model, model=FILE.yaml",
    ):
        assert known in message
    assert "\n" not in message
    assert not list((tmp_path / "out").iterdir())


def test_arguments_of_megatron_lm_leave_less_to_say(llama, tmp_path):
    source, root = llama
    keep_arguments(root)
    with pytest.raises(ConfigError, match=r"nothing in it tells its family, vocab_size \(known: .*rotary_base=1234"):
        export_hf(root, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"^model: lacks vocab_size \("):
        export_hf(root, tmp_path / "hf", model={"family": "llama"})
    assert verify(source, root, model={"family": "llama", "vocab_size": 259})["passed"]
    with pytest.raises(ConfigError, match=r"^model: rotary_base is 500, but Megatron-LM .* with 1234 \(common.pt\)"):
        export_hf(root, tmp_path / "hf", model={"family": "llama", "vocab_size": 259, "rotary_base": 500})
    keep_arguments(root, norm_epsilon=1e-6)
    with pytest.raises(ConfigError, match="^reference: layernorm_epsilon is 0.005, but Megatron-LM .* with 1e-06"):
        verify(source, root, reference=source)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_layers": 5}, ConfigError, r"^model: num_layers is 5, but .* has 4 \(decoder.layers.3\)"),
        ({"num_layers": 3}, ConfigError, r"^model: num_layers is 3, but .* has 4 \(decoder.layers.3\)"),
        (
            {"hidden_size": 96},
            ConfigError,
            r"^model: hidden_size is 96, but .* has 48 \(embedding.word_embeddings",
        ),
        (
            {"share_embeddings_and_output_weights": True},
            ConfigError,
            r"share_embeddings_and_output_weights is true, but .* has false \(output_layer.weight is there\)",
        ),
        (
            {"num_attention_heads": 8},
            ConversionError,
            r"linear_proj.weight has shape \[48, 48\], but model makes it \[48, 96\]",
        ),
        (
            {"num_query_groups": 4},
            ConversionError,
            r"linear_qkv.weight has shape \[96, 48\], but model makes it \[144, 48\]",
        ),
        (
            {"vocab_size": 385},
            ConversionError,
            r"word_embeddings.weight has shape \[384, 48\], but model makes it \[385, 48\]",
        ),
        ({"add_bias_linear": True}, ConversionError, r"linear_qkv.bias.* missing; model asks for it"),
        ({"family": "lama"}, ConfigError, "^model.family: lama is not one of .*; did you mean 'llama'"),
    ],
)
def test_a_contradicted_fact_is_named(llama, tmp_path, changes, error, message):
    source, root = llama
    section = hf_config.to_mcore(hf_config.read(source)) | changes
    with pytest.raises(error, match=message):
        export_hf(root, tmp_path / "hf", model=section)


def test_what_cannot_be_given(llama, tmp_path):
    source, root = llama
    with pytest.raises(ConfigError, match="^reference: .*nowhere has no config.json; give a Hugging Face directory"):
        export_hf(root, tmp_path / "hf", reference=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="^reference: .* so does model; set only one of the two"):
        export_hf(root, tmp_path / "hf", reference=source, model={"family": "llama"})
    import_hf(source, tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"^model: .*ours/model.yaml already determines the model; remove model="):
        export_hf(tmp_path / "ours", tmp_path / "hf", model={"family": "llama"})


@pytest.mark.parametrize(
    ("kind", "layout"), [("llama", ONE), ("qwen3_tied", TP2), ("llama", PP2), ("qwen3_moe_no_dense", PP2)]
)
def test_what_we_import_loads_in_a_plain_script(tiny_hf, tmp_path, kind, layout):
    """By the metadata the checkpoint carries, as Megatron-LM's load_checkpoint takes it."""
    source = tiny_hf(kind)
    import_hf(source, tmp_path / "ours")
    directory = locate.locate(tmp_path / "ours").directory
    world_size = layout["tp"] * layout["pp"]
    wrong = run_distributed(plain_megatron.load, world_size, kind, source, directory, layout)
    assert wrong == [0] * world_size


def test_model_yaml_of_a_run_serves_as_a_file(llama, tmp_path):
    from bridge.config.run_config import read_model

    section = hf_config.to_mcore(hf_config.read(llama[0]))
    for name, content in (("config.yaml", {"name": "x", "model": section}), ("model.yaml", section)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
        assert read_model(tmp_path / name) == section
    (tmp_path / "model.yaml").write_text("[]")
    for name, message in (("none.yaml", "cannot be read"), ("model.yaml", "holds no `model` section")):
        with pytest.raises(ConfigError, match=f"^model: .*{name} {message}"):
            read_model(tmp_path / name)


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr()


def test_command_line(llama, tmp_path, monkeypatch, capsys):
    """model=FILE.yaml, keys on top of it or alone, and names of conf/model with their nearest one."""
    source, root = llama
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(hf_config.to_mcore(hf_config.read(source)) | {"rotary_base": 1}))
    given = ("mode=verify", f"hf={source}", f"megatron={root}")
    code, output = run_command(monkeypatch, capsys, *given, f"model={file}", "model.rotary_base=1234")
    assert code == 0 and "\nverified\n" in output.out
    assert run_command(monkeypatch, capsys, *given, f"model={file}")[0] == 1
    keep_arguments(root)
    alone = ("model.family=llama", "model.vocab_size=259")
    assert run_command(monkeypatch, capsys, *given, *alone)[0] == 0
    for argument, message in (
        ("model=tinny", "model: no option 'tinny'; did you mean 'tiny'?"),
        ("model=tiny", "model: num_layers is 6, but "),
        (f"model={tmp_path}/none.yaml", f"model: {tmp_path}/none.yaml cannot be read"),
        (f"reference={tmp_path}", f"reference: {tmp_path} has no config.json"),
    ):
        code, output = run_command(monkeypatch, capsys, *given, argument)
        assert code == 2 and output.err.startswith(message) and output.err.count("\n") == 1
