"""Loader processes: the batches of this process, from a server without threads, and none outlives its trainer."""

import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import distributed

BATCHES = [[3, 1], [0, 2], [1, 1], [2, 0]]


class Broken:
    """A user's dataset whose sample 2 is damaged."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise ValueError("a bad\nrecord")
        return {"tokens": torch.tensor([index])}


class Unsendable(Broken):
    def __init__(self):
        self.stream = (line for line in [])


class Unopenable(Broken):
    def __reduce__(self):
        return open, ("/nowhere",)


def batches(dataset: Any, *, num_workers: int) -> Any:
    from bridge.data import loader

    return iter(loader.loader(dataset, batches=BATCHES, num_workers=num_workers, pin_memory=False))


def read(dataset: Any, *, num_workers: int) -> list[Any] | str:
    """The batches, or the error in one line."""
    try:
        return [
            {key: value.tolist() for key, value in batch.items()} for batch in batches(dataset, num_workers=num_workers)
        ]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t") for line in lines if ":\t" in line)


def train(sender: Connection, cache: Path) -> None:
    """A trainer with threads; it sends what it read by 0 and by 2 processes, and waits for its end."""
    from bridge.data import mock
    from bridge.data.samples import concatenated
    from tests.data.test_text import prepare

    config = mock.Config(num_samples=10, sequence_length=4)
    datasets = {
        "mock": mock.build(config, mock.prepare(config, cache=cache, seed=0), seed=0).train,
        "indexed": concatenated.build(prepare(cache), sequence_length=32, seed=1).train,
        "broken": Broken(),
        "unsendable": Unsendable(),
        "unopenable": Unopenable(),
    }
    before = torch.get_rng_state()
    found = {name: [read(dataset, num_workers=number) for number in (0, 2)] for name, dataset in datasets.items()}
    assert torch.equal(torch.get_rng_state(), before)
    reading = batches(datasets["mock"], num_workers=2)  # kept
    next(reading)
    (server,) = [child for child in psutil.Process().children() if child.children()]
    sender.send((found, server.pid, [child.pid for child in server.children()]))
    signal.pause()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the trainer sent, and the processes that there were; it has been killed since."""
    receiver, sender = distributed.context.Pipe(duplex=False)
    trainer = distributed.context.Process(target=train, args=(sender, tmp_path_factory.mktemp("cache")))
    trainer.start()
    sender.close()
    found, server, workers = receiver.recv()
    processes = [psutil.Process(pid) for pid in (server, *workers)]
    seen = [status(process.pid) for process in processes]
    trainer.kill()
    trainer.join()
    return found, processes, seen


@pytest.mark.parametrize("name", ["mock", "indexed"])
def test_the_batches_are_those_of_this_process(trained, name: str) -> None:
    here, there = trained[0][name]
    assert here == there
    assert [batch["sample_id"] for batch in here] == BATCHES
    assert here[0]["tokens"][1] == here[2]["tokens"][0] != here[0]["tokens"][0]


def test_the_server_has_no_threads_and_stop_signals_are_the_trainers(trained) -> None:
    server, *workers = trained[2]
    assert server["Threads"] == "1"
    assert len(workers) >= 2  # and those that an error keeps
    for process in trained[2]:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            assert int(process["SigBlk"], 16) >> (signum - 1) & 1


def test_nothing_outlives_a_killed_trainer(trained) -> None:
    assert psutil.wait_procs(trained[1], timeout=60)[1] == []


def test_a_sample_that_fails_is_named(trained) -> None:
    line = "LoadingError: data.source: sample 2 cannot be read (ValueError: a bad record)"
    assert trained[0]["broken"] == [line, line]


def test_a_dataset_that_cannot_be_sent_is_one_line(trained) -> None:
    assert trained[0]["unsendable"][1] == (
        "ConfigError: data.num_workers: the dataset of data.source cannot be sent to loader processes (TypeError: "
        "cannot pickle 'generator' object); set data.num_workers=0, or make the dataset one that pickle can send"
    )


def test_a_dataset_that_cannot_be_opened_there_is_an_error_here(trained) -> None:
    assert trained[0]["unopenable"][1] == (
        "LoadingError: data.source: the dataset cannot be opened in a loader process "
        "(FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'); set data.num_workers=0"
    )
