"""Which characters of a rendered conversation are trained: those that the model writes when it is used.

An answer begins where the template, rendered up to it with the generation prompt, ends, and goes on to its end-of-turn
token. A template that marks what is generated is believed. A template that writes a turn otherwise once others follow
has rewritten history: then no one text shows every answer as the model gives it, and each is a text of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bridge.data.encode.conversation import Conversation, Message
from bridge.data.encode.templates import InvalidRow, Template

BORDER = "\ue000"  # of Unicode's private use: stands where two parts of a content meet
_ALIKE = 8  # characters before an answer that are the same in two texts with it


class Span(NamedTuple):
    """Characters from start to end, and how much predicting their tokens counts."""

    start: int
    end: int
    weight: float


class Turn(NamedTuple):
    """A trained message at the end of `text`, the conversation up to it."""

    number: int
    text: str
    spans: list[Span]

    @property
    def end(self) -> int:
        return max((span.end for span in self.spans), default=0)


class Marked(NamedTuple):
    text: str
    spans: list[Span]


@dataclass(frozen=True)
class Rules:
    """train_on: assistant, last or all. roles: whose messages are trained. rewritten: split, last or error."""

    train_on: str = "assistant"
    roles: tuple[str, ...] = ("assistant",)
    rewritten: str = "split"


@dataclass
class Counts:
    """What happened on the way, for the line of statistics."""

    rewritten: int = 0
    """Conversations whose history the template rewrites."""
    unasked: int = 0
    """Answers at the beginning, for which the template has no prompt."""
    endless: int = 0
    """Trained answers without an end-of-turn token."""
    dates: set[str] = field(default_factory=set)


def marked(talk: Conversation, template: Template, *, rules: Rules, counts: Counts) -> list[Marked]:
    """The texts to train on, and where. Raises InvalidRow."""
    view = _View(talk, template)
    whole = view.render(len(talk.messages))
    if date := template.date_in(whole):
        counts.dates.add(date)
    turns = []
    for number, weight in _weights(talk.messages, rules).items():
        turn = view.turn(number, weight, counts)
        turns += [] if turn is None else [turn]
    everything = [Span(0, len(whole), 1.0), *view.prompts(whole)] if rules.train_on == "all" else []
    if all(whole.startswith(turn.text[: turn.end]) for turn in turns):
        spans = [span for turn in turns for span in _with_stop(whole, turn, template, counts)]
        return [Marked(whole, everything + spans)]
    counts.rewritten += 1
    if everything:
        raise InvalidRow("the template rewrites earlier messages, so that their own weights have no place in the text")
    if rules.rewritten == "error":
        raise InvalidRow("the template rewrites earlier answers; set data.rewritten_history=split or last")
    chosen = turns[-1:] if rules.rewritten == "last" else turns
    return [Marked(turn.text, _with_stop(turn.text, turn, template, counts)) for turn in chosen]


def _weights(messages: Sequence[Message], rules: Rules) -> dict[int, float]:
    """The weight of each message to be told apart, by its number."""
    trained = [number for number, each in enumerate(messages) if each.value["role"] in rules.roles]
    trained = {"last": trained[-1:], "all": []}.get(rules.train_on, trained)
    weights = dict.fromkeys(trained, 1.0)
    for number, each in enumerate(messages):
        if each.weight is not None:
            weights[number] = each.weight
        elif any(weight for _, weight in each.parts):
            weights.setdefault(number, 0.0)
    told_apart = rules.train_on == "all"
    parts = {number for number, each in enumerate(messages) if any(weight is not None for _, weight in each.parts)}
    if told_apart:
        weights |= {number: weights.get(number, 1.0) for number in parts}
    return {
        number: weights[number]
        for number in sorted(weights)
        if weights[number] or number in parts or (told_apart and messages[number].weight is not None)
    }


def _with_stop(text: str, turn: Turn, template: Template, counts: Counts) -> list[Span]:
    """The spans of a turn; without an end of its own, with the next turn's first token, if that stops a model."""
    last = max(turn.spans, key=lambda span: span.end)
    before = text[: last.end]
    if template.trailing(before)[-1:] == [last.end]:
        return turn.spans
    length = template.stop_at(text, last.end)
    counts.endless += length == 0
    return [*turn.spans, Span(last.end, last.end + length, last.weight)] if length else turn.spans


