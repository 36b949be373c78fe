"""Conversations become samples: the tokens of one rendering each, and a weight for every token."""

from collections.abc import Iterator
from typing import Any

import numpy

from bridge.data.encode.conversation import Conversation
from bridge.data.encode.encoded import Encoded
from bridge.data.encode.masks import Counts, Marked, Rules, marked
from bridge.data.encode.templates import InvalidRow, Template
from bridge.data.readers.reader import Row


def encode(talk: Conversation, template: Template, *, row: Row, rules: Rules, counts: Counts) -> list[Encoded]:
    """The samples of one conversation. Raises InvalidRow."""
    texts = marked(talk, template, rules=rules, counts=counts)
    return [weighted(text, template, row=row) for text in texts]


def weighted(text: Marked, template: Template, *, row: Row) -> Encoded:
    """The tokens of `text`; a token that begins in a span has the weight of the last such span."""
    tokens = template.tokens(text.text)
    starts, weights = numpy.asarray(tokens.starts), numpy.zeros(len(tokens.ids), dtype=numpy.float32)
    for span in text.spans:
        weights[(starts >= span.start) & (starts < span.end)] = span.weight
    return Encoded(tokens.ids, weights.tolist(), row.file, row.line)


def check(sample: Encoded, *, everything: bool) -> None:
    """Raises InvalidRow for a sample that trains nothing, or everything unless `everything` is."""
    counted = sample.weights[1:]
    if not any(counted):
        raise InvalidRow("nothing in it is trained")
    if all(counted) and not everything:
        raise InvalidRow(f"all of its {len(sample.tokens)} tokens are trained; set data.train_on=all to want that")


def fitted(sample: Encoded, *, sequence_length: int, policy: str) -> Iterator[Encoded]:
    """`sample` in pieces of at most sequence_length positions: whole, cut, or none, as the policy says."""
    longest = sequence_length + 1  # a sample of L tokens has L - 1 positions
    length = len(sample.tokens)
    if length <= longest:
        yield sample
    elif policy != "drop":
        starts: Any = range(0, length - 1, sequence_length) if policy == "split" else (0,)
        for start in starts:  # a piece begins with the last token of the one before, which it does not predict
            part = slice(start, start + longest)
            if any(sample.weights[part][1:]):
                yield sample._replace(tokens=sample.tokens[part], weights=sample.weights[part])
