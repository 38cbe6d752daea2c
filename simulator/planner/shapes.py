"""Pipelines in columns: the kinds of stages of P x V chunks, where the first of each kind is, what it holds.

A model has few kinds of stages (with the embedding, with a layer more, with the head), however many stages there are.
Rows whose pipelines have equally many kinds are worked on together: kind k of a row is that of its own pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.job.job import Job
from simulator.job.rules import chunks_of
from simulator.planner.table import keeps_stages
from simulator.workload.stages import Workload, count_pieces

Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One pipeline: the kind of every stage, the first stage of each kind, and what a kind holds (and its mirror)."""

    stages: int
    virtual: int
    kind_of: tuple[int, ...]
    first: tuple[int, ...]
    held: tuple[Counts, ...]
    workload: Workload


def pipeline_of(job: Job, schedule: str, stages: int, virtual: int) -> Pipeline:
    """The kinds of stages of `job` on `stages` x `virtual` chunks, its own layout where it fits."""
    layout = job.plan.stages if keeps_stages(job, stages, virtual) else None
    chunk_counts = count_pieces(job.model, chunks_of(job.model, layout, stages, virtual))
    counts = [[sum(each) for each in zip(*chunks, strict=True)] for chunks in chunk_counts]
    workload = Workload([], counts, chunk_counts)
    kinds: dict[Counts, int] = {}
    kind_of = tuple(kinds.setdefault(workload.held_counts(p, schedule), len(kinds)) for p in range(stages))
    first = tuple(kind_of.index(k) for k in range(len(kinds)))
    return Pipeline(stages, virtual, kind_of, first, tuple(kinds), workload)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of stage in columns: the first stage of its kind, how many there are, how often it holds each piece.

    `held[copy][piece]` are columns; the second copy is DualPipe's mirrored stage.
    """

    first: NDArray[np.int64]
    stages: NDArray[np.int64]
    held: tuple[tuple[NDArray[np.int64] | int, ...], ...]


def kinds_of(pipelines: Sequence[Pipeline], which: NDArray[np.intp]) -> list[Kind]:
    """The kinds of stages of rows on `pipelines[which]`, which all have equally many."""
    out = []
    for k in range(len(pipelines[0].first)):
        counts = np.array([p.held[k] for p in pipelines])
        held = []
        for copy in range(counts.shape[1]):
            columns = [counts[:, copy, piece] for piece in range(counts.shape[2])]
            held.append(tuple(int(c[0]) if np.all(c == c[0]) else c[which] for c in columns))
        first = np.array([p.first[k] for p in pipelines])[which]
        stages = np.array([p.kind_of.count(k) for p in pipelines])[which]
        out.append(Kind(first, stages, tuple(held)))
    return out
