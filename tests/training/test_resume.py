"""A run cut in two reads the same samples and gives bit for bit the same losses as one that is not."""

import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import config, losses, sample_ids, train, train_and_print

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2_distributed_optimizer": (2, {"parallelism": {"use_distributed_optimizer": True}}),
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}  # so that the random generators' state matters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_equal_ten_and_ten(tmp_path: Path, layout: str) -> None:
    world_size, options = LAYOUTS[layout]
    common: dict[str, Any] = {"model": DROPOUT, "log": {"sample_ids": True}, **options}
    straight = config(tmp_path, name="straight", **common)
    halves = config(tmp_path, name="halves", **common)
    first_half = config(tmp_path, name="halves", **common, train={"exit_interval": 10})

    whole = run_distributed(train, world_size, straight)[0]
    first = run_distributed(train, world_size, first_half)[0]
    assert (first.status, first.step) == ("stopped", 10)
    second = run_distributed(train, world_size, halves)[0]

    assert (second.status, second.step) == ("done", 20)
    assert losses(second.lines) == losses(whole.lines)
    assert [line.get("grad_norm") for line in second.lines] == [line.get("grad_norm") for line in whole.lines]
    assert second.eval_loss == whole.eval_loss
    assert sample_ids(halves.run_dir) == sample_ids(straight.run_dir)
    assert [line["step"] for line in second.lines if "loss" in line] == list(range(1, 21))


def train_holding_the_tracker(run: Any) -> Any:
    """Its attention keeps the random state tracker it finds when it is made, as Transformer Engine's does."""
    from bridge.models.modules import core_attention

    make, current, held = core_attention.CoreAttention.__init__, core_attention.get_cuda_rng_tracker, []

    def made(*arguments: Any, **options: Any) -> None:
        held.append(current())
        make(*arguments, **options)

    core_attention.CoreAttention.__init__ = made  # type: ignore[method-assign]
    core_attention.get_cuda_rng_tracker = lambda: held[0]  # type: ignore[attr-defined]
    return train(run)


def test_dropout_of_a_held_tracker_goes_on_too(tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": {"attention_dropout": 0.3}, "train": {"steps": 6, "eval_interval": None}}
    whole = run_distributed(train_holding_the_tracker, 1, config(tmp_path, name="straight", **common))[0]
    common["train"]["exit_interval"] = 3
    for _ in range(2):
        halves = run_distributed(train_holding_the_tracker, 1, config(tmp_path, name="halves", **common))[0]
    assert halves.step == 6 and losses(halves.lines) == losses(whole.lines)


def test_resume_with_another_data_parallel_size_reads_the_same_samples(tmp_path: Path) -> None:
    common: dict[str, Any] = {"log": {"sample_ids": True}}
    straight = config(tmp_path, name="straight", **common)
    changed = config(tmp_path, name="changed", **common)

    whole = run_distributed(train, 1, straight)[0]
    run_distributed(train, 1, config(tmp_path, name="changed", **common, train={"exit_interval": 10}))
    (tmp_path / "changed" / "sample_ids").rename(tmp_path / "first_half")
    second = run_distributed(train, 2, changed)[0]

    assert losses(second.lines) == pytest.approx(losses(whole.lines), rel=2e-6)
    (one_rank,), two_ranks = sample_ids(straight.run_dir), sample_ids(changed.run_dir)
    per_step = [sorted(one_rank[start : start + 4]) for start in range(40, 80, 4)]
    assert [sorted(a + b) for a, b in zip(*(pairs(ids) for ids in two_ranks), strict=True)] == per_step


def pairs(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + 2] for start in range(0, len(ids), 2)]


def test_a_finished_run_is_done_at_once_and_keeps_its_metrics(tmp_path: Path) -> None:
    run = config(tmp_path)
    first = run_distributed(train, 1, run)[0]
    again = run_distributed(train, 1, run)[0]
    assert again == first


def train_and_signal(run: Any, number: int, told: int) -> Any:
    signal_when_a_step_is_logged(run, number, told)
    return train(run)


def signal_when_a_step_is_logged(run: Any, number: int, told: int) -> None:
    log = run.run_dir / "metrics.jsonl"

    def watch() -> None:
        while not log.is_file() or not log.read_text():
            time.sleep(0.01)
        if os.environ["RANK"] == str(told):  # all must stop at the same step
            os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(
    ("world_size", "number", "told"),
    [(1, signal.SIGUSR1, 0), (1, signal.SIGINT, 0), (2, signal.SIGTERM, 0), (2, signal.SIGUSR2, 1)],
)
def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path: Path, world_size: int, number: int, told: int) -> None:
    run = config(tmp_path, train={"steps": 2000})
    ranks = run_distributed(train_and_signal, world_size, run, number, told)
    assert {rank.status for rank in ranks} == {"stopped"}
    (step,) = {rank.step for rank in ranks}
    latest = run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert 0 < step < 2000 and latest.read_text() == str(step)


