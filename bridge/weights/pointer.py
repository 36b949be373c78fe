"""latest_checkpointed_iteration.txt, Megatron's own file: which iteration of a checkpoint is to be read."""

from pathlib import Path

from bridge.errors import DamagedError

CHECKPOINTS = "checkpoints"  # where a run directory has its root
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best"  # a link beside the iterations to one of them
RELEASE = "release"  # what Megatron-LM writes for weights without a training run: ROOT/release, iteration 0


def iteration_directory(root: str | Path, *, iteration: int) -> Path:
    """ROOT/iter_0000100, Megatron's own naming."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(directory: Path) -> int | None:
    """100 of iter_0000100, 0 of release; None when the name is neither."""
    if directory.name == RELEASE:
        return 0
    number = directory.name.removeprefix("iter_")
    return int(number) if number != directory.name and number.isdigit() else None


def read(root: Path) -> Path | None:
    """The directory that ROOT's pointer names; None without a pointer. Raises DamagedError when it names none."""
    pointer = root / LATEST
    try:
        text = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{pointer}: cannot be read ({error})") from error
    if text == RELEASE:
        return root / RELEASE
    if not text.isdigit():
        raise DamagedError(f"{pointer}: holds {text!r}, not an iteration number; write that of a checkpoint beside it")
    return iteration_directory(root, iteration=int(text))


def write(root: Path, *, iteration: int) -> None:
    """Name ROOT's only iteration. Training moves the pointer with `bridge.checkpoint.files.point_at`, which flushes."""
    (root / LATEST).write_text(str(iteration), encoding="utf-8")
