"""`python train.py init.path=DIR` is complete: the model is that of DIR, and a contradiction names both values."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from bridge.errors import ConfigError
from bridge.launch import inputs, model_of_init
from bridge.weights import locate
from tests.config.composing import composed
from tests.hf_models import save
from tests.launch.test_tokenizer import checkpoint
from tests.training.runs import MODEL, config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 in Hugging Face format."""
    return save("qwen3", tmp_path_factory.mktemp("model_of_init") / "qwen")


def section(directory: Path) -> dict[str, object]:
    from bridge.models.hf import config as hf_config

    return hf_config.to_mcore(hf_config.read(directory))


def test_it_is_that_of_a_hugging_face_directory(directory: Path) -> None:
    job = composed(f"init.path={directory}", "model.attention_dropout=0.25", "+model.attention_backend=fused")
    assert job["model"] == section(directory) | {"attention_dropout": 0.25, "attention_backend": "fused"}
    assert job["name"] == "from_qwen"
    chosen = composed(f"init.path={directory}", "model=qwen3_0_6b")
    assert (chosen["model"]["hidden_size"], chosen["name"]) == (1024, "qwen3_0_6b")
    assert composed()["model"]["hidden_size"] == 256


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/iter_0000007", "checkpoints/best"])
def test_it_is_that_of_a_checkpoint(tmp_path: Path, place: str) -> None:
    root = checkpoint(tmp_path / "demo" / "checkpoints")
    (root / "best").symlink_to("iter_0000007")
    locate.write_model_section(root, MODEL)
    job = composed(f"init.path={tmp_path / 'demo' / place}", "model.hidden_size=32")
    assert (job["model"], job["name"]) == (MODEL, "from_demo")


def test_a_sweep_has_one_of_each(directory: Path, tmp_path: Path) -> None:
    from unittest import mock

    from bridge.launch import compose

    root = checkpoint(tmp_path / "demo" / "checkpoints")
    locate.write_model_section(root, MODEL)
    typed = ["-m", f"init.path={directory},{tmp_path / 'demo'}", f"runs_dir={tmp_path}", "name=s"]
    with mock.patch("sys.argv", ["train.py", *typed]):
        models = [job.settings["model"] for job in compose.jobs("train")]
    assert models == [section(directory), MODEL]


def test_a_run_that_goes_on_keeps_its_own(directory: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(directory, tmp_path / "moved")
    words = (f"init.path={moved}", f"runs_dir={tmp_path}", "model.attention_dropout=0.25")
    first = composed(*words)
    checkpoint(tmp_path / "from_moved" / "checkpoints")
    (tmp_path / "from_moved" / "config.yaml").write_text(yaml.safe_dump(first))
    shutil.rmtree(moved)
    assert composed(*words) == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.hidden_size=999", "model.num_layers=6"],
            r"model.num_layers is 6 \(there \d+\), model.hidden_size is 999 \(there \d+\): not the model in "
            r"{directory}; leave that out: the model is that of init.path",
        ),
        (["init.path={directory}/none"], "init.path: {directory}/none does not exist; give a Hugging Face directory"),
        (["init.path={directory}/.."], "init.path: .* is neither a Hugging Face directory"),
    ],
)
def test_what_is_refused(directory: Path, words: list[str], message: str) -> None:
    typed = [word.format(directory=directory) for word in words]
    path = [] if any(word.startswith("init.path") for word in typed) else [f"init.path={directory}"]
    with pytest.raises(ConfigError, match=f"^{message.replace('{directory}', re.escape(str(directory)))}"):
        composed(*path, *typed)


def test_names() -> None:
    for path, name in {
        "/m/Qwen3-4B": "Qwen3-4B",
        "/r/a/hf/iter_0000100": "a",
        "/x/epoch=3 b": "epoch_3_b",
        "/": "weights",
    }.items():
        assert model_of_init.name_after(Path(path)) == f"from_{name}"


def test_random_weights_for_fine_tuning_are_asked_for(tmp_path: Path) -> None:
    def run(**init: object) -> object:
        data = {"source": "tests.training.fine_tuning", "sequence_length": 16, "vocab_size": 100}
        return config(tmp_path, data=data, init=init)

    message = (
        "init.path: is not set, and data.source=tests.training.fine_tuning is for fine-tuning; set init.path=DIR to "
        "the model to start from, or init.random=true to train random weights"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        inputs.check(run())
    inputs.check(run(random=True))
    checkpoint(tmp_path / "run" / "checkpoints")
    inputs.check(run())
