"""T5's objective: spans of the input are replaced by sentinels, and the targets say what stood there.

Formulas and their order of operations as in `random_spans_noise_mask`, `random_spans_helper` and the two
`..._span_to_unique_sentinel` of T5's published preprocessors (arXiv:1910.10683, section 3.1.4). Departures: our random
bits differ, and a draw too short to have noise stays whole. As in T5's code, and unlike its figure 2, targets end in
eos without a last sentinel.

Letters: B batch, R raw tokens, S sequence of the encoder, U sequence of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from trainer.data.draws import draw_words
from trainer.data.packing import Batch
from trainer.data.tokenizer import Tokenizer

MAX_RAW_LENGTH = 2**20
NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Noise:
    """How much of a text is corrupted: the fraction of its tokens, and the mean length of a span in tokens."""

    density: float
    mean_span: float

    def counts(self, length_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(noise tokens_B, spans_B) of raw texts: round(n density), round(noise / mean span), at least 1 of either."""
        noise_B = np.round(length_B * self.density).astype(np.int64)
        noise_B = np.minimum(np.maximum(noise_B, 1), length_B - 1)
        spans_B = np.maximum(np.round(noise_B / self.mean_span).astype(np.int64), 1)
        return noise_B, np.minimum(spans_B, np.minimum(noise_B, length_B - noise_B))

    def lengths(self, raw: int) -> tuple[int, int]:
        """(input tokens, target tokens) of `raw` raw tokens, the eos of each included."""
        noise_B, spans_B = self.counts(np.array([raw]))
        return raw - int(noise_B[0]) + int(spans_B[0]) + 1, int(noise_B[0]) + int(spans_B[0]) + 1


@dataclass(frozen=True)
class Shape:
    """Lengths of span corruption in tokens: of the raw text, of the encoder's inputs and of the decoder's targets."""

    raw: int
    encoder: int
    decoder: int
    spans: int


def fit_shape(noise: Noise, encoder: int, decoder: int) -> Shape:
    """The longest raw text whose inputs fit the encoder; 568 tokens for 512 at T5's 0.15 and 3.0, with 114 targets.

    Raises QuestionError where the encoder holds no two tokens, or the decoder not the targets.
    """
    # Inputs never get shorter as the raw text gets longer, so the largest that fits is found by halving.
    low, high = 1, MAX_RAW_LENGTH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if noise.lengths(middle)[0] <= encoder else (low, middle - 1)
    if low < 2:
        raise QuestionError(
            f"batch.length.encoder = {encoder}: span corruption needs at least {noise.lengths(2)[0]} tokens"
        )
    if low == MAX_RAW_LENGTH:
        raise QuestionError(
            f"batch.length.encoder = {encoder}: at noise_density {noise.density:g} and mean_span {noise.mean_span:g} "
            f"its raw text has more than {MAX_RAW_LENGTH:,} tokens"
        )
    needed = noise.lengths(low)[1]
    if decoder < needed:
        raise QuestionError(
            f"batch.length.decoder = {decoder}: must be at least {needed}; span corruption at noise_density "
            f"{noise.density:g} and mean_span {noise.mean_span:g} makes {needed} targets of {encoder} encoder tokens"
        )
    return Shape(low, encoder, decoder, int(noise.counts(np.array([low]))[1][0]))


def draw_noise(noise: Noise, length_B: NDArray[np.int64], raw: int, key: int, row_B: NDArray[np.int64]) -> NDArray[Any]:
    """noise_BR: which tokens of each raw text are noise, a function of key and row number.

    Noise and the rest are each cut at random into as many spans, every way to cut equally likely, and take turns; the
    text begins with a span that stays. The numbers of tokens and spans are fixed by the length.
    """
    noise_count_B, spans_B = noise.counts(length_B)
    words_B2R = draw_words(key, row_B, 2 * raw)
    noise_starts_BR = _segment(words_B2R[:, :raw], noise_count_B, spans_B)
    clean_starts_BR = _segment(words_B2R[:, raw:], length_B - noise_count_B, spans_B)
    # Length of span i of either kind, then the places where the spans of the interleaved text end.
    most = max(int(spans_B.max(initial=0)), 1)
    noise_BI = _span_lengths(noise_starts_BR, noise_count_B, most)
    clean_BI = _span_lengths(clean_starts_BR, length_B - noise_count_B, most)
    both_BJ = np.stack([clean_BI, noise_BI], axis=2).reshape(len(length_B), 2 * most)
    end_BJ = np.cumsum(both_BJ, axis=1)
    turns_BR = np.zeros((len(length_B), raw + 1), dtype=np.int64)
    np.add.at(turns_BR, (np.arange(len(length_B))[:, None], np.minimum(end_BJ, raw)), 1)
    noise_BR: NDArray[Any] = np.cumsum(turns_BR[:, :raw], axis=1) % 2 == 1
    noise_BR &= np.arange(raw) < length_B[:, None]
    return noise_BR


