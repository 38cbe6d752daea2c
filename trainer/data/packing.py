"""Pieces of a token stream, and causal examples made of them.

Letters: B batch, S sequence, E examples of an epoch, T tokens of the stream, M documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer

Batch = dict[str, NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Where the examples of an epoch lie in the stream: `length_E` tokens from `start_E`."""

    start_E: NDArray[np.int64]
    length_E: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Examples in an epoch."""
        return len(self.start_E)


def cut(stream: Stream, length: int, *, packed: bool, with_eos: bool = True) -> Pieces:
    """Pieces of at most `length` tokens that cover each token of the stream once.

    Packed, the stream is cut every `length` tokens, whatever documents lie there; else each document by itself, from
    its start (`with_eos=False`: without its last token).
    """
    if packed:
        start_E = np.arange(0, stream.tokens, length, dtype=np.int64)
        return Pieces(start_E, np.minimum(length, stream.tokens - start_E))
    first_M, end_M = stream.offset_M[:-1], stream.offset_M[1:] - (not with_eos)
    count_M = -(-(end_M - first_M) // length)
    document_E = np.repeat(np.arange(len(first_M)), count_M)
    nth_E = np.arange(len(document_E)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    start_E = first_M[document_E] + nth_E * length
    return Pieces(start_E, np.minimum(length, end_M[document_E] - start_E))


def take(stream: Stream, start_B: NDArray[np.int64], length_B: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """token_BS: the pieces of the stream side by side, with 0 after the end of each."""
    place_BS = start_B[:, None] + np.arange(length)
    token_BS: NDArray[np.int32] = stream.token_T[np.minimum(place_BS, stream.tokens - 1)].astype(np.int32)
    token_BS[np.arange(length) >= length_B[:, None]] = 0
    return token_BS


def causal_batch(
    stream: Stream, tokenizer: Tokenizer, start_B: NDArray[np.int64], length_B: NDArray[np.int64], length: int
) -> Batch:
    """tokens_BS, targets_BS, segments_BS, positions_BS, weights_BS of pieces, for next-token prediction.

    The targets are the piece; each input is the token before its target in the document, so that a document longer
    than S loses no target where it is cut; at a document's start the input is bos. Segments count the documents of an
    example from 1 and positions restart with each, so that attention can stay within a document; a document cut in two
    starts anew at position 0. Padding has segment, position and weight 0.
    """
    targets_BS = take(stream, start_B, length_B, length)
    before_B1 = stream.token_T[np.maximum(start_B - 1, 0)].astype(np.int32)[:, None]
    tokens_BS = np.concatenate([before_B1, targets_BS[:, :-1]], axis=1)
    begins_BS = _begins(stream, start_B, length_B, length)
    tokens_BS[begins_BS] = tokenizer.bos
    real_BS = np.arange(length) < length_B[:, None]
    opens_BS = begins_BS.copy()
    opens_BS[:, 0] = True
    segments_BS = np.cumsum(opens_BS, axis=1, dtype=np.int32)
    place_S = np.arange(length, dtype=np.int32)
    positions_BS = place_S - np.maximum.accumulate(np.where(opens_BS, place_S, 0), axis=1)
    return {
        "tokens_BS": np.where(real_BS, tokens_BS, tokenizer.pad),
        "targets_BS": np.where(real_BS, targets_BS, tokenizer.pad),
        "segments_BS": np.where(real_BS, segments_BS, 0),
        "positions_BS": np.where(real_BS, positions_BS, 0),
        "weights_BS": real_BS.astype(np.int32),
    }


def _begins(stream: Stream, start_B: NDArray[np.int64], length_B: NDArray[np.int64], length: int) -> NDArray[Any]:
    """begins_BS: whether a document begins at the place."""
    low_B = np.searchsorted(stream.offset_M, start_B, side="left")
    high_B = np.searchsorted(stream.offset_M, start_B + length_B, side="left")
    count_B = high_B - low_B
    row_N = np.repeat(np.arange(len(start_B)), count_B)
    nth_N = np.arange(len(row_N)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    begins_BS = np.zeros((len(start_B), length), dtype=bool)
    begins_BS[row_N, stream.offset_M[low_B[row_N] + nth_N] - start_B[row_N]] = True
    return begins_BS
