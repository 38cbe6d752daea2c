"""From documents to examples: packing and span corruption by hand, and laws over random documents."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from trainer.data.packing import causal_batch, cut, take
from trainer.data.span_corruption import Noise, Shape, corrupt, draw_noise, fit_shape
from trainer.data.stream import Stream, build_stream
from trainer_texts import BYTES, TEXTS, letters

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
