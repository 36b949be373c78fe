"""Tokens per CPU second of `data=text`, against a plain loop over the same tokenizer in the same run.

    python benchmarks/tokenise.py                                  # 40 MB of the standard library as JSON lines
    python benchmarks/tokenise.py --tokenizer models/smollm2 --size 100 --processes 1 2 4

Each in a process of its own that reads the file, tokenises and stores the tokens; CPU seconds are those of the process
and its children, interpreters that start included. plain: json.loads and `encode`, a line at a time, into one file.
text: what a run does at its first start, with so many tokenising processes, the index and the last copy included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402
import tokenizers  # noqa: E402

from bridge.data import stdlib, text  # noqa: E402
from bridge.data.encode import corpus, tokenizer  # noqa: E402
from bridge.data.samples import bin_idx  # noqa: E402


class Measured(NamedTuple):
    tokens: int
    cpu: float
    wall: float


def plain(file: Path, directory: Path, scratch: Path) -> int:
    """The loop that a reader would write; how many tokens it made."""
    learned = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = tokenizer.load(directory).end_of_document
    total = 0
    with file.open(encoding="utf-8") as lines, (scratch / "tokens.bin").open("wb") as stored:
        for line in lines:
            ids = numpy.array([*learned.encode(json.loads(line)["text"]).ids, end], dtype=numpy.uint16)
            ids.tofile(stored)
            total += len(ids)
    return total


def ours(file: Path, directory: Path, scratch: Path, processes: int) -> int:
    """How many tokens `data=text` made."""
    config = text.Config(path=str(file), tokenizer=str(directory), num_processes=processes)
    found = text.corpus_of(str(file), key="data.path", field=config.field)
    (prefix,) = corpus.tokenise([found], corpus.Options.of(config), cache=scratch).prefixes
    index = bin_idx.read_index(prefix)
    return index.tokens_before(index.num_documents)


def measured(file: Path, directory: Path, processes: int) -> Measured:
    """processes: 0 for the plain loop."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--step", str(processes), str(file), str(directory), scratch]
        began = time.monotonic()
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        tokens, cpu = json.loads(done.stdout.splitlines()[-1])
        return Measured(tokens, cpu, time.monotonic() - began)


def _step(processes: str, file: str, directory: str, scratch: str) -> None:
    number, paths = int(processes), (Path(file), Path(directory), Path(scratch))
    tokens = ours(*paths, number) if number else plain(*paths)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([tokens, sum(each.ru_utime + each.ru_stime for each in usage)]))


def write_text(file: Path, size: float) -> list[str]:
    """At least `size` MB of JSON lines; the documents they repeat."""
    documents = [document.text for document in stdlib.documents()]
    with file.open("w", encoding="utf-8") as lines:
        while lines.tell() < size * 1e6:
            for document in documents:
                lines.write(json.dumps({"text": document}) + "\n")
                if lines.tell() >= size * 1e6:
                    break
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=40, help="MB of text")
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face directory; none: 8192 tokens are trained")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        _step(*arguments.step)
        return
    with tempfile.TemporaryDirectory() as place:
        file, directory = Path(place) / "text.jsonl", arguments.tokenizer or Path(place) / "tokenizer"
        documents = write_text(file, arguments.size)
        if arguments.tokenizer is None:
            tokenizer.save(tokenizer.train(documents, vocab_size=8192), directory)
        print("| way | tokens | CPU s | tokens per CPU s | of plain | wall s |\n|---|---|---|---|---|---|")
        speed = 0.0
        for processes in (0, *arguments.processes):
            found = measured(file, directory, processes)
            speed = speed or found.tokens / found.cpu
            way = f"text, {processes} processes" if processes else "plain loop"
            each = found.tokens / found.cpu
            print(
                f"| {way} | {found.tokens:,} | {found.cpu:.1f} | {each:,.0f} | {each / speed:.2f} | {found.wall:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
