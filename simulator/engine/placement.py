"""Which rank holds which experts, and what load that puts on the ranks.

Letters: E experts, R ranks. A placement is a list of experts per rank; an expert on several ranks has that many copies,
and every copy takes an equal part of its load.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from hw_profiles.files import inside
from hw_profiles.yaml_reader import parse_yaml, read_text

Ranks = list[list[int]]
Loads = NDArray[np.float64] | Sequence[float]

# Swapping stops this close above the mean or the hottest copy, and other numbers of copies are tried only beyond NEAR
# the mean: the noise of a microbatch is larger.
GOOD_ENOUGH, NEAR = 1.001, 1.01


def place_contiguous(experts: int, ranks: int) -> Ranks:
    """Expert e on rank e // (E / R)."""
    each = experts // ranks
    return [list(range(r * each, (r + 1) * each)) for r in range(ranks)]


def place_dealt(loads_E: Loads, ranks: int) -> Ranks:
    """Experts dealt to ranks in turn, from the most to the least loaded; ties by index."""
    order = sorted(range(len(loads_E)), key=lambda e: (-loads_E[e], e))
    return [order[r::ranks] for r in range(ranks)]


def split_matrix(placement: Ranks, experts: int) -> NDArray[np.float64]:
    """Part of each expert's load that each rank takes, [R, E]: one over the number of copies."""
    held = np.zeros((len(placement), experts))
    for r, own in enumerate(placement):
        held[r, own] = 1.0
    out: NDArray[np.float64] = held / held.sum(axis=0)
    return out


def rank_loads(loads_E: Loads, placement: Ranks) -> NDArray[np.float64]:
    """Load of each rank, [R] (or [..., R]), in the unit of `loads_E`."""
    loads: NDArray[np.float64] = np.asarray(loads_E, dtype=np.float64)
    out: NDArray[np.float64] = loads @ split_matrix(placement, loads.shape[-1]).T
    return out


