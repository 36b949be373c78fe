"""An installed wheel works outside the checkout: configuration files and both programs are in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the unpacked wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "site")
    return folder / "site"


def test_console_scripts(site: Path):
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    lines = entry_points.read_text().splitlines()
    assert "bridge-train = bridge.launch.start:main" in lines
    assert "bridge-convert = bridge.launch.convert:main" in lines


def test_every_option_is_shipped(site: Path):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    assert wanted == {path.relative_to(site / "bridge") for path in (site / "bridge" / "conf").rglob("*.yaml")}
    assert not (site / "conf").exists()


def test_the_page_of_reports_is_shipped(site: Path):
    page = Path("bridge", "sweep_report.html")
    assert (site / page).read_text() == (ROOT / page).read_text()


@pytest.mark.parametrize("program", ["driver", "convert"])
def test_programs_compose_outside_the_checkout(program: str, site: Path, tmp_path: Path):
    code = f"import bridge.launch.{program} as p; assert p.__file__.startswith({str(site)!r}), p.__file__; p.main()"
    arguments = ["--cfg", "job"] + (["mode=yaml", "hf=x"] if program == "convert" else [])
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("train:" if program == "driver" else "mode: yaml") in done.stdout
