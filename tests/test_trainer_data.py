"""The trainer's data: small cases by hand, laws over random documents, and everything a file can have wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.job.job import Job
from simulator.job.learning import Data
from simulator.job.load import job_from_mapping
from trainer.data import corpus_entropies, load_corpus, load_tokenizer, make_batches
from trainer.data.corpus import find_sources, read_documents
from trainer.data.draws import draw_order, draw_words
from trainer.data.entropy import measure_entropies
from trainer.data.packing import causal_batch, cut, take
from trainer.data.span_corruption import Noise, Shape, corrupt, draw_noise, fit_shape
from trainer.data.stream import Stream, build_stream

HERE = Path()
BYTES = load_tokenizer("bytes", HERE)
TEXTS = st.lists(st.text("abcdefgh", min_size=1, max_size=40), min_size=1, max_size=12)


def make_job(*, encoder: bool = False, sequences: int = 4, length: Any = None, vocab: int = 320, **data: Any) -> Job:
    length = length or ({"encoder": 64, "decoder": 32} if encoder else 32)
    return job_from_mapping(
        {
            "model": {"preset": "t5-base" if encoder else "mixtral-8x7b", "vocab": vocab},
            "cluster": {"chip": "cpu-host", "devices": 1},
            "batch": {"sequences": sequences, "length": length},
            "training": {"learning": {"data": data}},
        }
    )


def write_jsonl(folder: Path, texts: list[str], name: str = "texts.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return name


def letters(ids: Any) -> str:
    """Ids as text: `.` padding, `$` eos, `^` start."""
    return "".join(".$^"[i] if i < 3 else chr(i - 3) for i in ids)


# Packing


def abc() -> Stream:
    return build_stream(["ab", "cdefg", "h"], BYTES)  # ab$cdefg$h$


def test_packed_examples_by_hand() -> None:
    stream = abc()
    pieces = cut(stream, 4, packed=True)
    batch = causal_batch(stream, BYTES, pieces.start_E, pieces.length_E, 4)
    assert [letters(row) for row in batch["targets_BS"]] == ["ab$c", "defg", "$h$."]
    # Each input is the token before its target, over the cut too; a document starts with ^.
    assert [letters(row) for row in batch["tokens_BS"]] == ["^ab^", "cdef", "g^h."]
    assert batch["segments_BS"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 2, 0]]
    assert batch["positions_BS"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 1, 0]]
    assert batch["weights_BS"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert all(array.dtype == np.int32 for array in batch.values())


def test_one_document_an_example_by_hand() -> None:
    stream = abc()
    pieces = cut(stream, 4, packed=False)
    batch = causal_batch(stream, BYTES, pieces.start_E, pieces.length_E, 4)
    assert [letters(row) for row in batch["targets_BS"]] == ["ab$.", "cdef", "g$..", "h$.."]
    assert [letters(row) for row in batch["tokens_BS"]] == ["^ab.", "^cde", "fg..", "^h.."]
    assert batch["segments_BS"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["positions_BS"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 0, 0]]


@given(TEXTS, st.integers(1, 24), st.booleans())
def test_every_token_is_a_target_once_an_epoch(texts: list[str], length: int, packed: bool) -> None:
    stream = build_stream(texts, BYTES)
    pieces = cut(stream, length, packed=packed)
    batch = causal_batch(stream, BYTES, pieces.start_E, pieces.length_E, length)
    real = batch["weights_BS"] == 1
    # Read row by row, the targets are the documents again, in order, each with its eos.
    assert letters(batch["targets_BS"][real]) == "".join(f"{text}$" for text in texts)
    assert letters(batch["tokens_BS"][real]) == "".join(f"^{text}" for text in texts)
    for row in range(pieces.count):
        segments, positions = batch["segments_BS"][row], batch["positions_BS"][row]
        assert ((segments == 0) == ~real[row]).all() and (positions[segments == 0] == 0).all()
        ends = np.nonzero(batch["targets_BS"][row] == BYTES.eos)[0]
        for number in range(1, int(segments.max()) + 1):
            places = np.nonzero(segments == number)[0]
            assert (np.diff(places) == 1).all() and positions[places].tolist() == list(range(len(places)))
            # A segment ends where its document does, or where the example does.
            assert places[-1] in ends or not (segments > number).any()
            assert not set(places[:-1]) & set(ends)


# Span corruption


def test_span_corruption_by_hand() -> None:
    stream = build_stream(["thankyou"], BYTES)
    raw = stream.token_T[None].astype(np.int32)
    noise = np.array([[0, 1, 1, 0, 0, 1, 0, 1, 0]], dtype=bool)  # t[ha]nk[y]o[u]$
    inputs, input_length, targets, target_length = corrupt(raw, np.array([9]), noise, Shape(9, 10, 10, 3), 1, 300)
    t, h, a, n, k, y, o, u = (ord(letter) + 3 for letter in "thankyou")
    assert inputs.tolist() == [[t, 299, n, k, 298, o, 297, 1, 1, 0]] and input_length.tolist() == [9]
    assert targets.tolist() == [[299, h, a, 298, y, 297, u, 1, 0, 0]] and target_length.tolist() == [8]


# T5's own: 568 raw tokens for 512, with 114 targets; the decoder length of Switch's job file is this 114.
@pytest.mark.parametrize(
    ("density", "mean", "encoder", "raw", "targets", "spans"),
    [(0.15, 3.0, 512, 568, 114, 28), (0.15, 3.0, 256, 284, 58, 14), (0.5, 3.0, 10, 14, 10, 2)],
)
def test_lengths_of_span_corruption(
    density: float, mean: float, encoder: int, raw: int, targets: int, spans: int
) -> None:
    shape = fit_shape(Noise(density, mean), encoder, 1000)
    assert (shape.raw, shape.spans) == (raw, spans)
    assert Noise(density, mean).lengths(raw) == (encoder, targets)
    fit_shape(Noise(density, mean), encoder, targets)
    with pytest.raises(QuestionError, match=rf"^batch.length.decoder = {targets - 1}: must be at least {targets};"):
        fit_shape(Noise(density, mean), encoder, targets - 1)


@given(st.floats(0.01, 0.99), st.floats(1, 20), st.integers(1, 300))
def test_longer_texts_never_make_shorter_examples(density: float, mean: float, raw: int) -> None:
    noise = Noise(density, mean)
    assert noise.lengths(raw) <= noise.lengths(raw + 1)
    assert noise.lengths(raw)[1] <= noise.lengths(raw + 1)[1]


@given(st.floats(0.01, 0.9), st.floats(1, 20), st.integers(3, 600))
def test_the_longest_text_that_fits(density: float, mean: float, encoder: int) -> None:
    noise = Noise(density, mean)
    shape = fit_shape(noise, encoder, 10**6)
    # T5's own search counts up from the encoder's length until the inputs no longer fit.
    raw = 1
    while noise.lengths(raw + 1)[0] <= encoder:
        raw += 1
    assert shape.raw == raw
    assert shape.spans == max(int(noise.counts(np.array([n]))[1][0]) for n in range(1, raw + 1))


def restore(inputs: Any, targets: Any, vocab: int, spans: int, eos: int) -> list[int]:
    """The raw text of one corrupted example, read token by token."""
    inputs, targets = list(inputs), list(targets)
    assert inputs.pop() == eos and targets.pop() == eos
    hidden: dict[int, list[int]] = {}
    for token in targets:
        if token >= vocab - spans:
            hidden[token] = []
        else:
            hidden[list(hidden)[-1]].append(token)
    assert list(hidden) == [vocab - 1 - i for i in range(len(hidden))] and all(hidden.values())
    out: list[int] = []
    for token in inputs:
        out.extend(hidden.pop(token) if token >= vocab - spans else [token])
    assert not hidden
    return out


@given(TEXTS, st.floats(0.05, 0.8), st.floats(1, 5), st.integers(6, 40), st.booleans(), st.integers(0, 2**32))
def test_inputs_and_targets_give_back_the_text(
    texts: list[str], density: float, mean: float, encoder: int, packed: bool, key: int
) -> None:
    noise, stream, vocab = Noise(density, mean), build_stream(texts, BYTES), 400
    shape = fit_shape(noise, encoder, 400)
    pieces = cut(stream, shape.raw, packed=packed, with_eos=packed)
    rows = np.arange(pieces.count)
    raw = take(stream, pieces.start_E, pieces.length_E, shape.raw)
    mask = draw_noise(noise, pieces.length_E, shape.raw, key, rows)
    inputs, input_length, targets, target_length = corrupt(raw, pieces.length_E, mask, shape, 1, vocab)
    for row in rows:
        length = int(pieces.length_E[row])
        assert (input_length[row], target_length[row]) == noise.lengths(length)
        assert not inputs[row, input_length[row] :].any() and not targets[row, target_length[row] :].any()
        ends = (inputs[row, : input_length[row]], targets[row, : target_length[row]])
        assert restore(*ends, vocab, shape.spans, 1) == raw[row, :length].tolist()
    text = letters(np.concatenate([raw[row, : pieces.length_E[row]] for row in rows]))
    assert text == "".join(f"{text}$" if packed else text for text in texts)


def test_every_way_to_cut_is_equally_likely() -> None:
    # 10 tokens, 4 of them noise in 2 spans: 3 ways to cut the noise times 5 to cut the rest: 400 draws of each.
    rows = np.arange(6000)
    mask = draw_noise(Noise(0.4, 2.0), np.full(6000, 10), 10, 7, rows)
    seen = Counter("".join("x" if noise else "." for noise in row) for row in mask)
    assert len(seen) == 15 and all(way.count("x") == 4 and way[0] == "." and way[-1] == "x" for way in seen)
    assert min(seen.values()) > 300 and max(seen.values()) < 500


# Batches


def rows_of(batches: Any, steps: int) -> list[dict[str, Any]]:
    return [next(batches) for _ in range(steps)]


def assert_equal(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype == np.int32
        assert np.array_equal(left[name], right[name]), name


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_jsonl(tmp_path, [f"document {i} says {'la' * (i % 9)} {i * i}" for i in range(60)])
    return tmp_path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("encoder", [False, True])
def test_resumed_batches_are_the_same_bit_for_bit(texts: Path, encoder: bool, packed: bool) -> None:
    job = make_job(encoder=encoder, files=["texts.jsonl"], packed=packed)
    through = make_batches(job, texts, seed=3)
    straight = rows_of(through, 40)
    assert through.examples.count < 100  # 40 steps of 4 go through more than one epoch
    for workers in (0, 2):
        first = make_batches(job, texts, seed=3, workers=workers)
        rows_of(first, 17)
        state = json.loads(json.dumps(first.get_state()))
        assert state["step"] == first.step == 17
        first.close()
        second = make_batches(job, texts, seed=3, workers=workers)
        rows_of(second, 5)
        second.set_state(state)
        third = make_batches(job, texts, seed=3, start_step=17, workers=workers)
        for step in range(17, 40):
            assert_equal(next(second), straight[step])
            assert_equal(next(third), straight[step])
        second.close()
        third.close()


@pytest.mark.parametrize("encoder", [False, True])
def test_processes_read_slices_of_the_same_batch(texts: Path, encoder: bool) -> None:
    job = make_job(encoder=encoder, sequences=6, files=["texts.jsonl"])
    whole = rows_of(make_batches(job, texts, seed=1), 20)
    for count in (2, 3, 6):
        parts = [make_batches(job, texts, seed=1, process_index=i, process_count=count) for i in range(count)]
        for step in range(20):
            local = [next(part) for part in parts]
            assert_equal({k: np.concatenate([part[k] for part in local]) for k in local[0]}, whole[step])
        assert len({json.dumps(part.get_state()) for part in parts}) == 1
    with pytest.raises(QuestionError, match=r"^batch.sequences = 6: must be a multiple of the 4 processes"):
        make_batches(job, texts, seed=1, process_count=4)


OTHER_PROCESS = """
import hashlib, sys
from pathlib import Path
from simulator.job.job import Job
from trainer.data import make_batches