def balance(loads_E: Loads, ranks: int, slots_per_rank: int) -> Ranks:
    """A placement with a low busiest rank, never above the contiguous one's; deterministic.

    Copies of the hottest experts fill the slots that E experts leave free, then longest processing time first with
    equal slots (Graham 1969), then swaps out of the busiest rank: DeepSeek's load balancer (EPLB) in one level. Extra
    slots stay empty only where that is better. `slots_per_rank` is at least E / R and at most E.
    """
    loads = [float(x) for x in loads_E]
    least, mean = min(slots_per_rank, len(loads) // ranks), sum(loads) / ranks
    contiguous = place_contiguous(len(loads), ranks)
    peak, best = max(sum(loads[e] for e in own) for own in contiguous), contiguous
    tries = [(least, 1)]
    if slots_per_rank > least:
        # An expert with a copy on every rank leaves the next ones whole; and lumpy copies can be worse than none.
        limits = dict.fromkeys((ranks, max(1, ranks - 1), (3 * ranks + 3) // 4, (ranks + 1) // 2))
        tries = [(slots_per_rank, most) for most in limits] + tries
    for slots, most in tries:
        highest, plan = _pack_and_swap(loads, ranks, slots, most)
        # The plan with its slots in use wins a tie with the contiguous one.
        if highest <= peak * (1 + 1e-12) if best is contiguous else highest < peak:
            peak, best = highest, plan
        if highest <= NEAR * mean:
            break
    return [sorted(own) for own in best]


def _copies(loads: list[float], total: int, most: int) -> list[int]:
    """Copies of each expert, `total` in all if `most` of one allow it, the next to the one with most load per copy."""
    copies = [1] * len(loads)
    heap = [(-x, e) for e, x in enumerate(loads)] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(total - len(loads)):
        if not heap:
            break
        _, e = heapq.heappop(heap)
        copies[e] += 1
        if copies[e] < most:
            heapq.heappush(heap, (-loads[e] / copies[e], e))
    return copies


def _pack_and_swap(loads: list[float], ranks: int, slots: int, most: int) -> tuple[float, Ranks]:
    copies = _copies(loads, ranks * slots, most)
    single = [x / n for x, n in zip(loads, copies, strict=True)]
    plan = _pack(single, copies, ranks, slots)
    return _swap(plan, single, GOOD_ENOUGH * max(sum(loads) / ranks, *single)), plan


def _pack(single: list[float], copies: list[int], ranks: int, slots: int) -> Ranks:
    """Copies from the largest on, each to the least loaded rank with a free slot that has not that expert yet."""
    plan: Ranks = [[] for _ in range(ranks)]
    free = [(0.0, r) for r in range(ranks)]
    for e in sorted(range(len(single)), key=lambda e: (-single[e], e)):
        for _ in range(copies[e]):
            passed = []
            while free and e in plan[free[0][1]]:
                passed.append(heapq.heappop(free))
            if free:
                load, r = heapq.heappop(free)
                plan[r].append(e)
                load += single[e]
            else:
                # Every rank with a free slot has e already: one that has not makes room by handing an expert over.
                load, r = passed.pop(0)
                q = next(q for q, own in enumerate(plan) if e not in own)
                moved = next(f for f in reversed(plan[q]) if f not in plan[r])
                plan[q][plan[q].index(moved)] = e
                plan[r].append(moved)
                load += single[moved]
            if len(plan[r]) < slots:
                heapq.heappush(free, (load, r))
            for back in passed:
                heapq.heappush(free, back)
    return plan


def _swap(plan: Ranks, single: list[float], goal: float) -> float:
    """Swap an expert of the busiest rank for a smaller one of a light rank while that lowers the busier of the two.

    Changes `plan`, and returns the load of its busiest rank.
    """
    at = [sum(single[e] for e in own) for own in plan]
    # Bounded, since each swap may gain little; packings of some hundred experts end within some dozen.
    for _ in range(4 * len(plan)):
        p = max(range(len(plan)), key=lambda r: (at[r], -r))
        if at[p] <= goal:
            break
        best: tuple[float, int, int, int] | None = None
        for q in heapq.nsmallest(16, range(len(plan)), key=lambda r: (at[r], r)):
            for a in plan[p]:
                for b in plan[q]:
                    d = single[a] - single[b]
                    if 0 < d < at[p] - at[q] and a not in plan[q] and b not in plan[p]:
                        higher = max(at[p] - d, at[q] + d)
                        if best is None or higher < best[0]:
                            best = (higher, q, a, b)
        if best is None or best[0] >= at[p] * (1 - 1e-9):
            break
        _, q, a, b = best
        plan[p][plan[p].index(a)], plan[q][plan[q].index(b)] = b, a
        at[p], at[q] = at[p] - single[a] + single[b], at[q] + single[a] - single[b]
    return max(at)


def read_placement(name: str, folder: Path, layers: int, experts: int, ranks: int) -> list[Ranks]:
    """The placement of each layer from the JSON or YAML file `name` in `folder`.

    One list of experts per rank for all layers, or a list of such lists, one per layer; an expert may stand on several
    ranks. Raises QuestionError for a file outside the folder, a wrong number of layers or ranks, an unknown or missing
    expert.
    """
    start = f"training.routing.placement_file = {name!r:.60}"
    path = inside(name, folder, start)
    text = read_text(path, start)
    data: Any
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise QuestionError(f"{start}: not JSON") from None
    else:
        data = parse_yaml(text, start)
    if not isinstance(data, list) or not data or not all(isinstance(x, list) and x for x in data):
        raise QuestionError(f"{start}: must be a list of lists: the experts of each rank")
    plans = data if isinstance(data[0][0], list) else [data]
    if len(plans) not in (1, layers):
        raise QuestionError(f"{start}: places {len(plans)} layers; the model has {layers} with experts")
    for i, plan in enumerate(plans):
        _check(plan, f"{start}, layer {i}" if len(plans) > 1 else start, experts, ranks)
    return plans * (layers // len(plans))


def _check(plan: Any, start: str, experts: int, ranks: int) -> None:
    if not isinstance(plan, list) or len(plan) != ranks:
        count = len(plan) if isinstance(plan, list) else "no"
        raise QuestionError(f"{start}: {count} ranks; plan.expert is {ranks}")
    seen: set[int] = set()
    for r, own in enumerate(plan):
        if not isinstance(own, list) or not own:
            raise QuestionError(f"{start}, rank {r}: must be a list of experts")
        for e in own:
            if isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < experts:
                raise QuestionError(f"{start}, rank {r}: {e!r:.40} is no expert; they are 0 to {experts - 1}")
        if len(set(own)) < len(own):
            raise QuestionError(f"{start}, rank {r}: has an expert twice; copies belong on different ranks")
        seen.update(own)
    if len(seen) < experts:
        raise QuestionError(f"{start}: expert {min(set(range(experts)) - seen)} is on no rank")
