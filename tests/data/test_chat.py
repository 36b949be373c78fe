"""Which tokens of a conversation are trained, by hand; the sources that read them, and what they say."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from bridge.data import chat as source
from bridge.data import instruct, tuning
from bridge.data.encode import chat, conversation, sharding, templates
from bridge.data.encode.masks import Counts, Rules
from bridge.data.readers import files
from bridge.data.readers.reader import Row
from bridge.data.samples.store import Store
from bridge.errors import ConfigError
from tests.data import chat_tokenizer

Q, A = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Paris."}
TALK = [Q, A, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "France."}]


def _trained(tmp_path: Path, record: Any, *, template: str = chat_tokenizer.PLAIN, **rules: Any) -> list[Any]:
    """(text, weight) of the trained runs of tokens, one list a sample."""
    loaded = templates.load(chat_tokenizer.save(tmp_path / "tokenizer", template), file=None, arguments={})
    record = {"messages": record} if isinstance(record, list) else record
    talk = conversation.conversation(record, names=conversation.Names())
    row = Row(record, "f.jsonl", 1)
    found = []
    for sample in chat.encode(talk, loaded, row=row, rules=Rules(**rules), counts=Counts()):
        runs: list[Any] = []
        for before, token, weight in zip([0, *sample.weights], sample.tokens, sample.weights, strict=False):
            if weight and weight == before:
                runs[-1][0].append(token)
            elif weight:
                runs.append(([token], weight))
        found.append([(loaded.tokenizer.decode(tokens), weight) for tokens, weight in runs])
    return found


def test_answers_and_their_end_are_trained(tmp_path: Path):
    assert _trained(tmp_path, TALK) == [[("Paris.<|im_end|>", 1), ("France.<|im_end|>", 1)]]


def test_the_end_of_the_text_is_no_end_of_a_turn(tmp_path: Path):
    expected = [[("Paris.<|im_end|>", 1), ("France.<|im_end|>", 1)]]
    assert _trained(tmp_path, TALK, template=chat_tokenizer.ENDING) == expected


@pytest.mark.parametrize("template", [chat_tokenizer.MARKING, chat_tokenizer.MARKING_MORE])
def test_a_template_that_marks_is_believed_between_prompt_and_end(tmp_path: Path, template: str):
    assert _trained(tmp_path, TALK, template=template) == [[("Paris.<|im_end|>", 1), ("France.<|im_end|>", 1)]]


def test_an_answer_comes_after_what_it_was_asked_with(tmp_path: Path):
    """A template that moves the system message to the last question does not show it before an answer."""
    talk = [{"role": "system", "content": "Hello, "}, *TALK]
    expected = [[("Paris.<|im_end|>", 1)], [("France.<|im_end|>", 1)]]
    assert _trained(tmp_path, talk, template=chat_tokenizer.MOVING) == expected


def test_white_space_before_an_answer_belongs_to_the_prompt(tmp_path: Path):
    """A post-processor may say that a token of white space begins where it ends, which is where the answer begins."""
    loaded = templates.load(chat_tokenizer.save(tmp_path), file=None, arguments={})
    trimming = tokenizers.processors.ByteLevel(trim_offsets=True)
    loaded.tokenizer.backend_tokenizer.post_processor = trimming
    trimmed = loaded.tokens("a\n Paris").starts
    again = templates.Template(loaded.tokenizer).tokens("a\n Paris")
    assert trimmed != again.starts
    texts = [loaded.tokenizer.decode(token) for token in again.ids]
    assert again.starts == [sum(map(len, texts[:number])) for number in range(len(texts))]


@pytest.mark.parametrize(
    ("rewritten", "expected"),
    [
        ("split", [[("<think>a</think>Paris.<|im_end|>", 1)], [("<think>b</think>France.<|im_end|>", 1)]]),
        ("last", [[("<think>b</think>France.<|im_end|>", 1)]]),
    ],
)
def test_rewritten_history(tmp_path: Path, rewritten: str, expected: Any):
    talk = [Q, {**A, "thinking": "a"}, TALK[2], {**TALK[3], "thinking": "b"}]
    assert _trained(tmp_path, talk, template=chat_tokenizer.REWRITING, rewritten=rewritten) == expected


def test_rewritten_history_can_be_an_error(tmp_path: Path):
    with pytest.raises(templates.InvalidRow, match="rewrites earlier answers"):
        _trained(tmp_path, TALK, template=chat_tokenizer.REWRITING, rewritten="error")


@pytest.mark.parametrize(
    ("messages", "rules", "expected"),
    [
        (TALK, {"train_on": "last"}, [("France.<|im_end|>", 1)]),
        ([Q, {**A, "train": False}, *TALK[2:]], {}, [("France.<|im_end|>", 1)]),
        ([Q, {**A, "weight": 0.5}, *TALK[2:]], {}, [("Paris.<|im_end|>", 0.5), ("France.<|im_end|>", 1)]),
        ([{**Q, "train": True}, A], {}, [("Hello<|im_end|>", 1), ("Paris.<|im_end|>", 1)]),
        ([Q, A], {"roles": ("user",)}, [("Hello<|im_end|>", 1)]),
    ],
)
def test_what_is_trained_can_be_chosen(tmp_path: Path, messages: Any, rules: Any, expected: Any):
    assert _trained(tmp_path, messages, **rules) == [expected]


@pytest.mark.parametrize("template", ["PLAIN", "ENDING", "MARKING_MORE", "MOVING"])
def test_everything_but_the_generation_prompts(tmp_path: Path, template: str):
    talk = [{"role": "system", "content": "and "}, *TALK] if template == "MOVING" else TALK
    before = "<|im_start|>user\nHello<|im_end|>\n"
    between = "Paris.<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n"
    end = "<|endoftext|>" if template == "ENDING" else ""
    expected = [(before, 1), (between, 1), (f"France.<|im_end|>\n{end}", 1)]
    assert _trained(tmp_path, talk, template=getattr(chat_tokenizer, template), train_on="all") == [expected]


def test_everything_but_one_message(tmp_path: Path):
    ((first, last),) = _trained(tmp_path, [Q, {**A, "train": False}, TALK[2]], train_on="all")
    assert first == ("<|im_start|>user\nHello<|im_end|>\n", 1)
    assert last == ("\n<|im_start|>user\nand then?<|im_end|>\n", 1)


def test_parts_have_weights_of_their_own(tmp_path: Path):
    parts = [{"type": "text", "text": "Paris", "weight": 0}, {"type": "text", "text": ".", "weight": 0.5}]
    assert _trained(tmp_path, [Q, {**A, "content": parts}]) == [[(".", 0.5), ("<|im_end|>", 1)]]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Paris."}]},
        {"messages": json.dumps([Q, A])},
        {"messages": [Q, A], "tools": "", "template_arguments": ""},
    ],
)
def test_other_names(tmp_path: Path, record: Any):
    assert _trained(tmp_path, record) == [[("Paris.<|im_end|>", 1)]]


def _write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Any]:
    def prepare(records: list[Any], *, module: Any = source, template: str | None = chat_tokenizer.PLAIN, **keys: Any):
        tokenizer = chat_tokenizer.save(tmp_path / "tokenizer", template)
        path = _write(tmp_path / "rows.jsonl", records)
        config = module.Config(**{"path": path, "tokenizer": str(tokenizer), "sequence_length": 64} | keys)
        module.check(config)
        made = module.prepare(config, cache=tmp_path / "cache", seed=1)
        return made, module.build(config, made, seed=1)

    return prepare


def test_one_line_of_statistics_and_a_share_held_out(prepared: Any, capsys: Any):
    made, datasets = prepared([{"messages": TALK}] * 40)
    store = Store(made.directory / "train-0")
    share = sum(sample.weights[1:].sum() for sample in map(store.__getitem__, range(40))) / store.lengths.sum()
    line = capsys.readouterr().out.strip().split("\n")[-1]
    assert line.endswith(f"40 samples of 40 rows, {store.lengths.sum():,} tokens, {share:.1%} trained")
    assert (len(datasets.train), len(datasets.valid)) == (38, 2)
    item, sample = datasets.train[0], store[0]
    positions = len(sample.tokens) - 1
    assert item["labels"][:positions].tolist() == sample.tokens[1:].tolist()
    assert item["loss_mask"][:positions].tolist() == sample.weights[1:].tolist()


def test_rows_of_one_conversation_stay_together(prepared: Any):
    talk = [Q, {**A, "thinking": "a"}, TALK[2], {**TALK[3], "thinking": "b"}]
    made, datasets = prepared([{"messages": talk}] * 20, template=chat_tokenizer.REWRITING, sequence_length=128)
    assert (len(datasets.train), len(datasets.valid)) == (38, 2)
    assert len({made.directory, *datasets.valid.ids}) == 3 and {*datasets.valid.ids} == {38, 39}


@pytest.mark.parametrize(("policy", "samples"), [("truncate", 1), ("drop", 0), ("split", None)])
def test_over_long(prepared: Any, capsys: Any, policy: str, samples: int | None):
    long = {"messages": [Q, {**A, "content": "Paris. " * 40}]}
    made, _ = prepared([{"messages": [Q, A]}, long], too_long=policy, split="100,0")
    store = Store(made.directory / "train-0")
    whole, _ = prepared([{"messages": [Q, A]}, long], sequence_length=4096, split="100,0")
    complete = Store(whole.directory / "train-0")[1]
    assert f"1 over-long ({policy}" in capsys.readouterr().out
    pieces = [store[number] for number in range(1, len(store))]
    if samples is None:  # every token is predicted once, with its weight
        assert [t for piece in pieces for t in piece.tokens[1:]] == complete.tokens[1:].tolist()
        assert [w for piece in pieces for w in piece.weights[1:]] == complete.weights[1:].tolist()
    else:
        assert [piece.tokens.tolist() for piece in pieces] == [complete.tokens[:65].tolist()] * samples


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"messages": [Q]}, r"rows.jsonl:2: nothing in it is trained"),
        ({"messages": []}, r"rows.jsonl:2: it has no messages"),
        (
            {"message": [Q]},
            r"rows.jsonl:2: it has no messages or conversations.*; did you mean|rows.jsonl:2: it has no",
        ),
        ({"messages": [{"role": "user"}]}, r"rows.jsonl:2: message 1 has no content"),
        ({"messages": [{**Q, "role": "usr"}, A]}, r"rows.jsonl:2: message 1 has the role usr; did you mean 'user'"),
        ({"messages": [Q, {**A, "content": ""}]}, r"rows.jsonl:2: message 2 is an empty answer"),
        ({"messages": [Q, {**A, "weight": -1}]}, r"rows.jsonl:2: message 2 has the weight -1"),
        ({"messages": [Q, {**A, "content": "Paris " * 99}]}, r"data.too_long: .*rows.jsonl:2 has \d+ tokens"),
    ],
)
def test_a_row_that_is_wrong_is_named(prepared: Any, record: Any, fault: str):
    with pytest.raises(ConfigError, match=fault):
        prepared([{"messages": TALK}, record])


def test_a_role_of_one_s_own_is_declared(prepared: Any):
    talk = [{**Q, "role": "Kunde"}, {**A, "role": "Bot"}]
    declared, _ = prepared([{"messages": talk}], roles={"Kunde": "user", "Bot": "assistant"})
    usual, _ = prepared([{"messages": [Q, A]}])
    ours, theirs = (Store(made.directory / "train-0")[0] for made in (declared, usual))
    assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.weights.tolist() == theirs.weights.tolist()
    with pytest.raises(ConfigError, match="data.roles_to_train: asistant is no role"):
        prepared([{"messages": [Q, A]}], roles_to_train=["asistant"])


def test_wrong_rows_can_be_dropped(prepared: Any, capsys: Any):
    made, _ = prepared([{"messages": TALK}, {"messages": [Q]}, {"text": "x"}], invalid="drop")
    assert len(Store(made.directory / "train-0")) == 1
    assert "2 invalid rows dropped (first " in capsys.readouterr().out


ALPACA = {"instruction": "what", "input": "France", "output": "Paris.", "history": [["Hello", "and"]], "system": "then"}
SQUAD = {"context": "France", "question": "what?", "answers": {"text": ["Paris.", "x"], "answer_start": [0, 1]}}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            ALPACA,
            "<|im_start|>system\nthen<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nand"
            "<|im_end|>\n<|im_start|>user\nwhat\nFrance<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n",
        ),
        (SQUAD, "<|im_start|>user\nFrance\nwhat?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"),
        (
            {"prompt": [Q], "completion": [A]},
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n",
        ),
    ],
)
def test_prompts_and_answers(prepared: Any, record: Any, text: str):
    from transformers import AutoTokenizer

    made, _ = prepared([record], module=instruct, split="100,0", sequence_length=512)
    sample = Store(made.directory / "train-0")[0]
    assert AutoTokenizer.from_pretrained(made.tokenizer).decode(sample.tokens) == text


def test_a_written_prompt(prepared: Any):
    from transformers import AutoTokenizer

    record = {"prompt": "what?", "completion": "Paris."}
    made, _ = prepared([record], module=instruct, split="100,0", template=None, prompt="Q: {prompt}\nA: ")
    sample = Store(made.directory / "train-0")[0]
    tokenizer = AutoTokenizer.from_pretrained(made.tokenizer)
    assert tokenizer.decode(sample.tokens) == "Q: what?\nA: Paris.<|endoftext|>"
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "Paris.<|endoftext|>"


def test_named_evaluation_sets(prepared: Any, tmp_path: Path):
    news, code = (_write(tmp_path / f"{name}.jsonl", [{"messages": TALK}] * n) for name, n in (("a", 3), ("b", 2)))
    _, datasets = prepared([{"messages": TALK}] * 4, eval={"news": news, "code": code})
    assert len(datasets.train) == 4
    assert {name: len(rows) for name, rows in datasets.valid.items()} == {"news": 3, "code": 2}


def test_shares_of_rows():
    import numpy

    training, validation = tuning.held_out(numpy.arange(100), "90,5,5")
    assert (training.sum(), validation.sum(), (training & validation).sum()) == (90, 5, 0)


def _many(folder: Path) -> str:
    """300 rows in two files: one in 50 is invalid, one in 40 over-long."""
    talks = [[Q, {**A, "content": f"Paris {n}. " * (40 if n % 40 == 17 else 1)}, *TALK] for n in range(300)]
    talks[9::50] = [[Q]] * len(talks[9::50])
    found = [{"messages": talk} for talk in talks]
    folder.mkdir()
    for name, part in (("a", found[:175]), ("b", found[175:])):
        _write(folder / f"{name}.jsonl", part)
    return str(folder)


def _keys(folder: Path, path: str, num_processes: int) -> dict[str, Any]:
    tokenizer = str(folder / "tokenizer")
    more = {"too_long": "split", "invalid": "drop", "split": "100,0", "num_processes": num_processes}
    return {"path": path, "tokenizer": tokenizer, "sequence_length": 96, **more}


KILLED = """
import sys
from pathlib import Path
from bridge.data import chat
from bridge.data.encode import sharding
from tests.data.test_chat import _keys

