"""A record with a prompt and its answer becomes a conversation, or one text that a written prompt begins."""

import string
from collections.abc import Mapping
from typing import Any

from bridge.data.encode.conversation import Conversation, Message, Names, arguments_of, message, parsed, tools_of
from bridge.data.encode.encoded import Encoded
from bridge.data.encode.templates import InvalidRow, Template
from bridge.data.readers.reader import Row

# What a column is called, the first name that a record has; data.columns names another.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "query", "question"),
    "completion": ("completion", "output", "response", "answers", "answer"),
    "input": ("input", "context"),
    "system": ("system",),
    "history": ("history",),
}


def conversation(record: Any, *, names: Names) -> Conversation:
    """prompt and completion, Alpaca's instruction, input, output and history, or question, context and answers.

    Raises InvalidRow.
    """
    if not isinstance(record, Mapping):
        raise InvalidRow("it is no record with fields")
    prompt, completion = _needed(record, "prompt", names), _needed(record, "completion", names)
    if isinstance(prompt, list):  # of messages
        said = [message(each, number, names=names)._replace(weight=0.0) for number, each in enumerate(prompt, 1)]
    else:
        given = _text(_find(record, "input", names) or "", "input")
        # A question comes after what it is about, an instruction before.
        context = _column(record, "input", names) == "context"
        asked = _text(prompt, "prompt")
        said = [_turn("user", "\n".join(filter(None, [given, asked] if context else [asked, given])), 0.0)]
    answer = _answer(completion)
    if isinstance(answer, list):
        said += [message(each, len(said) + number, names=names) for number, each in enumerate(answer, 1)]
    else:
        said.append(_turn("assistant", answer))
    before = [_turn(role, text) for pair in _history(record, names) for role, text in zip(_ROLES, pair, strict=True)]
    if system := _find(record, "system", names):
        before.insert(0, _turn("system", _text(system, "system")))
    return Conversation([*before, *said], tools_of(record, names), arguments_of(record, names))


_ROLES = ("user", "assistant")


def written(record: Any, prompt: str, template: Template, *, names: Names, row: Row) -> Encoded:
    """`prompt`, with a record's columns in its {braces}, then what is trained: the answer and the end-of-text token."""
    if not isinstance(record, Mapping):
        raise InvalidRow("it is no record with fields")
    answer = _answer(_needed(record, "completion", names))
    if not isinstance(answer, str):
        raise InvalidRow("its completion is no text, which data.prompt needs")
    columns = [name for _, name, _, _ in string.Formatter().parse(prompt) if name]
    missing = [name for name in columns if name not in record]
    if missing:
        raise InvalidRow(f"it has no {missing[0]}, which data.prompt asks for; it has {', '.join(map(str, record))}")
    asked = prompt.format_map({name: "" if record[name] is None else record[name] for name in columns})
    # Apart, as the model sees the prompt when it is used: no token begins in one and ends in the other.
    before, after = template.tokens(asked, special=True).ids, template.tokens(answer).ids
    end = template.tokenizer.eos_token_id
    before = before[:-1] if before and before[-1] == end else before
    after = after if end is None else [*after, end]
    return Encoded([*before, *after], [0.0] * len(before) + [1.0] * len(after), row.file, row.line)


def _turn(role: str, text: str, weight: float | None = None) -> Message:
    return Message({"role": role, "content": text}, weight)


def _column(record: Mapping[str, Any], name: str, names: Names) -> str | None:
    given = names.columns.get(name)
    return next((each for each in ([given] if given else COLUMNS[name]) if each in record), None)


def _find(record: Mapping[str, Any], name: str, names: Names) -> Any:
    column = _column(record, name, names)
    return None if column is None else _parsed_list(record[column])


def _parsed_list(value: Any) -> Any:
    """Lists and objects that a table holds as JSON text; any other text as it is."""
    found = parsed(value)
    return found if isinstance(found, list) and all(isinstance(each, list | Mapping) for each in found) else value


def _needed(record: Mapping[str, Any], name: str, names: Names) -> Any:
    value = _find(record, name, names)
    if value is None:
        known = [names.columns[name]] if name in names.columns else COLUMNS[name]
        has = ", ".join(map(str, record)) or "nothing"
        raise InvalidRow(f"it has no {' or '.join(known)}, only {has}; set data.columns={{{name}: NAME}}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow(f"its {name} is {value!r:.60}, no text")
    return value


def _answer(completion: Any) -> str | list[Any]:
    """The answer; of SQuAD's answers the first."""
    if isinstance(completion, Mapping):
        texts = completion.get("text")
        texts = [texts] if isinstance(texts, str) else list(texts) if texts is not None else []
        completion = texts[0] if texts else ""
    if isinstance(completion, list) and completion and isinstance(completion[0], Mapping):
        return completion
    if not isinstance(completion, str) or not completion:
        raise InvalidRow("its completion is empty" if not completion else f"its completion is {completion!r:.60}")
    return completion


def _history(record: Mapping[str, Any], names: Names) -> list[tuple[str, str]]:
    pairs = _find(record, "history", names)
    if pairs is None or pairs == "":
        return []
    try:
        return [(_text(asked, "history"), _text(answer, "history")) for asked, answer in pairs]
    except (TypeError, ValueError) as error:
        raise InvalidRow(f"its history is {pairs!r:.60}, no list of [prompt, answer]") from error
