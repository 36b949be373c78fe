"""`python -m bridge.inspect data=... [n=5] [html=FILE] [json=FILE] [more overrides of train.py]`: what it trains on.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C.
"""

import html
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from bridge import platform
from bridge.command_line import DONE, INTERRUPTED, guarded
from bridge.config.run_config import RunConfig
from bridge.data import seen
from bridge.data.seen import Facts, Seen
from bridge.errors import ConfigError, RunError
from bridge.files import write_parts
from bridge.launch import compose, driver, inputs

BARS = 24  # of the histogram
MOST_TOGETHER = 16  # tokens that are waited for until they make whole characters
HELP = """\
usage: python -m bridge.inspect [n=5] [html=FILE] [json=FILE] [group=option ...] [section.key=value ...]
  python -m bridge.inspect init.path=models/mine data=chat data.path=talks.jsonl html=talks.html

Shows what a run with these overrides of train.py trains on, and makes its data if it is not there. What a model is
asked to predict is green, or between \u27e6 and \u27e7 where there are no colours; (x 0.5) after it is a weight.

  n=5          samples to show, or all: those to train on, then those of each evaluation set
  html=FILE    write them as a page, with the weight of each token, how long the samples of each set are, how much of
               them is trained, and how full rows are
  json=FILE    write them, one object a line: tokens (ids), weights (as many: how much predicting that token counts,
               0 not at all), text, source (FILE:LINE), set (train, eval or eval/NAME)

Exit codes: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C."""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
  color-scheme: light dark; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8885; border-radius: 6px; padding: 0.8em; }}
