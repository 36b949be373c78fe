"""docs/config.md is what conf/ says, and conf/ says something about every key."""

from pathlib import Path

import pytest

from bridge.errors import ConfigError
from bridge.launch import docs


def test_page_is_current(capsys: pytest.CaptureFixture[str]):
    assert docs.main(["--check"]) == 0, capsys.readouterr().err


def test_check_fails_when_conf_has_moved_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "config.md"
    monkeypatch.setattr(docs, "PAGE", page)
    assert docs.main(["--check"]) == 1
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    page.write_text(page.read_text().replace("`train.steps`", "`train.iterations`"))
    assert docs.main(["--check"]) == 1


def test_entries_have_full_keys(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text('# what\nlog:  # report\n  wandb:  # service\n    mode: "a # b"  # how\nsteps: 3  # how many\n')
    assert list(docs.entries(file)) == [
        docs.Entry("log", "", "report"),
        docs.Entry("log.wandb", "", "service"),
        docs.Entry("log.wandb.mode", '"a # b"', "how"),
        docs.Entry("steps", "3", "how many"),
    ]
    assert docs.summary(file) == "what"


def test_key_without_comment_is_named(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("# what\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: steps has no comment"):
        list(docs.entries(file))


def test_option_without_summary_is_named(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("steps: 3  # how many\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: does not start with a comment"):
        docs.summary(file)