def _segment(words_BR: NDArray[np.uint64], items_B: NDArray[np.int64], spans_B: NDArray[np.int64]) -> NDArray[Any]:
    """starts_BR: a random choice of spans - 1 of the places 1 ... items - 1, and place 0: where spans start."""
    place_R = np.arange(words_BR.shape[1])
    inside_BR = (place_R >= 1) & (place_R < items_B[:, None])
    # The place in the low bits keeps two equal draws apart.
    low = np.uint64(MAX_RAW_LENGTH - 1)
    words_BR = np.where(inside_BR, (words_BR & ~low) | place_R.astype(np.uint64), NEVER)
    last_B1 = np.take_along_axis(np.sort(words_BR, axis=1), np.maximum(spans_B - 2, 0)[:, None], axis=1)
    starts_BR = inside_BR & (words_BR <= last_B1) & (spans_B[:, None] >= 2)
    starts_BR[:, 0] = spans_B >= 1
    return starts_BR


def _span_lengths(starts_BR: NDArray[Any], items_B: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """length_BI: tokens of span i; 0 beyond the last."""
    rows, raw = starts_BR.shape
    number_BR = np.cumsum(starts_BR, axis=1) - 1
    length_BI = np.zeros((rows, most), dtype=np.int64)
    row_N, place_N = np.nonzero((np.arange(raw) < items_B[:, None]) & (number_BR >= 0))
    np.add.at(length_BI, (row_N, number_BR[row_N, place_N]), 1)
    return length_BI


def corrupt(
    raw_BR: NDArray[np.int32], length_B: NDArray[np.int64], noise_BR: NDArray[Any], shape: Shape, eos: int, vocab: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """(inputs_BS, their lengths_B, targets_BU, their lengths_B), with 0 after the end of each.

    Sentinel i of an example is id vocab - 1 - i. Inputs: the text with each span of noise replaced by its sentinel.
    Targets: each span of noise after its sentinel. Both end in eos.
    """
    real_BR = np.arange(shape.raw) < length_B[:, None]
    opens_BR = noise_BR.copy()
    opens_BR[:, 1:] &= ~noise_BR[:, :-1]
    span_BR = np.cumsum(opens_BR, axis=1)
    sentinel_BR = (vocab - span_BR).astype(np.int32)

    kept_BR = real_BR & (~noise_BR | opens_BR)
    inputs_BS, input_length_B = _pack(np.where(opens_BR, sentinel_BR, raw_BR), kept_BR, shape.encoder, eos)

    # Each raw place offers two target places, for a sentinel and for the token itself.
    both_BRP = np.stack([sentinel_BR, raw_BR], axis=2)
    wanted_BRP = np.stack([opens_BR, noise_BR], axis=2)
    rows = len(raw_BR)
    targets_BU, target_length_B = _pack(both_BRP.reshape(rows, -1), wanted_BRP.reshape(rows, -1), shape.decoder, eos)
    return inputs_BS, input_length_B, targets_BU, target_length_B


def span_batch(
    raw_BR: NDArray[np.int32],
    length_B: NDArray[np.int64],
    noise_BR: NDArray[Any],
    shape: Shape,
    tokenizer: Tokenizer,
    vocab: int,
) -> Batch:
    """encoder_tokens_BS, encoder_segments_BS, encoder_positions_BS, and of length U: tokens, targets, segments,
    positions, weights.

    The decoder reads its targets one place late, after padding (T5's start token). An example is one segment even
    where its raw text holds several documents (T5 joins documents before it cuts them), and padding is segment 0.
    """
    inputs_BS, input_length_B, targets_BU, target_length_B = corrupt(
        raw_BR, length_B, noise_BR, shape, tokenizer.eos, vocab
    )
    inside_BS = np.arange(shape.encoder) < input_length_B[:, None]
    inside_BU = np.arange(shape.decoder) < target_length_B[:, None]
    late_BU = np.concatenate([np.full((len(raw_BR), 1), tokenizer.pad, np.int32), targets_BU[:, :-1]], axis=1)
    ones_BU = inside_BU.astype(np.int32)
    return {
        "encoder_tokens_BS": np.where(inside_BS, inputs_BS, np.int32(tokenizer.pad)),
        "encoder_segments_BS": inside_BS.astype(np.int32),
        "encoder_positions_BS": np.where(inside_BS, np.arange(shape.encoder, dtype=np.int32), np.int32(0)),
        "tokens_BS": np.where(inside_BU, late_BU, np.int32(tokenizer.pad)),
        "targets_BS": np.where(inside_BU, targets_BU, np.int32(tokenizer.pad)),
        "segments_BS": ones_BU,
        "positions_BS": np.where(inside_BU, np.arange(shape.decoder, dtype=np.int32), np.int32(0)),
        "weights_BS": ones_BU.copy(),
    }


def _pack(
    ids_BN: NDArray[np.int32], wanted_BN: NDArray[Any], length: int, eos: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(packed_BS, lengths_B): the wanted ids of each row from its start, then eos."""
    count_B = wanted_BN.sum(axis=1, dtype=np.int64)
    packed_BS = np.zeros((len(ids_BN), length), dtype=np.int32)
    # Both masks have count_B true places in each row and are read row by row, so the ids keep their order.
    packed_BS[np.arange(length) < count_B[:, None]] = ids_BN[wanted_BN]
    packed_BS[np.arange(len(ids_BN)), count_B] = eos
    return packed_BS, count_B + 1
