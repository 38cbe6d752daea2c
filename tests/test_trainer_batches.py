"""Batches: the same bits resumed, in slices and in another process; epochs, draws, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hw_profiles.errors import QuestionError
from trainer.data import make_batches
from trainer.data.draws import draw_order, draw_words
from trainer_texts import HERE, letters, make_job, rows_of, write_jsonl, write_texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with `texts.jsonl`."""
    return write_texts(tmp_path)


def assert_equal(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype == np.int32
        assert np.array_equal(left[name], right[name]), name


# The same bits wherever they are made


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


# Epochs


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


# What is refused, and what is not loaded


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


def test_importing_the_trainers_data_loads_no_heavy_package() -> None:
    code = "import sys, trainer.data; print([m for m in ('jax', 'grain', 'pyarrow', 'tokenizers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
