"""Micro-batches of a source's dataset, read by this process or by others beside it."""

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from bridge.data import loader_server
from bridge.data.sampler import FILLER
from bridge.errors import BridgeError, ConfigError


class LoadingError(Exception):
    """The dataset failed on a sample: one line that names it. A loader process's traceback is in the notes."""

    def __init__(self, message: str) -> None:
        # torch raises an error of a loader process anew, with the whole traceback for its message.
        *before, last = message.strip().split("\n")
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))
        if before:
            self.add_note(message)


class Numbered(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset whose items also carry `sample_id`, their index, so that what was read can be recorded.

    Item FILLER is another one with nothing in it that counts: of weight 0 and, where samples share rows, padding.
    To a loader process it goes as bytes, which `open` opens there. Raises LoadingError for a sample, ConfigError for a
    dataset that cannot go.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            item = self.dataset[0 if index == FILLER else index]
        except BridgeError:
            raise
        except Exception as error:
            raise LoadingError(f"data.source: sample {index} cannot be read ({_line(error)})") from error
        if index == FILLER:
            nothing = {"loss_mask": 0, "segment_ids": -1}
            item = {**item, **{key: torch.full_like(item[key], nothing[key]) for key in nothing.keys() & item.keys()}}
        return {**item, "sample_id": torch.tensor(index)}

    def __getstate__(self) -> bytes:
        try:
            return bytes(ForkingPickler.dumps(self.dataset))
        except Exception as error:
            raise ConfigError(
                f"data.num_workers: the dataset of data.source cannot be sent to loader processes ({_line(error)}); "
                "set data.num_workers=0, or make the dataset one that pickle can send"
            ) from error

    def __setstate__(self, state: bytes) -> None:
        self.dataset = state

    def open(self) -> None:
        """Make the dataset out of its bytes."""
        try:
            self.dataset = pickle.loads(self.dataset)
        except Exception as error:
            reason = f"the dataset cannot be opened in a loader process ({_line(error)})"
            raise LoadingError(f"data.source: {reason}; set data.num_workers=0") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def loader(dataset: Any, *, batches: Any, num_workers: int, pin_memory: bool) -> torch.utils.data.DataLoader[Any]:
    """A DataLoader over `Numbered(dataset)` that yields one bridge.data.batch.Batch per micro-batch.

    `dataset.collate` makes it from the items, which are dicts with `sample_id`; without it they are stacked.
    """
    return torch.utils.data.DataLoader(
        Numbered(dataset),
        batch_sampler=batches,
        collate_fn=getattr(dataset, "collate", None),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=loader_server.start() if num_workers else None,
        worker_init_fn=_open,
        # Otherwise each new iterator draws from the generator that dropout uses, and a resumed run goes another way.
        generator=torch.Generator(),
    )


def _open(_: int) -> None:
    """In a new loader process: an error here reaches the trainer, one while the process is made would not."""
    worker: Any = torch.utils.data.get_worker_info()
    worker.dataset.open()
