"""mode=yaml prints a file that, dropped into conf/model, composes and describes the same model."""

import pytest

from bridge.config import run_config
from bridge.config.routing import route
from bridge.config.schema import ConvertConfig
from bridge.convert import run
from bridge.models.hf import config as hf_config
from tests.config.composing import composed


@pytest.mark.parametrize("variant", ["llama_llama3", "llama_longrope", "mistral", "qwen2_tied", "qwen3"])
def test_printed_yaml_composes_to_the_same_model(tiny_hf, tmp_path, capsys, variant):
    source = tiny_hf(variant)
    assert run(ConvertConfig(mode="yaml", hf=str(source))) == 0
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(capsys.readouterr().out)
    data = ("data=mock", "data.vocab_size=259", "data.sequence_length=32")
    settings = composed("model=mine", *data, "name=x", f"hydra.searchpath=[file://{tmp_path / 'conf'}]")
    section = hf_config.to_mcore(hf_config.read(source))
    assert settings["model"] == section
    routed = run_config.from_dict(settings).routed
    alone = route({"model": section})
    assert {name: routed.transformer[name] for name in alone.transformer} == alone.transformer
    assert routed.gpt == alone.gpt
