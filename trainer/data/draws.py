"""Random numbers that are a function of what they are for: no state to save, the same on every machine and version.

Letters: B rows, N numbers of a row.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, figure 17).
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def make_key(*parts: object) -> int:
    """A 64-bit key for the words and numbers in `parts`; different parts give unrelated keys."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def draw_words(key: int, row_B: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """words_BN: `count` words of 64 uniform bits for each row, a function of key, row number and place only."""
    start_B = _finish(np.uint64(key) ^ _finish((row_B.astype(np.uint64) + np.uint64(1)) * GOLDEN))
    place_N = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return _finish(start_B[:, None] + place_N)


def draw_order(key: int, epoch: int, count: int) -> NDArray[np.int64]:
    """order_N: a permutation of the numbers below `count`, another one for each epoch."""
    words_N = draw_words(key, np.array([epoch]), count)[0]
    return np.argsort(words_N, kind="stable")


def _finish(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))
