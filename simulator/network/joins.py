"""Sums and products within groups, without a loop over the groups; and parts from dense vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Part

Array = NDArray[np.float64]
Index = NDArray[np.int64]


def sums(key: Index, weight: Array, count: int = 0) -> Array:
    """Sum of `weight` for every key 0, 1, ... (at least `count` of them)."""
    return np.bincount(key, weight, minlength=count).astype(np.float64, copy=False)


def compact(*keys: Index) -> tuple[Index, int]:
    """Numbers 0, 1, ... for the distinct combinations of `keys` (Z), and how many there are."""
    key = keys[0]
    for more in keys[1:]:
        key = key * (int(more.max(initial=0)) + 1) + more
    _, number = np.unique(key, return_inverse=True)
    return number.astype(np.int64), int(number.max(initial=-1)) + 1


def pairs_within(left: Index, right: Index) -> tuple[Index, Index]:
    """All (i, j) with left[i] == right[j], as two index vectors."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    begin = np.searchsorted(ordered, left, "left")
    count = np.searchsorted(ordered, left, "right") - begin
    i = np.repeat(np.arange(left.size), count)
    within = np.arange(i.size) - np.repeat(np.cumsum(count) - count, count)
    return i, order[begin[i] + within]


def largest_product(rows: Array, columns: Array, outer: Index, inner: Index) -> float:
    """max rows[i] * columns[j] over pairs of equal `outer` and different `inner` (Z each), 0 without any."""
    if not rows.size:
        return 0.0
    number, count = compact(outer, inner)
    first = np.zeros(count, dtype=np.int64)
    first[number] = np.arange(number.size)
    r, c = np.zeros(count), np.zeros(count)
    np.maximum.at(r, number, rows)
    np.maximum.at(c, number, columns)
    out = outer[first]
    order = np.lexsort((-c, out))
    starts = np.flatnonzero(np.diff(out[order], prepend=-1))
    lengths = np.diff(starts, append=count)
    best = np.repeat(c[order][starts], lengths)
    second = np.where(lengths > 1, c[order][np.minimum(starts + 1, count - 1)], 0.0)
    # The best column may be in the row's own inner domain: then the next best counts.
    best[starts] = second
    return float((r[order] * best).max())


def make_part(level: str, bytes_: Array, flows: Array, largest: float) -> Part:
    """A part from dense vectors (one number per link), with only the links that it uses."""
    used = np.flatnonzero(bytes_)
    return Part(level, used, bytes_[used], flows[used], largest)