sharding.SMALLEST = 1000
chat.prepare(chat.Config(**_keys(Path(sys.argv[1]), sys.argv[2], 2)), cache=Path(sys.argv[3]), seed=1)
"""


@pytest.mark.usefixtures("warm_processes")
def test_two_processes_and_a_kill_leave_what_one_leaves(tmp_path: Path, monkeypatch: Any, capsys: Any):
    chat_tokenizer.save(tmp_path / "tokenizer")
    path = _many(tmp_path / "rows")
    straight = source.prepare(source.Config(**_keys(tmp_path, path, 1)), cache=tmp_path / "straight", seed=1).directory
    line = capsys.readouterr().out
    assert "of 300 rows" in line and "6 invalid rows dropped (first " in line and " over-long (split)" in line
    assert f"{path}/a.jsonl:10: nothing in it is trained" in line
    stored = Store(straight / "train-0")
    where = [(Path(stored[n].file).name, stored[n].line) for n in range(len(stored))]
    assert where == sorted(where) and len({*where}) == 294 < len(where)

    command = [sys.executable, "-c", KILLED, str(tmp_path), path, str(tmp_path / "killed")]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("killed/.chat-*/train-0-shards/??????"))) < 3:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    first.kill()
    first.wait()
    monkeypatch.setattr(sharding, "SMALLEST", 1000)
    monkeypatch.setattr(sharding, "INTERVAL", 0.0)
    monkeypatch.setattr(files, "READ", 256)
    config = source.Config(**_keys(tmp_path, path, 2))
    resumed = source.prepare(config, cache=tmp_path / "killed", seed=1).directory
    out = capsys.readouterr().out
    assert " finished shards of an earlier start were kept" in out and out.endswith(line)
    assert "samples/s" in out and "tokens/s" in out and " left" in out

    def content(entry: Path) -> dict[str, bytes]:
        return {str(file.relative_to(entry)): file.read_bytes() for file in entry.rglob("*") if file.is_file()}

    assert content(resumed) == content(straight) and resumed.name == straight.name
    for number in (
        1,
        2,
    ):  # the second process meets an over-long row before the first has come to that which is invalid
        strict = source.Config(**_keys(tmp_path, path, number) | {"invalid": "error", "too_long": "error"})
        with pytest.raises(ConfigError, match=rf"^data.path: {path}/a.jsonl:10: nothing in it is trained; mend"):
            source.prepare(strict, cache=tmp_path, seed=1)
    assert not [*tmp_path.glob(".chat-*")]
