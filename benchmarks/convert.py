"""How fast conversion is, against a plain stream of the same bytes and against transformers, and the memory it takes.

    python benchmarks/convert.py                  # a 16 GB Llama in /tmp; needs 3 times that on disk
    python benchmarks/convert.py --size 1GB --repeats 3

A synthetic bf16 Llama checkpoint is written; then, each in a process of its own that starts with none of the source in
the page cache and is timed until the last byte is on the disk:
    plain         each file read and written again in blocks of 16 MB: what the disk and the memory allow
    import        mode=import into a torch_dist folder
    export        mode=export of that into safetensors
    transformers  from_pretrained and save_pretrained, of a smaller model where memory does not hold this one
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import synthetic  # noqa: E402
from bridge.weights.hf_files import parse_size  # noqa: E402

BLOCK = 1 << 24
INTERVAL = 0.05  # seconds between two looks at the memory
COLUMNS = "| step | size | seconds | GB/s | of plain | peak RSS | peak PSS | anonymous |"


class Measured(NamedTuple):
    """Seconds of one step; peaks over its whole process tree. PSS counts a page that n processes share 1/n times."""

    seconds: float
    rss: float = 0.0
    pss: float = 0.0
    anonymous: float = 0.0


def main() -> None:
    arguments = _arguments()
    if arguments.step:
        print(json.dumps(_timed(STEPS[arguments.step], arguments.source, arguments.target, arguments.workers)))
        return
    directory = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.directory))
    try:
        _benchmark(directory, arguments)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16GB", help="of the checkpoint, about")
    parser.add_argument("--transformers-size", default=None, help="for transformers; 0: leave it out")
    parser.add_argument("--repeats", type=int, default=1, help="medians are printed")
    parser.add_argument("--workers", type=int, default=None, help="threads of import and export; default: automatic")
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def _benchmark(directory: Path, arguments: argparse.Namespace) -> None:
    print(f"{os.cpu_count()} cores, {_memory('MemTotal') / 1e9:.0f} GB memory, {directory}", flush=True)
    source = directory / "source"
    size = synthetic.write(source, num_bytes=parse_size(arguments.size))
    measure = _Measure(arguments)
    interpreter = measure("interpreter", source, directory / "none")
    rounds: dict[str, list[Measured]] = {"plain": [], "import": [], "export": []}
    for _ in range(arguments.repeats):
        rounds["plain"].append(measure("plain", source, directory / "plain"))
        shutil.rmtree(directory / "plain")
        rounds["import"].append(measure("import", source, directory / "megatron"))
        rounds["export"].append(measure("export", directory / "megatron", directory / "hf"))
        _check_equal(source, directory / "hf")
        shutil.rmtree(directory / "megatron")
        shutil.rmtree(directory / "hf")
    plain = statistics.median(one.seconds for one in rounds["plain"]) / size
    print(COLUMNS + "\n" + "|---" * COLUMNS.count(" | ") + "|---|", flush=True)
    _row("interpreter and skeleton", 0, [interpreter], plain)
    for step, measured in rounds.items():
        _row(step, size, measured, plain)
    small = _transformers_size(arguments, size)
    if small:
        if small < size:
            shutil.rmtree(source)
            small = synthetic.write(source, num_bytes=small)
        _row("transformers", small, [measure("transformers", source, directory / "saved")], plain)


def _row(step: str, size: int, measured: list[Measured], plain: float) -> None:
    """`plain`: seconds per byte of the plain stream."""
    seconds, *peaks = (statistics.median(column) for column in zip(*measured, strict=True))
    speed = f"{size / 1e9:.2f} GB | {seconds:.1f} | {size / seconds / 1e9:.2f} | {plain * size / seconds:.2f}"
    print(f"| {step} | {speed if size else ' | | |'} | " + " | ".join(f"{peak / 1e9:.2f} GB" for peak in peaks) + " |")


class _Measure:
    """Runs one step in a process of its own and watches the memory of its tree."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._workers = [] if arguments.workers is None else ["--workers", str(arguments.workers)]

    def __call__(self, step: str, source: Path, target: Path) -> Measured:
        _forget(source)
        command = [sys.executable, "-W", "ignore", __file__, "--step", step, *self._workers]
        command += ["--source", str(source), "--target", str(target)]
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peaks = Measured(0.0)
        while process.poll() is None:
            now = _memory_of_tree(process.pid)
            peaks = Measured(0.0, *map(max, peaks[1:], now[1:]))
            time.sleep(INTERVAL)
        assert process.stdout is not None
        out = process.stdout.read()
        if process.returncode:
            sys.exit(f"{step} failed after {time.monotonic() - started:.0f} s")
        seconds = float(json.loads(out.splitlines()[-1]))
        print(f"  {step}: {seconds:.1f} s", file=sys.stderr, flush=True)
        return peaks._replace(seconds=seconds)