def train_signalled_while_built(run: Any, told: int) -> Any:
    from bridge.training import setup

    build = setup.build

    def signalled(*arguments: Any) -> Any:
        if os.environ["RANK"] == str(told):
            os.kill(os.getpid(), signal.SIGTERM)
        return build(*arguments)

    setup.build = signalled
    try:
        return train_and_print(run)
    finally:
        setup.build = build


def test_a_signal_before_the_first_step_stops_all_ranks_without_one(tmp_path: Path) -> None:
    run = config(tmp_path, train={"steps": 2000})
    ranks = run_distributed(train_signalled_while_built, 2, run, 1)
    assert {(rank.status, rank.step) for rank, _ in ranks} == {("stopped", 0)}
    assert "stopped at step 0 (SIGTERM); the same command begins again" in ranks[0][1]
    assert not (run.run_dir / "checkpoints").exists()


def test_a_signal_while_data_is_prepared_is_answered_at_once_and_loses_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from bridge.data.encode import corpus, sharding, tokenizer
    from bridge.errors import Stopped
    from bridge.training.stop import Stop

    monkeypatch.setattr(sharding, "SMALLEST", 400)
    documents = [f"def f{n}(x):\n    return x + {n}\n" * 9 for n in range(40)]
    tokenizer.save(tokenizer.train(documents, vocab_size=300), tmp_path / "tokenizer")

    def interrupting() -> Iterator[str]:
        """A Ctrl-C comes when half of them is read."""
        for number, document in enumerate(documents):
            if number == 20:
                signal.raise_signal(signal.SIGINT)
            yield document

    def tokenise(texts: Callable[[], Iterable[str]]) -> Path:
        size = sum(map(len, documents))
        made = corpus.Corpus("t", "test", identity="1", size=size, texts=texts, to_learn_from=texts)
        options = corpus.Options(300, tmp_path / "tokenizer", num_processes=2)
        return Path(corpus.tokenise([made], options, cache=tmp_path).prefixes[0]).parent

    stop = Stop(config(tmp_path).train, started=0.0)
    with stop.listening(), pytest.raises(Stopped), stop.leaving_at_once():
        tokenise(interrupting)
    assert stop.received == signal.SIGINT
    assert not list(tmp_path.glob("t-*[!k]"))  # no entry that looks whole
    assert [path.name for path in tokenise(lambda: documents).iterdir()] == ["tokens.bin", "tokens.idx"]
    assert re.search(r"data: \d+ finished shards of an earlier start were kept", capsys.readouterr().out)


def test_usr2_is_left_to_a_launcher_that_listens_to_it() -> None:
    from bridge.training.stop import Stop

    def launchers(*_: Any) -> None: ...

    before = signal.signal(signal.SIGUSR2, launchers)
    try:
        with Stop(config(Path("runs")).train, started=0.0).listening():
            assert signal.getsignal(signal.SIGUSR2) is launchers
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def train_in_turn(configs: list[Any]) -> list[tuple[Any, str]]:
    """Each config's run and what it printed, in one world."""
    import torch

    from bridge import parallel
    from bridge.platform import prepare

    prepare()
    parallel.teardown = functools.partial(parallel.teardown, keep_world=True)
    torch.distributed.init_process_group("gloo")
    return [train_and_print(run) for run in configs]


def test_without_saves_nothing_is_kept_and_a_stopped_run_begins_again(tmp_path: Path) -> None:
    from bridge.training import metrics

    limit = {"train": {"steps": 2000, "exit_after": "1s"}}
    stopped = config(tmp_path, name="stopped", checkpoint={"save": False}, log={"log_interval": 1000}, **limit)
    straight = config(tmp_path, name="straight", train={"steps": 4})
    whole = config(tmp_path, name="whole", train={"steps": 4}, checkpoint={"save": False})
    longer = config(tmp_path, name="straight", checkpoint={"save": False}, **limit)
    (one, said), (saved, _), (unsaved, _), (two, then) = run_distributed(
        train_in_turn, 1, [stopped, straight, whole, longer]
    )[0]

    assert (one.status, unsaved.status, two.status) == ("stopped", "done", "stopped")
    assert f"stopped at step {one.step} (train.exit_after=1s), not saved (checkpoint.save=false); the same" in said
    assert said.endswith("the same command begins again\n") and then.endswith("the same command resumes at step 4\n")
    assert [line["step"] for line in one.lines if "loss" in line] == list(range(1, one.step + 1))
    assert losses(unsaved.lines) == losses(saved.lines) and unsaved.eval_loss == saved.eval_loss
    assert not [line for line in metrics.read(whole.run_dir) if "saved_step" in line]
    assert not (stopped.run_dir / "checkpoints").exists() and not (whole.run_dir / "checkpoints").exists()
    latest = straight.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert latest.read_text() == "4" and two.step > 4


def test_a_time_limit_saves_and_stops(tmp_path: Path) -> None:
    run = config(tmp_path, train={"steps": 2000, "exit_after": "1s"})
    result = run_distributed(train, 1, run)[0]
    assert result.status == "stopped" and result.step < 2000
    assert (run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(result.step)
