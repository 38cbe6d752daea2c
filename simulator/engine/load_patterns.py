"""Which load every expert rank has in an all-to-all: a few vectors that stand for those of all microbatches.

Letters: L layers with experts of a stage, M microbatches, G expert groups, R ranks of a group. A vector of loads makes
a matrix of bytes (every rank sends as much as every other, each gets its load), and each matrix is a coflow that has to
be built and solved: so a stage's microbatches are put in order of their busiest rank and split into classes of equal
count, and the microbatch in the middle of a class stands for it.

The layers of a pass follow each other, each with its own busiest rank. One vector stands for all: the mean of the
layers' sorted loads, so that its largest is the mean of the layers' largest, dealt to the ranks in the order of their
loads over all these layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.engine.loads import ExpertLoads

# Classes of microbatches of a stage and group.
CLASSES = 4
# Microbatches of loads of their own that are made into coflows together, a direction of DualPipe each: one after the
# other costs more time, and all at once memory for what is sent much later.
TOGETHER = 64
# A busiest rank this close to the mean is even: what normal draws leave of rounding.
EVEN = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class LoadPattern:
    """Load of each expert rank over the mean, [R]; identity tells patterns apart, since coflows are kept by it.

    `family` are the patterns of its stage and group that are made into coflows together.
    """

    ranks_R: NDArray[np.float64]
    family: list[LoadPattern] = field(default_factory=list, repr=False)

    @property
    def excess(self) -> float:
        """The busiest rank over the mean, minus one."""
        return float(self.ranks_R.max()) - 1


Patterns = Callable[[int, int, int], LoadPattern | None]


def no_pattern(group: int, stage: int, microbatch: int) -> None:
    """Even loads everywhere."""
    del group, stage, microbatch


def load_patterns(loads: ExpertLoads, classes: int | None = CLASSES) -> Patterns:
    """The pattern of (group, model stage, microbatch), None where all ranks have the same load.

    `classes` is how many patterns a stage and group has at most, None for one of every microbatch's own. Under a
    capacity slots pad every rank to the same bytes, so that all are None.
    """
    plan = loads.plan
    found: dict[tuple[int, int], list[LoadPattern | None]] = {}
    for stage in range(plan.stages):
        layers = [i for i, x in enumerate(plan.layers) if x.stage == stage]
        if not layers or not plan.dropless or plan.ranks == 1:
            continue
        excess_GM = np.array(
            [[loads.excess(g, stage, m) for m in range(plan.microbatches)] for g in range(plan.groups)]
        )
        if excess_GM.max() < EVEN:
            continue
        chosen_GC, class_GM = _classes(excess_GM, plan.microbatches if classes is None else classes)
        stands_GC = _vectors(loads, layers, chosen_GC)
        for g in range(plan.groups):
            # Asked for at about the same time; under DualPipe every other microbatch goes the other way.
            families: dict[tuple[int, int], list[LoadPattern]] = {}
            own: list[LoadPattern | None] = []
            for chosen, v in zip(chosen_GC[g].tolist(), stands_GC[g], strict=True):
                when = (0, 0) if classes is not None else (chosen % 2, chosen // 2 // TOGETHER)
                family = families.setdefault(when, [])
                own.append(LoadPattern(v, family) if v.max() > 1 + EVEN else None)
                family += [p for p in own[-1:] if p is not None]
            found[g, stage] = [own[c] for c in class_GM[g].tolist()]

    if not any(p for own in found.values() for p in own):
        # The network need not tell its links apart.
        return no_pattern

    def pattern(group: int, stage: int, microbatch: int) -> LoadPattern | None:
        own = found.get((group, stage))
        return own[microbatch] if own else None

    return pattern


def _classes(excess_GM: NDArray[np.float64], classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The microbatch that stands for each class, [G, C], and the class of each microbatch, [G, M]."""
    groups, microbatches = excess_GM.shape
    count = min(classes, microbatches)
    order = np.argsort(excess_GM, axis=1, kind="stable")
    bounds = np.arange(count + 1) * microbatches // count
    chosen = order[:, (bounds[:-1] + bounds[1:] - 1) // 2]
    class_GM = np.empty((groups, microbatches), dtype=np.int64)
    np.put_along_axis(class_GM, order, np.repeat(np.arange(count), np.diff(bounds))[None, :], axis=1)
    return chosen, class_GM


def _vectors(loads: ExpertLoads, layers: list[int], chosen_GC: NDArray[np.int64]) -> NDArray[np.float64]:
    """Loads over the mean, [G, C, R], of the chosen microbatches."""
    total = ordered = np.zeros(1)
    for i in layers:
        drawn = np.take_along_axis(loads.draw_layer(i), chosen_GC[:, :, None], axis=1)
        drawn = drawn / drawn.mean(axis=-1, keepdims=True)
        total, ordered = total + drawn, ordered + np.sort(drawn, axis=-1)
    out: NDArray[np.float64] = np.empty_like(total)
    np.put_along_axis(out, np.argsort(total, axis=-1, kind="stable"), ordered / len(layers), axis=-1)
    return out
