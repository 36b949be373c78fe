"""What a data source is: one module with `Config`, `prepare` and `build`. This file imports no torch.

A source module (`bridge.data.<name>`, or a dotted name outside the tree) exposes
    Config                                       a frozen dataclass, subclass of SourceConfig
    prepare(config, *, cache, seed) -> Prepared  CPU work before process groups exist; leaves a completed cache entry
    build(config, prepared, *, seed) -> Datasets map-style datasets of such items as the objective reads
and, if it likes, what refuses a file that is missing before torch is imported and before a job waits in a queue:
    check(config) -> None                        raises ConfigError
    FINE_TUNES = True                            trains random weights only with init.random=true
With data.num_workers > 0 the training dataset is pickled for other processes.
An item is a dict of tensors of shape [sequence_length]: tokens, labels, position_ids (int64) and loss_mask (float32),
and whatever else the objective names (bridge.data.batch, which stacks them). A dataset with items of other shapes has
an attribute `collate`, a function from the items of a micro-batch to its Batch, which loader processes get too. One
that knows where an item is from has `source_of(index)`, FILE:LINE or the like, which bridge.inspect shows. One whose
items depend on more than what `prepare` left, as the layout, has `identity`, a text that changes with them: no run goes
on with others.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bridge.errors import ConfigError


def at_least(smallest: int, default: int) -> Any:
    """A field of a Config whose values begin at `smallest`."""
    return field(default=default, metadata={"min": smallest})


@dataclass(frozen=True)
class SourceConfig:
    """The keys every data source has, because the training loop reads them.

    A field's metadata may have `min`, its smallest legal value; what else is wrong with the values alone is a
    ConfigError in __post_init__. Both are found before a run is started.
    """

    source: str
    sequence_length: int = at_least(1, 128)
    cache_dir: str | None = None
    num_workers: int = at_least(0, 0)


class Prepared(NamedTuple):
    """What `prepare` leaves behind: plain values, the same on every process."""

    directory: Path | None
    """The completed cache entry; None when nothing is stored."""
    vocab_size: int
    """Number of token ids that can occur; the model's vocabulary must be at least as large."""
    tokenizer: Path | None = None
    """A directory AutoTokenizer.from_pretrained loads."""
    unigram_entropy: float | None = None
    """Entropy of the held-out tokens' frequencies in nats per token: the best a model without context can reach."""

    @property
    def identity(self) -> str:
        """Changes when the stored samples change; empty when nothing is stored."""
        return "" if self.directory is None else self.directory.name


class Datasets(NamedTuple):
    """Map-style datasets (`len`, `[i]`). valid: None when nothing is held out; a mapping NAME -> dataset when there are
    several sets, which are evaluated one by one (eval_loss/NAME)."""

    train: Any
    valid: Any | None


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that change with `parts`, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cache_root(cache_dir: str | None) -> Path:
    """Where prepared data is kept: data.cache_dir, else $BRIDGE_CACHE, else bridge/ in $XDG_CACHE_HOME or ~/.cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if "BRIDGE_CACHE" in os.environ:
        return Path(os.environ["BRIDGE_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "bridge"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, freed by the kernel if we die; a process that has to wait says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that prepares {path.with_suffix('')}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def completed(entry: Path, *, fill: Callable[[Path], object], resumable: bool = False) -> Path:
    """The cache entry `entry`, filled first when it is missing.

    One process per node fills it while the others wait for the lock. `fill(directory)` writes into a temporary sibling
    that is renamed when complete, so an entry that exists is a whole one even after a kill. resumable: the sibling of
    one that was not completed is kept, and the next `fill` gets it; but not where the user has to change something.
    """
    if entry.is_dir():
        return entry
    try:
        with locked(entry.with_name(f"{entry.name}.lock")):
            if not entry.is_dir():
                if resumable:
                    unfinished = entry.with_name(f".{entry.name}.unfinished")
                    unfinished.mkdir(exist_ok=True)
                else:
                    unfinished = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
                try:
                    fill(unfinished)
                    unfinished.rename(entry)
                except BaseException as error:
                    if not resumable or isinstance(error, ConfigError):
                        shutil.rmtree(unfinished, ignore_errors=True)
                    raise
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: cannot write {entry.parent} ({error.strerror}); set a directory you can write to"
        ) from error
    return entry