class _View:
    """The messages as this template takes them, and their renderings."""

    def __init__(self, talk: Conversation, template: Template) -> None:
        self.talk, self.template = talk, template
        self.messages = [_fitted(each.value, template) for each in talk.messages]
        self.marks = template.marks_answers(talk.tools)

    def render(self, number: int, *, prompt: bool = False, messages: Sequence[Any] | None = None) -> str:
        """The first `number` messages as text."""
        shown = self.messages[:number] if messages is None else messages
        return self.template.render(shown, tools=self.talk.tools, arguments=self.talk.arguments, prompt=prompt)

    def turn(self, number: int, weight: float, counts: Counts) -> Turn | None:
        """What is trained of one message; None for an answer that no prompt asks for."""
        text = self.render(number + 1)
        message = self.talk.messages[number]
        if message.value["role"] != "assistant":
            spans = [Span(self._content_start(number, text), self._end(number, text), weight)]
        else:
            try:
                prompt = self.render(number, prompt=True)
            except InvalidRow:
                if number:
                    raise
                prompt = ""
            if not prompt and not self.marks:
                counts.unasked += 1
                return None
            if self.marks:
                spans = self._generated(number, text, prompt, weight)
            else:
                rest = len(text) - self._end(number, text)
                text = self._asked_by(number, prompt, text)
                spans = [Span(len(prompt), len(text) - rest, weight)]
        for call in message.value.get("tool_calls", []):
            if not any(call["function"]["name"] in text[span.start : span.end] for span in spans):
                raise InvalidRow(f"the template leaves out the tool call of message {number + 1}; set data.template")
        if any(own is not None for _, own in message.parts):
            spans = self._by_part(number, text, spans)
        return Turn(number, text, spans) if spans else None

    def prompts(self, whole: str) -> list[Span]:
        """The generation prompts in `whole`, all messages as text: spans of weight 0, since no model writes them."""
        spans = []
        for number, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            before = self.render(number) if number else ""
            try:
                prompt = self.render(number, prompt=True)
            except InvalidRow:  # the template has no prompt before any message
                continue
            start, end = (self._alike(prompt, other) for other in (before, whole))
            asks = prompt[start:]
            if asks and end < len(prompt):  # something is written otherwise there
                content = self._content(number, whole, len(self.messages))
                if content is not None and whole[:content].endswith(asks):
                    start, end = content - len(asks), content
                elif content is not None:
                    end = min(end, content)
            if end > start:
                spans.append(Span(start, end, 0.0))
        return spans

    def _alike(self, text: str, other: str) -> int:
        """How many characters of `text` there are in whole tokens that `other` begins with, too."""
        if text.startswith(other) or other.startswith(text):
            return min(len(text), len(other))
        tokens, others = self.template.tokens(text), self.template.tokens(other).ids
        pairs = enumerate(zip(tokens.ids, others, strict=False))
        differing = (tokens.starts[at] for at, (one, another) in pairs if one != another)
        return next(differing, min(len(text), len(other)))

    def _asked_by(self, number: int, prompt: str, text: str) -> str:
        """`text`, which ends in an answer, as it goes on from `prompt`.

        A template may show what comes before otherwise once it is answered, as Mistral's, whose system message goes to
        the last question. The answer as it is then comes after the prompt.
        """
        if text.startswith(prompt):
            return text
        before, start = self.render(number), self._content(number, text, number + 1)
        asks = prompt[len(before) :] if prompt.startswith(before) else ""
        if start is not None and text[:start].endswith(asks or prompt[-_ALIKE:]):
            return prompt + text[start:]
        at = next(at for at, (a, b) in enumerate(zip(prompt, text + "\0", strict=False)) if a != b)
        raise InvalidRow(
            f"the template begins an answer with {prompt[at - 20 if at > 20 else 0 :]!r}, but writes message "
            f"{number + 1} as {text[max(at - 20, 0) : at + 40]!r}; set data.template_arguments (such as "
            "{enable_thinking: false}) or data.template to one that keeps the answer whole"
        )

    def _generated(self, number: int, text: str, prompt: str, weight: float) -> list[Span]:
        """What the template marks in this message: the marks that are not there without it.

        The generation prompt is left out, and so is what comes after the end-of-turn token, if it is marked or not.
        """
        tools, arguments = self.talk.tools, self.talk.arguments
        before, found = (
            self.template.generated(self.messages[:count], tools=tools, arguments=arguments) if count else []
            for count in (number, number + 1)
        )
        first, last = len(prompt) if text.startswith(prompt) else 0, self._end(number, text)
        marks = [(max(start, first), min(end, last)) for start, end in found[len(before) :]]
        marks = [(start, end) for start, end in marks if end > start]
        return [Span(start, end, weight) for start, end in marks]

    def _end(self, number: int, text: str) -> int:
        """The end of the turn at the end of `text`: after its end-of-turn token, without what follows that."""
        ends = self.template.trailing(text)
        if len(ends) < 2:
            return ends[0] if ends else len(text.rstrip())
        try:  # a template may end the text, too, which it does not in the middle of a conversation
            further = self.render(0, messages=[*self.messages[: number + 1], {"role": "user", "content": "x"}])
        except InvalidRow:
            return ends[-1]
        return next((end for end in reversed(ends) if further.startswith(text[:end])), ends[-1])

    def _content_start(self, number: int, text: str) -> int:
        """Where the content of a message that no prompt precedes begins; else where the message does."""
        start = self._content(number, text, number + 1)
        if start is not None:
            return start
        before = self.render(number) if number else ""
        return len(before) if text.startswith(before) else 0

    def _content(self, number: int, text: str, count: int) -> int | None:
        """Where the content of a message begins in `text`, the first `count` of them; None where it changes."""
        content = self.messages[number].get("content")
        if not isinstance(content, str) or not content:
            return None
        changed = {**self.messages[number], "content": BORDER + content}
        tried = self.render(0, messages=[*self.messages[:number], changed, *self.messages[number + 1 : count]])
        return tried.index(BORDER) if BORDER in tried and tried.replace(BORDER, "") == text else None

    def _by_part(self, number: int, text: str, spans: list[Span]) -> list[Span]:
        """`spans`, cut where the parts of the content end. A part's weight is multiplied by that of a trained message.

        What comes after the parts, as the end of the turn, has the message's weight.
        """
        parts = self.talk.messages[number].parts
        borders = [0, *self._borders(number, text), len(text)]
        factors = [1.0 if own is None else own for _, own in parts] + [1.0]
        factors = factors[: len(borders) - 1]  # without a border after the last part, it has the end of the turn, too
        owns = [own for _, own in parts] + [None]
        return [
            Span(max(start, span.start), min(end, span.end), factor * (1.0 if own and not span.weight else span.weight))
            for span in spans
            for start, end, factor, own in zip(borders, borders[1:], factors, owns, strict=False)
            if max(start, span.start) < min(end, span.end)
        ]

    def _borders(self, number: int, text: str) -> list[int]:
        """Where in `text` the parts of a message end; that of the last is left out if the template strips it."""
        texts = [piece for piece, _ in self.talk.messages[number].parts]
        content = self.messages[number]["content"]
        for after in (len(texts), len(texts) - 1):
            pieces = [piece + BORDER * (at < after) for at, piece in enumerate(texts)]
            as_is = isinstance(content, str)
            marked = "".join(pieces) if as_is else [{"type": "text", "text": each} for each in pieces]
            tried = self.render(0, messages=[*self.messages[:number], {**self.messages[number], "content": marked}])
            if tried.replace(BORDER, "") == text and tried.count(BORDER) == after:
                places = [at for at, character in enumerate(tried) if character == BORDER]
                return [place - seen for seen, place in enumerate(places)]
        raise InvalidRow(f"the template changes the parts of message {number + 1}, which have weights of their own")


def _fitted(message: dict[str, Any], template: Template) -> dict[str, Any]:
    """A message in the form that this template takes."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str) and not template.takes_text:
        message = {**message, "content": [{"type": "text", "text": content}]}
    if calls and content is None and not template.takes_no_content:
        message = {**message, "content": ""}
    if isinstance(content, list) and not template.takes_parts:
        message = {**message, "content": "".join(part["text"] for part in content)}
    if calls and not template.takes_objects:
        message = {**message, "tool_calls": [_with_text(call) for call in calls]}
    return message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
