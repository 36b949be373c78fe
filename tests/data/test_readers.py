"""Rows of every format, told apart by what other libraries wrote; what is wrong is one line with file and line."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.data.readers import files, json_values, text
from bridge.data.readers.reader import check, rows
from bridge.errors import ConfigError

RECORDS = [{"text": f'Zeile {n}, "ünïcode"\n漢字 🙂 {"x" * n}', "n": str(n)} for n in range(20)]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_jsonl(path: Path) -> None:
    path.write_text(lines(RECORDS), encoding="utf-8")


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(lines(RECORDS).encode()))


def write_zst(path: Path) -> None:
    """Two frames one after the other, as `zstd` and `cat` make them."""
    import pyarrow

    half = [lines(RECORDS[:7]).encode(), lines(RECORDS[7:]).encode()]
    path.write_bytes(b"".join(pyarrow.Codec("zstd").compress(part, asbytes=True) for part in half))


def write_array(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=2), encoding="utf-8")


def write_values(path: Path) -> None:
    path.write_text("\ufeff" + "\n".join(json.dumps(record, indent=1) for record in RECORDS), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(RECORDS)


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=6)


def write_dataset(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(RECORDS).save_to_disk(path, num_shards=3)


FORMATS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.json": write_array,
    "values.json": write_values,
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "saved": write_dataset,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "BLOCK", 7)  # records are cut everywhere
    FORMATS[name](tmp_path / name)
    found = list(rows(str(tmp_path / name)))
    assert [row.value for row in found] == RECORDS
    assert {row.file for row in found} == {str(tmp_path / name)}
    if name in ("a.json", "a.csv", "a.tsv", "values.json"):  # a record is where an editor shows it
        shown = (tmp_path / name).read_text(encoding="utf-8-sig").split("\n")
        starts = {"a.json": "  {", "values.json": "{", "a.csv": "Zeile", "a.tsv": "Zeile"}
        assert all(shown[row.line - 1].lstrip('"').startswith(starts[name]) for row in found)
    else:
        assert [row.line for row in found] == list(range(1, 21))


def test_a_text_file_is_a_document_and_a_long_one_is_cut_at_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "\ufeff" + "".join(f"line {n} ünïcode 漢字\n" for n in range(50)) + "no end 🙂" * 30
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    assert [row.value for row in rows(str(tmp_path / "a.txt"))] == [whole[1:]]
    monkeypatch.setattr(text, "LONGEST", 101)
    found = list(rows(str(tmp_path / "a.txt")))
    assert "".join(row.value for row in found) == whole[1:] and len(found) > 9
    assert all(row.value.endswith("\n") for row in found[:8])
    for row in found[:8]:
        assert row.value.startswith(f"line {row.line - 1} ")


def test_folders_globs_lists_and_numbers_of_rows(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt", "a.md", "b/.hidden.txt", ".git/x.txt", "b/image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n')

    def names(path: Any) -> list[str]:
        return [f"{Path(row.file).relative_to(tmp_path)}:{row.line}" for row in rows(path)]

    assert names(str(tmp_path)) == ["a.md:1", "b/1.txt:1", "b/2.jsonl:1", "b/2.jsonl:2"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["b/2.jsonl:1", "b/2.jsonl:2"]
    assert names([f"{tmp_path}/b/2.jsonl:1", f"{tmp_path}/a.md"]) == ["b/2.jsonl:1", "a.md:1"]
    assert names(f"{tmp_path}:3") == ["a.md:1", "b/1.txt:1", "b/2.jsonl:1"]
    (tmp_path / "odd.jsonl:1").write_text("")  # a file of that name is that file
    with pytest.raises(ConfigError, match=r"odd\.jsonl:1 is of no format that is known here; known: \.txt"):
        names(f"{tmp_path}/odd.jsonl:1")


def test_urls_are_read_through_fsspec() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/corpus/a.jsonl.gz", gzip.compress(lines(RECORDS).encode()))
    store.pipe("/corpus/b.txt", b"text")
    assert [row.value for row in rows("memory://corpus/a.jsonl.gz:3")] == RECORDS[:3]
    assert len(list(rows("memory://corpus"))) == len(list(rows("memory://corpus/*"))) == 21
    before = files.identity("memory://corpus", key="data.path")
    store.pipe("/corpus/b.txt", b"longer text")
    assert files.identity("memory://corpus", key="data.path") != before
    with pytest.raises(ConfigError, match="data.path: memory://corpus/none.txt does not exist; set a file"):
        check("memory://corpus/none.txt")
    with pytest.raises(ConfigError, match="data.path: nosuch://x cannot be reached"):
        check("nosuch://x")


def test_identity_changes_with_a_file_and_reads_none(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")

    def identity(path: str = str(tmp_path)) -> str:
        return files.identity(path, key="data.path")

    seen = {identity(), identity(f"{tmp_path}:5")}
    (tmp_path / "a.jsonl").write_text(lines(RECORDS[::-1]))
    seen.add(identity())
    (tmp_path / "b.txt").write_text("text")
    seen.add(identity())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.add(identity())
    assert len(seen) == 5
    (tmp_path / "c.txt").chmod(0)
    assert identity() in seen


WRONG = [
    ("none.jsonl", None, r"data.path: \S+none.jsonl does not exist; set a file"),
    ("a.pdf", b"x", r"data.path: \S+a.pdf is of no format that is known here; known: .txt, .md"),
    ("a.jsonl", b"", r"data.path: \S+a.jsonl holds no text and no record"),
    ("a.jsonl", b'{"a": 1}\n\n{"a": 1', r"a.jsonl:3 is no JSON record \(Expecting ',' delimiter at character 8\)"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl:2 is not UTF-8"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], r"a.jsonl.gz cannot be read after line \d+ \(EOFError"),
    ("a.jsonl.gz", b'{"a": 1}\n', r"a.jsonl.gz cannot be read \(BadGzipFile"),
    ("a.jsonl.zst", b'{"a": 1}\n', r"a.jsonl.zst cannot be read \(OSError"),
    ("a.json", b'[{"a": 1},\n{"a": 1}', r"a.json:2 is the end of an array without its \]; the file is cut off"),
    ("a.json", b'[{"a": 1}\n{"a": 1}]', r"a.json:2 has '{' where a comma or the end"),
    ("a.json", b'[{"a": 1}]\n{}', r"a.json:2 goes on after the end of the array"),
    ("a.json", b'{"a": 1,\n"b" 2' + b" " * 100, r"a.json:2 is no JSON \(Expecting ':' delimiter\)"),
    ("a.json", b'[{"a": "never ends', r"a.json:1 is no JSON \(Unterminated string"),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a.csv:3 has 3 values for the 2 columns"),
    ("a.csv", b"a,b\n1\n", r"a.csv:2 has 1 values for the 2 columns"),
    ("a.csv", b'a,b\n1,"2\n', r"a.csv:2 is no row of a table \(unexpected end of data\)"),
    ("a.txt", b"one\ntwo \xff\n", r"a.txt:2 is not UTF-8; convert the file"),
    ("a.txt", "一".encode()[:-1], r"a.txt:1 ends within a UTF-8 character"),
    ("a.parquet", b"PAR1", r"a.parquet cannot be read \(ArrowInvalid"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_is_wrong_is_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        _ = [check(str(tmp_path / name)), *rows(str(tmp_path / name))]
    assert "\n" not in str(raised.value)


def test_a_near_name_is_offered_and_a_folder_without_text_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"trian.jsonl does not exist; did you mean 'train.jsonl'\?"):
        check(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty has no file to read; known: .txt"):
        check(str(tmp_path / "empty"))


def test_a_file_larger_than_the_memory_allowed_is_read(tmp_path: Path) -> None:
    """An array of 64 MB, read in a process that may not grow by more than 24 MB meanwhile."""
    record = json.dumps({"text": "x" * 10000})
    (tmp_path / "a.json").write_text("[" + ",\n".join([record] * 6400) + "]")
    code = (
        "import resource, sys; from bridge.data.readers import json_values\n"
        "from bridge.data.readers.reader import rows\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used(); print(sum(len(row.value['text']) for row in rows(sys.argv[1])), (used() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], capture_output=True, text=True)
    characters, grown = map(int, done.stdout.split())
    assert characters == 64_000_000 and grown < 24