job = Job.model_validate_json(sys.stdin.read())
batches = make_batches(job, Path(sys.argv[1]), seed=9, start_step=6, workers=2)
for _ in range(4):
    print(hashlib.sha256(b"".join(array.tobytes() for array in next(batches).values())).hexdigest())
batches.close()
"""


@pytest.mark.parametrize("encoder", [False, True])
def test_another_process_resumes_with_the_same_bits(texts: Path, encoder: bool) -> None:
    job = make_job(encoder=encoder, files=["texts.jsonl"])
    expected = [
        hashlib.sha256(b"".join(array.tobytes() for array in batch.values())).hexdigest()
        for batch in rows_of(make_batches(job, texts, seed=9), 10)
    ]
    command = [sys.executable, "-c", OTHER_PROCESS, str(texts)]
    result = subprocess.run(command, input=job.model_dump_json(), capture_output=True, text=True, check=True)
    assert result.stdout.split() == expected[6:]


def test_an_epoch_has_every_example_once_in_a_new_order(texts: Path) -> None:
    batches = make_batches(make_job(files=["texts.jsonl"], sequences=1), texts, seed=5)
    epochs = [[batch["targets_BS"].tobytes() for batch in rows_of(batches, batches.examples.count)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = make_batches(make_job(files=["texts.jsonl"], sequences=1), texts, seed=6)
    assert [batch["targets_BS"].tobytes() for batch in rows_of(other, len(epochs[0]))] != epochs[0]


def test_batches_larger_than_an_epoch(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("short")
    batch = next(make_batches(make_job(files=["one.txt"]), tmp_path, seed=0))
    assert [letters(row[:7]) for row in batch["targets_BS"]] == ["short$."] * 4


def test_encoder_decoder_batches(texts: Path) -> None:
    for packed in (True, False):
        job = make_job(encoder=True, files=["texts.jsonl"], packed=packed)
        batches = make_batches(job, texts, seed=0)
        batch = next(batches)
        assert {k: v.shape for k, v in batch.items()} == {
            **dict.fromkeys(["encoder_tokens_BS", "encoder_segments_BS", "encoder_positions_BS"], (4, 64)),
            **dict.fromkeys(["tokens_BS", "targets_BS", "segments_BS", "positions_BS", "weights_BS"], (4, 32)),
        }
        targets, real = batch["targets_BS"], batch["weights_BS"] == 1
        # T5's start token is padding; then the decoder reads its targets one place late.
        assert (batch["tokens_BS"][:, 0] == 0).all()
        assert np.array_equal(batch["tokens_BS"][:, 1:][real[:, 1:]], targets[:, :-1][real[:, 1:]])
        assert (targets[:, 0] == 319).all()
        assert (batch["segments_BS"] == real).all() and not targets[~real].any()
        lengths = batch["encoder_segments_BS"].sum(axis=1)
        assert lengths.max() == 64 if packed else lengths.max() < 64
        for row, length in enumerate(lengths):
            assert batch["encoder_positions_BS"][row, :length].tolist() == list(range(length))
            tokens = batch["encoder_tokens_BS"][row]
            assert tokens[length - 1] == 1 and not tokens[length:].any()
    again = next(make_batches(job, texts, seed=0))
    assert_equal(batch, again)


def test_noise_of_an_example_changes_with_the_epoch(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the quick brown fox jumps over the lazy dog")
    batches = make_batches(make_job(encoder=True, files=["one.txt"], sequences=1), tmp_path, seed=0)
    assert batches.examples.count == 1
    assert len({batch["encoder_tokens_BS"].tobytes() for batch in rows_of(batches, 20)}) > 10


def test_state_of_other_data_is_refused(texts: Path) -> None:
    job = make_job(files=["texts.jsonl"])
    state = make_batches(job, texts, seed=0).get_state()
    write_jsonl(texts, ["something else"], "other.jsonl")
    others = [
        make_batches(job, texts, seed=1),
        make_batches(job, texts, seed=0, split="held_out"),
        make_batches(make_job(files=["other.jsonl"]), texts, seed=0),
        make_batches(make_job(files=["texts.jsonl"], sequences=2), texts, seed=0),
        make_batches(make_job(files=["texts.jsonl"], packed=False), texts, seed=0),
    ]
    for other in others:
        with pytest.raises(QuestionError, match=r"^checkpoint, position in the data: belongs to other text, seed"):
            other.set_state(state)
    batches = make_batches(job, texts, seed=0)
    for bad in ({}, state | {"version": 2}, state | {"step": -1}, state | {"step": 1.0}, state | {"step": True}):
        with pytest.raises(QuestionError, match=r"^checkpoint, position in the data: not written by this version"):
            batches.set_state(bad)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("before")
    data = Data(files=("one.txt",))
    assert letters(load_corpus(data, tmp_path).train.token_T) == "before$"
    (tmp_path / "one.txt").write_text("after it")
    assert letters(load_corpus(data, tmp_path).train.token_T) == "after it$"


# Numbers drawn by what they are for


def test_draws_depend_on_key_row_and_place_only() -> None:
    words = draw_words(5, np.arange(4), 6)
    assert np.array_equal(draw_words(5, np.array([2]), 3), words[2:3, :3])
    assert len(set(words.ravel().tolist())) == 24
    assert sorted(draw_order(1, 0, 100)) == list(range(100))
    assert draw_order(1, 0, 100).tolist() != draw_order(1, 1, 100).tolist() != draw_order(2, 0, 100).tolist()


def test_splitmix64_of_its_authors() -> None:
    # The first three words from state 0 as its authors' program prints them: finish(n x golden).
    from trainer.data.draws import GOLDEN, _finish

    found = _finish(np.arange(1, 4, dtype=np.uint64) * GOLDEN)
    assert [hex(word) for word in found] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


# Splits and documents


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path, [f"text {i:03d}" for i in range(50)])
    data = Data(files=(name,), held_out=7)
    corpus = load_corpus(data, tmp_path)
    held_out = letters(corpus.held_out.token_T).split("$")[:-1]
    train = letters(corpus.train.token_T).split("$")[:-1]
    assert held_out == [f"text {i:03d}" for i in range(6, 50, 7)]
    assert len(train) == 43 and not set(train) & set(held_out)
    job = make_job(files=[name], held_out=7)
    for split, own in (("train", train), ("held_out", held_out)):
        batches = make_batches(job, tmp_path, split=split, seed=0)
        seen = "".join(letters(row) for batch in rows_of(batches, 12) for row in batch["targets_BS"])
        found = {seen[place : place + 8] for place in range(len(seen)) if seen[place : place + 5] == "text "}
        assert {text for text in found if len(text) == 8 and text[5:].isdigit()} <= set(own)


def test_too_few_documents_to_hold_one_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(QuestionError, match=r"^training.learning.data.held_out: no document is left for evaluation"):
        make_batches(make_job(files=["one.txt"]), tmp_path, split="held_out", seed=0)
    entropies = corpus_entropies(make_job(files=["one.txt"]), tmp_path)
    assert entropies.held_out_unigram_nats is None and entropies.held_out_targets == 0


def test_standard_library() -> None:
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
def test_bad_files(tmp_path: Path, name: str, words: str) -> None:
    make_bad_files(tmp_path)
    with pytest.raises(QuestionError) as caught:
        documents(tmp_path, name)
    message = str(caught.value)
    assert message.startswith(f"training.learning.data.files = {name!r:.80}{words}"), message
    assert "\n" not in message and len(message) < 300


def test_files_that_say_nothing_or_twice(tmp_path: Path) -> None:
    make_bad_files(tmp_path)
    with pytest.raises(QuestionError, match=r"files = \[\]: names no file"):
        documents(tmp_path)
    with pytest.raises(QuestionError, match=r"files = 'good.txt': is listed twice"):
        documents(tmp_path, "good.txt", "good.txt")
    with pytest.raises(QuestionError, match=r"files: hold no text; all documents are empty"):
        load_corpus(Data(files=("empty.txt",)), tmp_path)


# Tokenizers


def write_tokenizer(folder: Path, *, special: tuple[str, ...] = ("<pad>", "</s>", "<unk>"), extra: int = 0) -> str:
    import tokenizers

    words = {word: i for i, word in enumerate([*special, "a", "b", "c"])}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.add_special_tokens([f"<extra_id_{i}>" for i in range(extra)])
    found.enable_truncation(2)
    found.enable_padding(length=9)
    found.save(str(folder / "words.json"))
    return "words.json"


def test_bytes_tokenizer() -> None:
    assert (BYTES.size, BYTES.pad, BYTES.eos, BYTES.bos) == (259, 0, 1, 2)
    assert [ids.tolist() for ids in BYTES.encode(["a\0", "é"])] == [[100, 3], [198, 172]]


def test_tokenizers_file(tmp_path: Path) -> None:
    found = load_tokenizer(write_tokenizer(tmp_path, extra=4), tmp_path)
    # Cutting and filling that the file asks for are left out, and its own sentinels do not count.
    assert [ids.tolist() for ids in found.encode(["a b c a", "x"])] == [[3, 4, 5, 3], [2]]
    assert (found.size, found.pad, found.eos, found.bos) == (6, 0, 1, 1)
    # What looks like a special token in a text is text.
    assert set(found.encode(["</s> a <extra_id_0>"])[0].tolist()) == {2, 3}
    wrong = dataclasses.replace(found, size=4)
    with pytest.raises(QuestionError, match=r"tokenizer = 'words.json': gives id 5; its vocabulary ends before 4"):
        build_stream(["a c"], wrong)
    (tmp_path / "one.txt").write_text("a b c")
    job = make_job(files=["one.txt"], tokenizer="words.json", vocab=6, sequences=1)
    assert next(make_batches(job, tmp_path, seed=0))["targets_BS"][0, :5].tolist() == [3, 4, 5, 1, 0]
    write_tokenizer(tmp_path, special=("</s>", "<unk>", "<s>"))
    assert next(make_batches(job, tmp_path, seed=0))["tokens_BS"][0, :4].tolist() == [2, 3, 4, 5]


def test_vocabulary_too_small() -> None:
    with pytest.raises(QuestionError, match=r"^model.vocab = 258: must be at least 259, for the 259 ids of .*'bytes'$"):
        make_batches(make_job(vocab=258), HERE, seed=0)
    shape = fit_shape(Noise(0.15, 3.0), 64, 32)
    rule = f"model.vocab = 260: must be at least {259 + shape.spans}, .* and {shape.spans} sentinels of span corruption"
    with pytest.raises(QuestionError, match=rule):
        make_batches(make_job(encoder=True, vocab=260), HERE, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("byte", None, "must be 'bytes' or a tokenizers file (.json) in the job's folder"),
        ("absent.json", None, "no such file in the folder of the job"),
        ("../x.json", None, "must lie in the job's folder, without '..'"),
        ("x.json", b"{", "not JSON"),
        ("x.json", b"[]", "not a tokenizers file (no JSON object)"),
        ("x.json", b"\xff", "not a text file (UTF-8)"),
        ("x.json", b'{"version": "1.0"}', "not a tokenizers file: "),
    ],
)
def test_bad_tokenizers(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(QuestionError) as caught:
        load_tokenizer(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"training.learning.data.tokenizer = {name!r}") and words in message
    assert "\n" not in message


def test_tokenizer_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match="has no token that ends a document; one of </s>, "):
        load_tokenizer(write_tokenizer(tmp_path, special=("<pad>", "<unk>")), tmp_path)


def test_tokenizer_that_cannot_read_a_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a strange word")
    job = make_job(files=["one.txt"], tokenizer=write_tokenizer(tmp_path, special=("<pad>", "</s>")))
    with pytest.raises(QuestionError, match=r"tokenizer = 'words.json': cannot read a text: WordLevel error"):
        make_batches(job, tmp_path, seed=0)


def test_tokenizer_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(QuestionError, match=r"needs the package tokenizers \(pip install tokenizers\); or use 'bytes'"):
        load_tokenizer(name, tmp_path)


# Objectives


def test_objective_must_fit_the_model() -> None:
    with pytest.raises(QuestionError, match=r"objective = span_corruption: .* has no encoder; it learns causal$"):
        make_batches(make_job(objective="span_corruption"), HERE, seed=0)
    with pytest.raises(QuestionError, match=r"objective = causal: .* is an encoder-decoder; it learns span_"):
        make_batches(make_job(encoder=True, objective="causal"), HERE, seed=0)
    with pytest.raises(QuestionError, match=r"^batch.length.encoder = 2: span corruption needs at least 3 tokens"):
        make_batches(make_job(encoder=True, length={"encoder": 2, "decoder": 32}), HERE, seed=0)
    long = make_job(encoder=True, length={"encoder": 300000, "decoder": 9}, noise_density=0.9, mean_span=100.0)
    with pytest.raises(QuestionError, match=r"^batch.length.encoder = 300000: .* more than 1,048,576 tokens"):
        make_batches(long, HERE, seed=0)


# Entropies


def test_entropies_by_hand() -> None:
    # Targets a b a c: reads ^ a b a. H1 of (2, 1, 1)/4 is 1.5 bits; only after a (2 of 4) is there one bit to guess.
    a, b, c, start = 0, 1, 2, 3
    found = measure_entropies(
        np.array([start, a, b, a]), np.array([a, b, a, c]), held_out=(np.array([start, a]), np.array([a, a])), vocab=5
    )
    assert found.unigram_nats == pytest.approx(1.5 * math.log(2), rel=1e-12)
    assert found.bigram_nats == pytest.approx(0.5 * math.log(2), rel=1e-12)
    # Add one: P(a) = 3/9. After ^, seen once with one kind: (1 + 1/3)/2 = 2/3. After a, twice, two kinds: (0 + 2/3)/4.
    assert found.held_out_unigram_nats == pytest.approx(math.log(3), rel=1e-12)
    assert found.held_out_bigram_nats == pytest.approx(-(math.log(2 / 3) + math.log(1 / 6)) / 2, rel=1e-12)
    assert (found.train_targets, found.held_out_targets) == (4, 2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(6, 3000))
def test_smoothed_chances_sum_to_one(ids: list[int], vocab: int) -> None:
    read, target = np.array([0, *ids[:-1]]), np.array(ids)
    for context in range(7 if vocab > 6 else 6):
        chances = []
        for token in range(min(vocab, 6)):
            held_out = (np.array([context]), np.array([token]))
            found = measure_entropies(read, target, held_out=held_out, vocab=vocab)
            assert found.held_out_bigram_nats is not None
            chances.append(math.exp(-found.held_out_bigram_nats))
            last = (np.array([context]), np.array([vocab - 1]))
        rest = measure_entropies(read, target, held_out=last, vocab=vocab).held_out_bigram_nats
        assert rest is not None
        others = max(vocab - 6, 0) * math.exp(-rest)
        assert sum(chances) + others == pytest.approx(1, rel=1e-9)
        assert -1e-12 <= found.bigram_nats <= found.unigram_nats + 1e-12


@pytest.mark.parametrize("encoder", [False, True])
def test_entropies_of_a_job_are_of_its_targets(texts: Path, encoder: bool) -> None:
    job = make_job(encoder=encoder, sequences=1, files=["texts.jsonl"], vocab=3000)
    found = corpus_entropies(job, texts)
    batches = make_batches(job, texts, seed=0)
    counts: Counter[int] = Counter()
    for batch in rows_of(batches, batches.examples.count):
        counts.update(batch["targets_BS"][batch["weights_BS"] == 1].tolist())
    total = counts.total()
    assert found.train_targets == total
    plug_in = -sum(n / total * math.log(n / total) for n in counts.values())
    # Other noise hides other letters, so of some 400 targets of span corruption the counts agree roughly.
    assert found.unigram_nats == pytest.approx(plug_in, rel=0.1 if encoder else 1e-12)
    assert found.bigram_nats < found.unigram_nats
    assert found.held_out_targets > 0 and found.held_out_unigram_nats is not None


def test_what_importing_the_trainer_needs() -> None:
    code = "import sys, trainer.data; print([m for m in ('jax', 'grain', 'pyarrow', 'tokenizers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
