"""Sums and products within groups, without a loop over the groups; and parts from dense vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulator.network.coflow import Part

Array = NDArray[np.float64]
Index = NDArray[np.int64]


def sums(key: Index, weight: Array, count: int = 0) -> Array:
    """Sum of `weight` for every key 0, 1, ... (at least `count` of them), along the last axis of several at once."""
    if weight.ndim == 1:
        return np.bincount(key, weight, minlength=count).astype(np.float64, copy=False)
    lead, count = weight.shape[:-1], max(count, int(key.max(initial=-1)) + 1)
    rows = int(np.prod(lead))
    every = (np.arange(rows)[:, None] * count + key).ravel()
    found: Array = np.bincount(every, weight.ravel(), minlength=rows * count).astype(np.float64, copy=False)
    return found.reshape(*lead, count)


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


def largest_product(rows: Array, columns: Array, outer: Index, inner: Index) -> Array:
    """max rows[i] * columns[j] over pairs of equal `outer` and different `inner` (Z each), 0 without any.

    Along the last axis of `rows` and `columns`, which may have others before it.
    """
    if not outer.size:
        return np.zeros(rows.shape[:-1])
    number, count = compact(outer, inner)
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(count))
    r = np.maximum.reduceat(rows[..., order], starts, axis=-1)
    c = np.maximum.reduceat(columns[..., order], starts, axis=-1)
    # Numbers ascend with `outer`: each of its values is a run of them.
    out = outer[order][starts]
    runs = np.flatnonzero(np.diff(out, prepend=-1))
    lengths = np.diff(runs, append=count)

    def spread(values: Array) -> Array:
        found: Array = np.repeat(values, lengths, axis=-1)
        return found

    best = spread(np.maximum.reduceat(c, runs, axis=-1))
    top = c == best
    second = spread(np.maximum.reduceat(np.where(top, 0.0, c), runs, axis=-1))
    only = spread(np.add.reduceat(top.astype(np.int64), runs, axis=-1)) == 1
    # The best column may be in the row's own inner domain: then the next best counts.
    found: Array = (r * np.where(top & only, second, best)).max(axis=-1)
    return found


def make_part(level: str, bytes_: Array, flows: Array, largest: float) -> Part:
    """A part from dense vectors (one number per link), with only the links that it uses."""
    used = np.flatnonzero(bytes_)
    return Part(level, used, bytes_[used], flows[used], largest)