def _timed(step: Callable[[Path, Path, int | None], None], source: str, target: str, workers: int | None) -> float:
    """Seconds until every byte of `target` is on the disk, without the imports."""
    from bridge import platform

    platform.prepare()
    from bridge.convert import export, import_  # noqa: F401

    start = time.monotonic()
    step(Path(source), Path(target), workers)
    for file in Path(target).rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.monotonic() - start


def _interpreter(source: Path, _: Path, __: int | None) -> None:
    from bridge.models.hf import config as hf_config
    from bridge.sources.skeleton import skeleton

    skeleton(hf_config.to_mcore(hf_config.read(source)))


def _plain(source: Path, target: Path, _: int | None) -> None:
    target.mkdir()
    buffer = memoryview(bytearray(BLOCK))
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as read, (target / file.name).open("wb", buffering=0) as write:
            while size := read.readinto(buffer):
                write.write(buffer[:size])


def _import(source: Path, target: Path, workers: int | None) -> None:
    from bridge.convert.import_ import import_hf

    print(import_hf(source, target, workers=workers))


def _export(source: Path, target: Path, workers: int | None) -> None:
    from bridge.convert.export import export_hf

    print(export_hf(source, target, workers=workers))


def _transformers(source: Path, target: Path, _: int | None) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)


STEPS = {
    "interpreter": _interpreter,
    "plain": _plain,
    "import": _import,
    "export": _export,
    "transformers": _transformers,
}


def _transformers_size(arguments: argparse.Namespace, size: int) -> int:
    if arguments.transformers_size is not None:
        return min(parse_size(arguments.transformers_size), size) if arguments.transformers_size != "0" else 0
    return size if _memory("MemAvailable") > 2 * size else size // 4


def _forget(directory: Path) -> None:
    """Write everything out, and drop a directory's files from the page cache."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _check_equal(source: Path, target: Path) -> None:
    """The largest and the smallest tensor of the round trip, byte by byte; tests compare the others."""
    from bridge.weights.hf_files import open_hf
    from bridge.weights.transfer import bit_equal

    theirs, ours = open_hf(source), open_hf(target)
    assert theirs.tensors.keys() == ours.tensors.keys()
    for choose in (min, max):
        name = choose(theirs.tensors, key=lambda name: theirs.spec(name).num_bytes)
        assert bit_equal(theirs.read(name), ours.read(name)), name


def _memory(field: str) -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _memory_of_tree(pid: int) -> Measured:
    rss = pss = anonymous = 0
    for process in _tree(pid):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        except (OSError, ValueError):  # it has just ended
            continue
        kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        rss, pss, anonymous = rss + kib["Rss"], pss + kib["Pss"], anonymous + kib["Pss_Anon"]
    return Measured(0.0, rss * 1024, pss * 1024, anonymous * 1024)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(process for child in children for process in _tree(int(child)))]


if __name__ == "__main__":
    main()
