"""Unions of intervals and what they share. Whole nanoseconds, so every sum is exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int]


def union(spans: Iterable[Span]) -> list[Span]:
    """The disjoint intervals, in order, that cover the same instants as `spans` (start, end)."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(spans: Sequence[Span]) -> int:
    """Nanoseconds of disjoint intervals."""
    return sum(end - start for start, end in spans)


def shared(a: Sequence[Span], b: Sequence[Span]) -> int:
    """Nanoseconds that lie both in a union and in another."""
    out = i = j = 0
    while i < len(a) and j < len(b):
        out += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return out
