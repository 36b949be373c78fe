"""Multi-token prediction: the logits and gradients of transformers' MtpModel, and files with and without modules."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import bridge
from bridge import parallel
from bridge.config.routing import route
from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.errors import ConfigError, ConversionError
from bridge.models import family, gpt
from bridge.models.hf import config as hf_config
from bridge.weights import into_model
from bridge.weights.hf_files import open_hf
from tests import hf_models, hf_predictions

LENGTH = 20
TOLERANCE = 1e-4


def build(directory: Path) -> tuple[gpt.GPT, dict[str, Any]]:
    section = hf_config.to_mcore(hf_config.read(directory))
    (model,) = gpt.build(route({"model": {**section, "calculate_per_token_loss": True}}), dtype=torch.float32)
    table = family.by_name(section["family"]).table(section)
    into_model.load_hf([model], open_hf(directory), table=table, vocab_size=section["vocab_size"])
    return model, section


@pytest.mark.parametrize(
    "variant",
    ["deepseek_v3", "deepseek_v3_yarn", "deepseek_v3_tied", "glm4_moe", "glm4_moe_two_predictions", "glm4_moe_tied"],
)
def test_logits_and_gradients_equal_transformers(variant: str, tmp_path: Path):
    """Both losses, per token and weighed as in DeepSeek-V3 (2412.19437, 2.2), and gradients down to the embedding."""
    directory = hf_models.save(variant, tmp_path, tokenizer=False)
    ids = hf_models.prompts(length=LENGTH + 1)
    tokens, labels = ids[:, :-1], ids[:, 1:]
    hf, expected = hf_predictions.transformers_models(directory), []
    main, predicted = hf.logits(tokens)
    losses = []  # of each module: sum, number of tokens
    loss = F.cross_entropy(main.flatten(0, 1), labels.flatten(), reduction="sum")
    for number, logits in enumerate(predicted):
        shifted = labels[:, number + 1 :]
        further = F.cross_entropy(logits[:, : -number - 1].flatten(0, 1), shifted.flatten(), reduction="sum")
        loss = loss + 0.1 / len(predicted) * further
        losses.append([further.item(), shifted.numel()])
        expected.append(logits.detach())
    (loss / labels.numel()).backward()
    with parallel.single_process():
        model, _ = build(directory)
        model.start_measuring()
        seen: list[torch.Tensor] = []
        model.mtp.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
        positions = torch.arange(LENGTH).expand_as(tokens)
        model.train()(tokens, positions, None, labels=labels).sum().backward()
        measured = {name: pair.tolist() for name, pair in model.measured()}
        assert measured == {f"mtp_{number}_loss": pytest.approx(pair) for number, pair in enumerate(losses, start=1)}
        for hidden, logits in zip(seen[0].chunk(1 + len(expected))[1:], expected, strict=True):
            output = model.embedding.word_embeddings if model.output_layer.weight is None else model.output_layer
            torch.testing.assert_close(
                (hidden @ output.weight.T).transpose(0, 1).double(), logits, atol=TOLERANCE, rtol=0
            )
        theirs = hf.gradients()
        ours = {
            "embed": model.embedding.word_embeddings.weight,
            "norm": model.decoder.final_layernorm.weight,
            "eh_proj": model.mtp.layers[-1].eh_proj.weight,
            "o_proj": model.mtp.layers[-1].transformer_layer.self_attention.linear_proj.weight,
        }
        for name, parameter in ours.items():
            difference = (parameter.grad / labels.numel() - theirs[name]).abs().max()
            assert difference < TOLERANCE, f"{name}: {difference}"


def test_without_labels_or_gradients_nothing_is_predicted(tmp_path: Path):
    directory = hf_models.save("deepseek_v3", tmp_path, tokenizer=False)
    ids = hf_models.prompts(length=LENGTH)
    positions = torch.arange(LENGTH).expand_as(ids)
    with parallel.single_process():
        model, _ = build(directory)
        calls: list[int] = []
        model.mtp.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(
            model(ids, positions, None), hf_models.logits(directory, ids), atol=TOLERANCE, rtol=0
        )
        with torch.no_grad():
            model(ids, positions, None, labels=ids)
        assert not calls
        model(ids, positions, None, labels=ids)
        assert calls


@pytest.mark.parametrize(("layout", "rank"), [("Ett|ttmL", 1), ("Ett|tt|mL", 2)])
def test_modules_stand_before_the_loss_wherever_the_layers_are(layout: str, rank: int, tmp_path: Path):
    parallelism = {"pipeline_model_parallel_layout": layout, "pipeline_model_parallel_size": rank + 1}
    model = _on_last_stage(tmp_path, parallelism, rank=rank)
    assert len(model.mtp.layers) == 1
    assert (model.decoder.final_layernorm is not None) == (rank == 1)


def test_modules_on_another_stage_than_the_loss_are_refused(tmp_path: Path):
    parallelism = {"pipeline_model_parallel_layout": "Ett|ttm|L", "pipeline_model_parallel_size": 3}
    with pytest.raises(ConfigError, match="pipeline_model_parallel_layout: multi-token prediction .* put m before L"):
        _on_last_stage(tmp_path, parallelism, rank=1)


def _on_last_stage(directory: Path, parallelism: dict[str, Any], *, rank: int) -> gpt.GPT:
    hf_models.config("deepseek_v3").save_pretrained(directory)
    sections = {"model": hf_config.to_mcore(hf_config.read(directory)), "parallelism": parallelism}
    routed = route({**sections, "precision": {"pipeline_dtype": "fp32"}})
    with parallel.fake(parallelism["pipeline_model_parallel_size"], rank, routed.transformer):
        return gpt.build(routed, meta=True)[0]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_files_without_the_modules_their_config_counts(tmp_path: Path):
    """As transformers saves a model again: the config counts on."""
    source = hf_models.save("deepseek_v3", tmp_path / "hf", tokenizer=False)
    kept = {name: tensor for name, tensor in tensors(source).items() if ".layers.4." not in name}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="num_nextn_predict_layers: 1, but the files have no such layers"):
        import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert tensors(tmp_path / "back").keys() == kept.keys()


def test_a_live_model_gives_the_same_files(tmp_path: Path):
    source = hf_models.save("deepseek_v3_tied", tmp_path / "hf", tokenizer=False)
    with parallel.single_process():
        bridge.save_hf([build(source)[0]], tmp_path / "saved")
    saved, stored = tensors(tmp_path / "saved"), tensors(source)
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


def test_a_config_that_does_not_count_them_is_as_its_files_are(tmp_path: Path):
    source = hf_models.save("deepseek_v3", tmp_path, tokenizer=False)
    config = hf_config.read(source)
    del config["num_nextn_predict_layers"]
    (source / "config.json").write_text(json.dumps(config))
    assert hf_config.to_mcore(hf_config.read(source))["mtp_num_layers"] == 1
    kept = {name: tensor for name, tensor in tensors(source).items() if ".layers.4." not in name}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    assert "mtp_num_layers" not in hf_config.to_mcore(hf_config.read(source))


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_is_none_is_refused(copy: str, tmp_path: Path):
    source = hf_models.save("deepseek_v3", tmp_path / "hf", tokenizer=False)
    changed = tensors(source)
    changed[f"model.layers.4.{copy}.weight"][0, 0] += 1
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=rf"model.layers.4.{copy}.weight differs from .* has to be a copy"):
        import_hf(source, tmp_path / "megatron")


def test_copies_are_written_whatever_the_source_had(tmp_path: Path):
    source = hf_models.save("deepseek_v3", tmp_path / "hf", tokenizer=False)
    whole = tensors(source)
    copies = ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight")
    save_file(
        {k: v for k, v in whole.items() if k not in copies}, source / "model.safetensors", metadata={"format": "pt"}
    )
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    back = tensors(tmp_path / "back")
    assert back.keys() == whole.keys()
    assert all(torch.equal(back[name], whole[name]) for name in whole)


def test_modules_of_ernie_are_left_out_only_when_the_config_counts_none(tmp_path: Path):
    """Baidu's files have one, which transformers does not read either."""
    source = hf_models.save("ernie4_5_moe", tmp_path / "hf", tokenizer=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    whole = tensors(source)
    modules = {name: whole[f"model.layers.0.{name}"] for name in ("mlp.up_proj.weight", "input_layernorm.weight")}
    modules = {f"model.mtp_block.0.{name}": tensor.clone() for name, tensor in modules.items()}
    modules["model.mtp_emb_norm.0.weight"] = torch.ones(48)
    save_file(whole | modules, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"num_nextn_predict_layers: 1, .* \(model.mtp_\*\) .*; set it to 0"):
        import_hf(source, tmp_path / "megatron")
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()).get("num_nextn_predict_layers", 0) == 0
    assert tensors(tmp_path / "back").keys() == whole.keys()


def test_a_model_of_ernie_with_modules_has_no_table():
    section = hf_config.to_mcore({**hf_models.config("ernie4_5_moe").to_dict(), "num_nextn_predict_layers": 1})
    with pytest.raises(ConversionError, match="model.mtp_num_layers: 1 cannot be converted"):
        family.by_name("ernie4_5_moe").table(section)