mark {{ background: #2a95; color: inherit; border-radius: 3px; }}
mark.other {{ background: #c806; }}
body:has(#weights:checked) pre > * {{ outline: 1px solid #8885; }}
body:has(#weights:checked) pre > ::after {{ content: attr(data-weights); font-size: 9px; vertical-align: super; }}
td, th {{ padding-right: 1.5em; text-align: left; white-space: nowrap; }}
rect {{ fill: #27a; }} text {{ font-size: 11px; fill: currentColor; }}
</style></head><body><h1>{title}</h1>
<table>{facts}</table>
{histograms}
<h2>Samples</h2><p><mark>Marked</mark>: what a model is asked to predict; <mark class="other">so</mark> with a weight
other than 1. Point at a token to see its id and weight.
<label><input type="checkbox" id="weights"> show the weight of each token</label></p>{samples}
</body></html>
"""
Decode = Callable[[Sequence[int]], str]


class Options(NamedTuple):
    """What is inspect's own on the command line. n: None is all."""

    n: int | None = 5
    html: Path | None = None
    json: Path | None = None


class View(NamedTuple):
    """What a run trains on. samples: (set, sample), read when they are taken. facts: of each set."""

    title: str
    samples: Iterator[tuple[str, Seen]]
    facts: dict[str, Facts]
    decode: Decode


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m bridge.inspect`; returns the exit code."""
    sys.path.append(os.getcwd())  # where a user's own modules lie, as for train.py
    return guarded(lambda: _command(sys.argv[1:] if arguments is None else arguments), only_prints=True)


def _command(arguments: Sequence[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(HELP)
        return DONE
    options, sys.argv[1:] = _own(arguments)
    jobs = compose.jobs("train")
    if len(jobs) != 1:
        raise ConfigError(f"bridge.inspect: shows one run, and -m gives {len(jobs)}; leave -m out")
    config = driver.config_of(jobs[0])
    inputs.check_data(config)
    try:
        _show(_read(config, options.n), options)
    except KeyboardInterrupt:
        print("SIGINT: stopped", file=sys.stderr, flush=True)
        return INTERRUPTED
    return DONE


def _own(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """inspect's own options, and the overrides of train.py."""
    given: dict[str, Any] = {}
    others = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in Options._fields:
            others.append(argument)
        elif name == "n":
            if value != "all" and not (value.isdecimal() and int(value)):
                raise ConfigError(f"n: {value!r} is not a number of samples; set e.g. n=5, or n=all")
            given[name] = None if value == "all" else int(value)
        else:
            given[name] = Path(value)
            _check_file(name, value)
    return Options(**given), others


def _check_file(name: str, value: str) -> None:
    path = Path(value).absolute()
    if not value or path.is_dir():
        raise ConfigError(f"{name}: {value!r} is no file to write; set {name}=FILE")
    if not path.parent.is_dir():
        raise ConfigError(f"{name}: the folder of {value} does not exist; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{name}: {value} cannot be written; set a file in a folder of yours")


def _read(config: RunConfig, n: int | None) -> View:
    platform.prepare()  # before megatron-core is imported
    from bridge.training.setup import read_data

    data = read_data(config)
    sets = seen.sets(data.build(seed=config.train.seed))
    length = data.options.sequence_length
    facts = {name: seen.facts(dataset, sequence_length=length) for name, dataset in sets.items()}
    kind = config.data["source"]
    samples = ((name, one) for name, dataset in sets.items() for one in seen.samples(dataset, name=f"{kind} {name}"))
    decode = _numbers if data.prepared.tokenizer is None else _decoder(data.prepared.tokenizer)
    return View(f"data={kind}", islice(samples, n), facts, decode)


def _numbers(ids: Sequence[int]) -> str:
    """The text of tokens that no tokenizer made."""
    return " ".join(map(str, ids))


def _decoder(directory: Path) -> Decode:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _show(view: View, options: Options) -> None:
    """Print the samples, and write them where files are named."""
    samples: Iterable[tuple[str, Seen]] = _printed(view, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if options.html:
        samples = list(samples)
        _write("html", options.html, [page(view._replace(samples=iter(samples)))])
    if options.json:
        _write("json", options.json, (line(name, sample, view.decode) for name, sample in samples))
    for _ in samples:  # those that no file took
        pass
    for name, facts in view.facts.items():
        print(f"{name}: {', '.join(_words(facts).values())}")
    for path in (options.html, options.json):
        if path:
            print(f"written to {path}")


def _write(name: str, path: Path, parts: Iterable[str]) -> None:
    try:
        write_parts(parts, path)
    except OSError as error:
        raise RunError(f"{name}: {path} cannot be written ({error.strerror})") from error


def line(name: str, sample: Seen, decode: Decode) -> str:
    """One line of json=FILE, of a sample of the set `name`."""
    return json.dumps({**sample._asdict(), "text": decode(sample.tokens), "set": name}, ensure_ascii=False) + "\n"


def pieces(tokens: Sequence[int], decode: Decode) -> Iterator[tuple[int, str]]:
    """(number of tokens, their text) one after the other: one token, or those that a character is divided over.

    The texts together are `decode(tokens)`. A token's text is what it adds to the tokens before it, since a decoder may
    write one differently at the beginning.
    """
    known = begin = 0  # texts of the tokens before `begin` are told; `known`: where what is decoded with them begins
    for end in range(1, len(tokens) + 1):
        before, text = decode(tokens[known:begin]), decode(tokens[known:end])
        is_cut = text.endswith("\N{REPLACEMENT CHARACTER}") and end - begin < MOST_TOGETHER
        if end == len(tokens) or not is_cut:
            yield end - begin, text[len(before) :]
            known, begin = begin, end


def _visible(text: str) -> str:
    """`text` whose control characters are written as Python does: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 159 else repr(c)[1:-1] for c in text)


class Piece(NamedTuple):
    """Text of one or several tokens, with their ids and weights."""

    text: str
    tokens: list[int]
    weights: list[float]

    @property
    def weight(self) -> float:
        return max(self.weights)


def _pieces(sample: Seen, decode: Decode) -> Iterator[Piece]:
    begin = 0
    for number, text in pieces(sample.tokens, decode):
        end = begin + number
        yield Piece(_visible(text), sample.tokens[begin:end], sample.weights[begin:end])
        begin = end


def _heading(name: str, sample: Seen) -> str:
    trained = sum(weight > 0 for weight in sample.weights)
    return f"{sample.source} ({name}): {len(sample.tokens):,} tokens, {trained:,} trained"


def _printed(view: View, *, colours: bool) -> Iterator[tuple[str, Seen]]:
    """The samples, each printed first."""
    before, after = ("\x1b[32m", "\x1b[0m") if colours else ("\u27e6", "\u27e7")
    for name, sample in view.samples:
        print(f"--- {_heading(name, sample)}")
        for weight, group in groupby(_pieces(sample, view.decode), key=lambda piece: piece.weight):
            text = "".join(piece.text for piece in group)
            note = f"(x {weight:g})" if weight not in (0, 1) else ""
            print(f"{before}{text}{after}{note}" if weight else text, end="")
        print()
        yield name, sample


def _words(facts: Facts) -> dict[str, str]:
    about = "" if facts.exact else "about "
    about_lengths = "" if len(facts.lengths) == facts.samples else "about "
    if not facts.samples:
        return {"samples": "0 samples"}
    shortest, median, longest = numpy.percentile(facts.lengths, [0, 50, 100])
    return {
        "samples": f"{facts.samples:,} samples",
        "tokens": f"{about_lengths}{facts.tokens:,} tokens",
        "lengths": f"{about_lengths}{shortest:.0f} to {longest:.0f} each, half of them up to {median:.0f}",
        "trained": f"{about}{facts.trained:.1%} trained",
        "fill": f"rows {about_lengths}{facts.fill:.1%} full",
    }


def page(view: View) -> str:
    """The page of html=FILE. It needs nothing but itself, and no text of the data runs in it."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{word}</td>' for word in _words(facts).values())}</tr>"
        for name, facts in view.facts.items()
    )
    histograms = "".join(
        f"<h2>Tokens of a sample: {html.escape(name)}</h2>{histogram(facts.lengths)}"
        for name, facts in view.facts.items()
    )
    samples = ""
    for name, sample in view.samples:
        text = "".join(map(_marked, _pieces(sample, view.decode)))
        samples += f"<h3>{html.escape(_heading(name, sample))}</h3><pre>{text}</pre>"
    return PAGE.format(title=html.escape(view.title), facts=rows, histograms=histograms, samples=samples)


def _marked(piece: Piece) -> str:
    weights = ", ".join(f"{weight:g}" for weight in piece.weights)
    title = f"token {', '.join(map(str, piece.tokens))}: weight {weights}"
    tag = "mark" if piece.weight else "span"
    kind = ' class="other"' if piece.weight not in (0, 1) else ""
    return f'<{tag}{kind} title="{title}" data-weights="{weights}">{html.escape(piece.text)}</{tag}>'


def histogram(lengths: Any) -> str:
    """Bars: how many samples have how many tokens. lengths: int64."""
    longest = int(lengths.max(initial=0))
    width = -(-(longest + 1) // BARS)
    counts = numpy.bincount(lengths // width, minlength=1).tolist()
    bars = ""
    for at, count in enumerate(counts):
        tall = 140 * count / max(1, *counts)
        about = f"<title>{width * at} to {width * (at + 1) - 1} tokens: {count}</title>"
        bars += f'<rect x="{24 * at}" y="{150 - tall:.1f}" width="22" height="{tall:.1f}">{about}</rect>'
    labels = f'<text x="0" y="166">0</text><text x="{24 * len(counts)}" y="166" text-anchor="end">{longest}</text>'
    return f'<svg viewBox="0 0 {24 * len(counts)} 170" width="100%" height="190">{bars}{labels}</svg>'


if __name__ == "__main__":
    sys.exit(main())
