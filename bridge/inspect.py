"""`python -m bridge.inspect data=... [n=5] [html=FILE] [json=FILE] [more overrides of train.py]`: what it trains on.

Prints the first n samples as text, what is trained in green, or between ⟦ and ⟧ where there are no colours.
html=FILE: a page with them, how long samples are, how much of them is trained, and how full rows are. json=FILE: one
object a line: tokens (ids), weights (as many: how much predicting that token counts, 0 not at all), text, source
(file:line).
Makes the samples if they are not there. Exit codes: 0 done, 1 failed, 2 wrong input.
"""

import html
import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bridge import platform
from bridge.command_line import DONE, guarded
from bridge.config import modules, sections
from bridge.data import source
from bridge.errors import ConfigError
from bridge.launch import compose, driver, inputs

OURS = ("n", "html", "json")
BARS = 24  # of the histogram
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
  color-scheme: light dark; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8885; border-radius: 6px; padding: 0.8em; }}
mark {{ background: #2a95; color: inherit; border-radius: 3px; }}
td {{ padding-right: 2em; }} rect {{ fill: #27a; }} text {{ font-size: 11px; fill: currentColor; }}
</style></head><body><h1>{title}</h1>
<table>{facts}</table>
<h2>Tokens of a sample</h2>{histogram}
<h2>Samples</h2><p><mark>Trained</mark> is what a model is asked to predict.</p>{samples}
</body></html>
"""


class Sample(NamedTuple):
    """tokens: ids. weights: as many. source: file:line, or the sample's number."""

    tokens: list[int]
    weights: list[float]
    source: str


class View(NamedTuple):
    """A data set: its title, the first samples, the lengths of all, how many tokens are trained, and how full rows are.

    rows: how full they are, in words.
    """

    title: str
    samples: list[Sample]
    lengths: list[int]
    trained: int | None
    rows: str


def main() -> int:
    """Entry of `python -m bridge.inspect`; returns the exit code."""
    sys.path.append(os.getcwd())  # where a user's own modules lie, as for train.py
    return guarded(_command)


def _command() -> int:
    given = {}
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if equals and name in OURS:
            given[name] = value
            sys.argv.remove(argument)
    if not given.get("n", "5").isdecimal():
        raise ConfigError(f"n: {given['n']!r} is not a number of samples; set e.g. n=5")
    for name in ("html", "json"):
        if name in given and not Path(given[name]).absolute().parent.is_dir():
            raise ConfigError(f"{name}: the folder of {given[name]} does not exist; make it first")
    if not any(argument.startswith(("init.", "+init.", "recipe=", "+recipe=")) for argument in sys.argv[1:]):
        sys.argv.append("init.random=true")  # what is looked at does not depend on the weights
    jobs = compose.jobs("train")
    if len(jobs) != 1:
        raise ConfigError(f"bridge.inspect: shows one run, and -m gives {len(jobs)}; leave -m out")
    view, decode = _read(driver.config_of(jobs[0]), int(given.get("n", 5)))
    _print(view, decode, colours=sys.stdout.isatty())
    if "html" in given:
        Path(given["html"]).write_text(page(view, decode))
    if "json" in given:
        Path(given["json"]).write_text("".join(line(sample, decode) for sample in view.samples))
    return DONE


def _read(config: Any, n: int) -> tuple[View, Callable[[Sequence[int]], str]]:
    inputs.check(config, in_queue=True)
    platform.prepare()  # before megatron-core is imported
    module: Any = modules.load("data.source", config.data["source"], "data")
    options = sections.build(module.Config, config.data, "data")
    prepared = module.prepare(options, cache=source.cache_root(options.cache_dir), seed=config.train.seed)
    decode = _decoder(prepared.tokenizer)
    title = f"data={config.data['source']}"
    train = module.build(options, prepared, seed=config.train.seed).train
    if hasattr(module, "stores"):
        stores = module.stores(options, prepared)
        stored = (store[number] for store in stores for number in range(len(store)))
        first = [
            Sample(each.tokens.tolist(), each.weights.tolist(), f"{each.file}:{each.line}")
            for each, _ in zip(stored, range(n), strict=False)
        ]
        lengths = [int(length) for store in stores for length in store.lengths]
        trained = sum(int((store[number].weights[1:] > 0).sum()) for store in stores for number in range(len(store)))
        return View(title, first, lengths, trained, _rows(train, lengths, options.sequence_length)), decode
    first = [_of_item(train[number], number) for number in range(min(n, len(train)))]
    lengths = [options.sequence_length + 1] * len(train)
    return View(title, first, lengths, None, _rows(train, lengths, options.sequence_length)), decode


def _decoder(tokenizer: Path | None) -> Callable[[Sequence[int]], str]:
    """From token ids to their text; without a tokenizer, to their numbers."""
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return lambda ids: str(loaded.decode(ids))


def _rows(train: Any, lengths: Sequence[int], sequence_length: int) -> str:
    """How full the rows to train on are."""
    parts = getattr(train, "datasets", [train])
    if all(hasattr(part, "fill") for part in parts):  # samples share them
        rows = sum(len(part) for part in parts)
        full = sum(part.num_tokens for part in parts) / max(1, rows * sequence_length)
        return f"{full:.1%} full, packed into {rows:,} rows of {sequence_length} tokens"
    full = sum(min(length - 1, sequence_length) for length in lengths) / max(1, len(lengths) * sequence_length)
    return f"{full:.1%} full, one sample in each of {sequence_length} tokens"


def _of_item(item: Any, number: int) -> Sample:
    tokens = [*item["tokens"].tolist(), int(item["labels"][-1])]
    return Sample(tokens, [0.0, *item["loss_mask"].tolist()], f"sample {number}")


def runs(sample: Sample, decode: Callable[[Sequence[int]], str]) -> list[tuple[float, str]]:
    """(weight, text) of the stretches of tokens with one weight."""
    pairs = zip(sample.weights, sample.tokens, strict=True)
    return [(weight, decode([token for _, token in group])) for weight, group in groupby(pairs, key=lambda p: p[0])]


def line(sample: Sample, decode: Callable[[Sequence[int]], str]) -> str:
    """One line of json=FILE."""
    return json.dumps({**sample._asdict(), "text": decode(sample.tokens)}, ensure_ascii=False) + "\n"


def _facts(view: View) -> dict[str, str]:
    total = sum(view.lengths)
    facts = {"samples": f"{len(view.lengths):,}", "tokens": f"{total:,}"}
    if view.trained is not None:
        facts["trained"] = f"{view.trained / max(1, total):.1%} of the tokens"
    facts["rows"] = view.rows
    return facts


def _print(view: View, decode: Callable[[Sequence[int]], str], *, colours: bool) -> None:
    before, after = ("\x1b[32m", "\x1b[0m") if colours else ("⟦", "⟧")
    for sample in view.samples:
        print(f"--- {sample.source}: {len(sample.tokens)} tokens, {sum(w > 0 for w in sample.weights)} trained")
        for weight, text in runs(sample, decode):
            note = f"(x {weight:g})" if weight not in (0, 1) else ""
            print(f"{before}{text}{after}{note}" if weight else text, end="")
        print()
    print(", ".join(f"{name}: {fact}" for name, fact in _facts(view).items()), flush=True)


def page(view: View, decode: Callable[[Sequence[int]], str]) -> str:
    """The page of html=FILE. It needs nothing but itself, and no text of the data runs in it."""
    facts = "".join(f"<tr><td>{name}</td><td>{html.escape(fact)}</td></tr>" for name, fact in _facts(view).items())
    shown = []
    for sample in view.samples:
        text = "".join(
            f'<mark title="weight {weight:g}">{html.escape(piece)}</mark>' if weight else html.escape(piece)
            for weight, piece in runs(sample, decode)
        )
        shown.append(f"<h3>{html.escape(sample.source)}: {len(sample.tokens)} tokens</h3><pre>{text}</pre>")
    return PAGE.format(
        title=html.escape(view.title), facts=facts, histogram=histogram(view.lengths), samples="".join(shown)
    )


def histogram(lengths: Sequence[int]) -> str:
    """Bars: how many samples have how many tokens."""
    longest = max(lengths, default=1)
    width = max(1, -(-(longest + 1) // BARS))
    counts = [0] * (longest // width + 1)
    for length in lengths:
        counts[length // width] += 1
    bars = ""
    for at, count in enumerate(counts):
        tall = 140 * count / max(counts)
        about = f"<title>{width * at} to {width * (at + 1) - 1} tokens: {count}</title>"
        bars += f'<rect x="{24 * at}" y="{150 - tall:.1f}" width="22" height="{tall:.1f}">{about}</rect>'
    labels = f'<text x="0" y="166">0</text><text x="{24 * len(counts)}" y="166" text-anchor="end">{longest}</text>'
    return f'<svg viewBox="0 0 {24 * len(counts)} 170" width="100%" height="190">{bars}{labels}</svg>'


if __name__ == "__main__":
    sys.exit(main())
