"""docs/config.md is what conf/ says, and conf/ says something about every key."""

from pathlib import Path

import pytest

from bridge.errors import ConfigError
from tests import config_page


def test_page_is_current(capsys: pytest.CaptureFixture[str]):
    assert config_page.main(["--check"]) == 0, capsys.readouterr().err


def test_check_fails_when_conf_has_moved_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "config.md"
    monkeypatch.setattr(config_page, "PAGE", page)
    assert config_page.main(["--check"]) == 1
    assert config_page.main([]) == 0
    assert config_page.main(["--check"]) == 0
    page.write_text(page.read_text().replace("`train.steps`", "`train.iterations`"))
    assert config_page.main(["--check"]) == 1


def test_entries_have_full_keys(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text('# what\nlog:  # report\n  wandb:  # service\n    mode: "a # b"  # how\nsteps: 3  # how many\n')
    assert list(config_page.entries(file)) == [
        config_page.Entry("log", "", "report"),
        config_page.Entry("log.wandb", "", "service"),
        config_page.Entry("log.wandb.mode", '"a # b"', "how"),
        config_page.Entry("steps", "3", "how many"),
    ]
    assert config_page.summary(file) == "what"


def test_key_without_comment_is_named(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("# what\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: steps has no comment"):
        list(config_page.entries(file))


def test_option_without_summary_is_named(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("steps: 3  # how many\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: does not start with a comment"):
        config_page.summary(file)
