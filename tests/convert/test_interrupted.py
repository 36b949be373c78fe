"""Conversions that are stopped, by a signal or a full disk: one line, and nothing is left behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.errors import ConversionError
from bridge.weights import output, pages
from bridge.weights.dist_files import DataFile
from tests.test_docs import ROOT

# Each tensor takes a while, so that a signal comes in the middle, and tells on stderr that it was written.
SLOW = """
import sys, time
sys.argv = ["convert.py", *sys.argv[1:]]
from bridge.weights import dist_files, hf_files
def slow(write):
    def slowed(*arguments):
        result = write(*arguments)
        sys.stderr.write("written\\n")  # at once: two threads do
        time.sleep(0.1)
        return result
    return slowed
dist_files.DataFile.write = slow(dist_files.DataFile.write)
hf_files.HfWriter.write = slow(hf_files.HfWriter.write)
from bridge.launch.convert import main
main()
"""


def start(*arguments):
    """A slowed convert.py that has written some tensors."""
    command = [sys.executable, "-W", "ignore", "-c", SLOW, *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    seen = [process.stderr.readline() for _ in range(4)]
    assert "written\n" in seen, seen
    return process


def processes_of(path):
    """Command lines of the processes that know `path`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                found += [line for line in [file.read()] if str(path) in line and int(pid) != os.getpid()]
        except OSError:
            continue
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(tiny_hf, tmp_path, workers, number, code):
    out = tmp_path / "out"
    process = start("mode=import", f"hf={tiny_hf('llama')}", f"megatron={out}/megatron", f"workers={workers}")
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert os.listdir(out) == []
    assert "Traceback" not in stderr
    assert processes_of(out) == []


def test_what_a_killed_conversion_left_is_gone_after_the_next(tiny_hf, tmp_path):
    source, out = tiny_hf("llama"), tmp_path / "out"
    process = start("mode=import", f"hf={source}", f"megatron={out}/megatron", "workers=2")
    process.kill()
    process.communicate(timeout=60)
    assert processes_of(out) == []
    (partial,) = os.listdir(out)
    assert partial.startswith(".megatron.partial-")
    import_hf(source, out / "megatron")
    assert os.listdir(out) == ["megatron"]


def test_an_export_stops_as_an_import_does(tiny_hf, tmp_path):
    import_hf(tiny_hf("llama"), tmp_path / "megatron")
    out = tmp_path / "out"
    process = start("mode=export", f"megatron={tmp_path / 'megatron'}", f"hf={out}/hf", "workers=2")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert os.listdir(out) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_any_exception_leaves_nothing(tiny_hf, tmp_path, monkeypatch, stop):
    write, written = DataFile.write, []

    def failing(self, key, tensor):
        if len(written) == 5:
            raise stop
        written.append(key)
        return write(self, key, tensor)

    monkeypatch.setattr(DataFile, "write", failing)
    with pytest.raises(stop):
        import_hf(tiny_hf("llama"), tmp_path / "out" / "megatron")
    assert os.listdir(tmp_path / "out") == []


def test_no_room_is_found_out_before_the_first_byte(tiny_hf, tmp_path, monkeypatch):
    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for convert, arguments in ((import_hf, (source,)), (export_hf, (tmp_path / "megatron",))):
        with pytest.raises(ConversionError, match="the disk has 0.00 GB free; free some space"):
            convert(*arguments, tmp_path / "out" / "new")
        assert os.listdir(tmp_path / "out") == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 KB, less than the model's weights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_naming_file_and_tensor(tiny_hf, tmp_path, small_disk, monkeypatch, workers):
    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron")
    monkeypatch.setattr(output, "check_space", lambda *_: None)  # as if another process had filled it meanwhile
    message = r"^/.*/disk/\.new\.partial-\d+/.*{}: tensor \S+ cannot be written \(No space left on device\)$"
    with pytest.raises(ConversionError, match=message.format(r"iter_0000000/__\d_0.distcp")):
        import_hf(source, small_disk / "new", workers=workers)
    with pytest.raises(ConversionError, match=message.format("model.safetensors")):
        export_hf(tmp_path / "megatron", small_disk / "new", workers=workers)
    assert os.listdir(small_disk) == []


def test_a_full_disk_where_none_can_be_mounted(tiny_hf, tmp_path, monkeypatch):
    import_hf(tiny_hf("llama"), tmp_path / "megatron")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pages.os, "pwrite", full)
    with pytest.raises(ConversionError, match="^hf: .*/out/hf cannot be written .No space left on device.; free"):
        export_hf(tmp_path / "megatron", tmp_path / "out" / "hf")
    assert os.listdir(tmp_path / "out") == []
