"""The documents of a run: files in order, what is held out, and everything that a file can have wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hw_profiles.errors import QuestionError
from simulator.job.learning import Data
from trainer.data import corpus_entropies, load_corpus, make_batches
from trainer.data.corpus import find_sources, read_documents
from trainer_texts import HERE, letters, make_job, rows_of, write_jsonl

# Splits


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path, [f"text {i:03d}" for i in range(50)])
    data = Data(files=(name,), held_out=7)
    corpus = load_corpus(data, tmp_path)
    held_out = letters(corpus.held_out.token_T).split("$")[:-1]
    train = letters(corpus.train.token_T).split("$")[:-1]
    assert held_out == [f"text {i:03d}" for i in range(6, 50, 7)]
    assert len(train) == 43 and not set(train) & set(held_out)
    # Four documents of nine tokens in each example, so that none is cut.
    job = make_job(files=[name], held_out=7, length=36)
    for split, own in (("train", train), ("held_out", held_out)):
        batches = make_batches(job, tmp_path, split=split, seed=0)
        seen = "".join(letters(row) for batch in rows_of(batches, 12) for row in batch["targets_BS"])
        assert set(re.findall(r"text \d{3}", seen)) == set(own)


def test_with_too_few_documents_to_hold_one_out_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(QuestionError, match=r"^training.learning.data.held_out: no document is left for evaluation"):
        make_batches(make_job(files=["one.txt"]), tmp_path, split="held_out", seed=0)
    entropies = corpus_entropies(make_job(files=["one.txt"]), tmp_path)
    assert entropies.held_out_unigram_nats is None and entropies.held_out_targets == 0


def test_the_default_corpus_is_the_standard_library() -> None:
    sources = find_sources(Data(), HERE)
    names = [source.where.removeprefix("standard library, ") for source in sources]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert not any("_sysconfigdata" in name for name in names)
    corpus = load_corpus(Data(), HERE)
    size = corpus.train.text_bytes + corpus.held_out.text_bytes
    assert 300 < corpus.train.documents + corpus.held_out.documents < 900 and 5e6 < size < 2**25
    # A token for each byte and an eos for each document, in half the memory of int32.
    assert corpus.train.tokens == corpus.train.text_bytes + corpus.train.documents
    assert corpus.train.token_T.dtype == np.uint16
    assert load_corpus(Data(), HERE) is corpus


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("before")
    data = Data(files=("one.txt",))
    assert letters(load_corpus(data, tmp_path).train.token_T) == "before$"
    (tmp_path / "one.txt").write_text("after it")
    assert letters(load_corpus(data, tmp_path).train.token_T) == "after it$"


# Files


def documents(folder: Path, *files: str, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(find_sources(Data(files=files), folder), field)]


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    inner = tmp_path / "texts" / "b"
    inner.mkdir(parents=True)
    (inner / "x.txt").write_text("third, ünï")
    (tmp_path / "texts" / "a.txt").write_text("second")
    (tmp_path / "texts" / "empty.txt").write_text("")
    (tmp_path / "texts" / ".hidden").write_bytes(b"\xff")
    write_jsonl(tmp_path / "texts", ["fourth", "", "fifth\nof two lines"], "b/y.jsonl")
    pq.write_table(pa.table({"n": [1, 2], "text": ["sixth", "seventh"]}), tmp_path / "texts" / "c.parquet")
    (tmp_path / "first.md").write_text("first")
    (tmp_path / "link.txt").symlink_to("first.md")
    words = ["second", "third, ünï", "fourth", "fifth\nof two lines", "sixth", "seventh"]
    assert documents(tmp_path, "first.md", "texts") == ["first", *words]
    assert documents(tmp_path, "texts", "link.txt") == [*words, "first"]


def test_parquet_in_row_groups_and_other_string_types(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(300)]
    pq.write_table(pa.table({"a.b": pa.array(texts, pa.large_string())}), tmp_path / "x.parquet", row_group_size=70)
    assert documents(tmp_path, "x.parquet", field="a.b") == texts
    coded = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"text": coded}), tmp_path / "y.parquet")
    assert documents(tmp_path, "y.parquet") == texts


def make_bad_files(folder: Path) -> None:
    (folder / "latin.txt").write_bytes("one\ntwo\ngr\u00fc\u00df".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_text("")
    (folder / "good.txt").write_text("good")
    (folder / "hollow").mkdir()
    (folder / "lines.jsonl").write_text('{"text": "a"}\n\n{"txet": "b"}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "null.jsonl").write_text('{"text": null}\n')
    (folder / "list.jsonl").write_text('{"text": ["a"]}\n')
    (folder / "array.jsonl").write_text("[1]\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "digits.jsonl").write_text('{"text": ' + "1" * 5000 + "}\n")
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "bytes.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    pq.write_table(pa.table({"txt": ["a"], "n": [1]}), folder / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "number.parquet")
    pq.write_table(pa.table({"text": [["a"]]}), folder / "list.parquet")
    pq.write_table(pa.table({"text": ["a", "b", None]}), folder / "null.parquet")
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(5000)]}), folder / "whole.parquet")
    latin = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": latin}), folder / "latin.parquet")
    content = (folder / "whole.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(content[: len(content) // 2])
    (folder / "damaged.parquet").write_bytes(content[:100] + bytes(2000) + content[2100:])
    (folder / "no.parquet").write_text("text")
    os.mkfifo(folder / "pipe.txt")
    (folder / "out").symlink_to(folder.parent)
    (folder / "passwd").symlink_to("/etc/passwd")
    (folder / "loop").symlink_to("loop")
    (folder / "links").mkdir()
    (folder / "links" / "inner").symlink_to("/etc")
    (folder / "within").mkdir()
    (folder / "within" / "inner").symlink_to(folder / "hollow")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.txt", ": no such file in the folder of the job"),
        ("latin.txt", ", line 3: not a text file (UTF-8)"),
        ("nul.txt", ": not a text file (NUL byte)"),
        ("hollow", ": the folder holds no file"),
        ("lines.jsonl", ", line 3: has no key 'text'; did you mean 'txet'?"),
        ("number.jsonl", ", line 1: 'text' is a number; it must be text"),
        ("null.jsonl", ", line 1: 'text' is null; it must be text"),
        ("list.jsonl", ", line 1: 'text' is no text; it must be text"),
        ("array.jsonl", ", line 1: must be a JSON object with the key 'text'"),
        ("broken.jsonl", ", line 2: not JSON"),
        ("deep.jsonl", ", line 1: not JSON"),
        ("digits.jsonl", ", line 1: not JSON"),
        ("surrogate.jsonl", ", line 1: 'text' is not UTF-8 text (half a surrogate pair)"),
        ("bytes.jsonl", ", line 2: not a text file (UTF-8)"),
        ("column.parquet", ": has no column 'text'; did you mean 'txt'?"),
        ("number.parquet", ": column 'text' holds int64; it must hold text"),
        ("list.parquet", ": column 'text' holds list<element: string>; it must hold text"),
        ("null.parquet", ", row 3: 'text' is null; it must be text"),
        ("latin.parquet", ", row 2: 'text' is not UTF-8 text"),
        ("cut.parquet", ": not a whole Parquet file: "),
        ("damaged.parquet", ": not a whole Parquet file: "),
        ("no.parquet", ": not a whole Parquet file: "),
        ("pipe.txt", ": not a file"),
        ("../x.txt", ": must lie in the job's folder, without '..'"),
        ("hollow/../good.txt", ": must lie in the job's folder, without '..'"),
        ("/etc/passwd", ": must lie in the job's folder; it begins at the root"),
        ("passwd", ": must lie in the job's folder; it is a link out of it"),
        ("out", ": must lie in the job's folder; it is a link out of it"),
        ("links", ", 'inner': must lie in the job's folder; it is a link out of it"),
        ("within", ", 'inner': is a link to a folder; list that folder itself"),
        ("loop", ": not a path: it has a loop, a NUL character or a name too long"),
        ("a\0b", ": not a path: it has a loop, a NUL character or a name too long"),
        ("x" * 5000, ": not a path: it has a loop, a NUL character or a name too long"),
    ],
)
def test_a_bad_file_is_refused_by_name_line_and_rule(tmp_path: Path, name: str, words: str) -> None:
    make_bad_files(tmp_path)
    with pytest.raises(QuestionError) as caught:
        documents(tmp_path, name)
    message = str(caught.value)
    assert message.startswith(f"training.learning.data.files = {name!r:.80}{words}"), message
    assert "\n" not in message and len(message) < 300


def test_files_that_hold_nothing_or_are_listed_twice_are_refused(tmp_path: Path) -> None:
    make_bad_files(tmp_path)
    with pytest.raises(QuestionError, match=r"files = \[\]: names no file"):
        documents(tmp_path)
    with pytest.raises(QuestionError, match=r"files = 'good.txt': is listed twice"):
        documents(tmp_path, "good.txt", "good.txt")
    with pytest.raises(QuestionError, match=r"files: hold no text; all documents are empty"):
        load_corpus(Data(files=("empty.txt",)), tmp_path)
