"""What closes the loop, for a page of scores: before and after a calibration, and steps as they ran and as forecast."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reports import draw
from reports.timeline import gantt
from simulator.results.measurement import MeasurementTable
from simulator.results.timeline import KINDS, STREAMS, Timeline
from simulator.results.validation import ScoredRow, ValidationResult

MOST_OPS, MOST_TIMELINES = 20, 4
_ON_NETWORK = ("all-to-all", "tensor", "parameters", "gradients")


def before_and_after(before: ValidationResult, after: ValidationResult) -> str:
    """Median absolute error by op class, with the profile as shipped and as calibrated; the same rows both times."""
    first = {(r.table, r.id): r for r in before.scored}
    both = [(first[r.table, r.id], r) for r in after.scored if (r.table, r.id) in first]
    groups: dict[str, list[tuple[ScoredRow, ScoredRow]]] = defaultdict(list)
    for pair in both:
        groups[pair[1].op_class].append(pair)
    if not groups:
        return ""
    names = sorted(groups, key=lambda n: -_weight(groups[n]))[:MOST_OPS]
    fig = draw.figure(len(names), "median absolute error", tickformat=".0%")
    fig.update_layout(barmode="group", height=34 * len(names) + 90)
    for side, what, colour in ((0, "as shipped", draw.GREY), (1, "calibrated", draw.BLUE)):
        errors = [float(np.median([abs(pair[side].error) for pair in groups[n]])) for n in names]
        hover = [f"{draw.label(n)}, {what}: {e:.1%} of {len(groups[n])}" for n, e in zip(names, errors, strict=True)]
        draw.bar(fig, errors, what, colour, hover)
    draw.name_rows(fig, [draw.label(n) for n in names])
    said = "Steps first, then ops by the seconds that they miss; the same rows with both profiles."
    drawn = draw.figure_html(fig, "before-after", "median absolute error by op class")
    return f"<h2>Before and after</h2><p>{said}</p>{drawn}"


def _weight(pairs: Sequence[tuple[ScoredRow, ScoredRow]]) -> float:
    """Seconds missed after calibration; steps come first."""
    if pairs[0][1].op_class == "step":
        return float("inf")
    return sum(abs(b.forecast - b.measured) for _, b in pairs if b.unit == "s")


def side_by_side(measured: MeasurementTable, simulated: Mapping[str, Timeline], names: Mapping[str, str]) -> str:
    """For some jobs a real step of every device below the simulated one, on one scale; both by job hash."""
    out = []
    for i, (key, parts) in enumerate(list(measured.timelines.items())[:MOST_TIMELINES]):
        if key in simulated and parts:
            name = html.escape(names.get(key, key[:12]))
            fig = gantt(joined(simulated[key], parts))
            out.append(f"<h3>{name}</h3>{draw.figure_html(fig, f'steps-{i}', f'{name}, simulated and measured')}")
    if not out:
        return ""
    said = (
        "Simulated above, below it a step of each device under the profiler, which slows it. Imbalance is waiting for"
        " the others."
    )
    return f"<h2>Timelines</h2><p>{said}</p>" + "".join(out)


def joined(simulated: Timeline, parts: Sequence[tuple[int, str, float, float]]) -> Timeline:
    """The first device class of a simulated timeline and the measured devices as one timeline."""
    own = simulated.device == 0
    devices = sorted({d for d, _, _, _ in parts})
    place = {d: i + 1 for i, d in enumerate(devices)}
    kinds = [KINDS.index(k) for _, k, _, _ in parts]
    streams = [STREAMS.index("network" if k in _ON_NETWORK else "compute") for _, k, _, _ in parts]
    n = len(parts)

    def column(name: str, more: Sequence[Any], dtype: Any) -> Any:
        return np.concatenate([np.asarray(getattr(simulated, name))[own], np.asarray(more, dtype)])

    step = max(simulated.step_s, *(end for _, _, _, end in parts))
    return Timeline(
        classes=("simulated", *(f"device {d}, traced" for d in devices)),
        replicas=(1,) * (len(devices) + 1),
        device=column("device", [place[d] for d, _, _, _ in parts], np.int32),
        stream=column("stream", streams, np.int8),
        kind=column("kind", kinds, np.int8),
        chunk=column("chunk", [0] * n, np.int16),
        microbatch=column("microbatch", [0] * n, np.int32),
        start_s=column("start_s", [a for _, _, a, _ in parts], np.float64),
        end_s=column("end_s", [b for _, _, _, b in parts], np.float64),
        predecessor=column("predecessor", [-1] * n, np.int64),
        step_s=step,
    )


def spread_of(measured: MeasurementTable) -> str:
    """How far two measurements of one job were apart, where the table has any: no forecast can be nearer."""
    steps: dict[str, list[float]] = defaultdict(list)
    for row in measured.rows:
        if row.kind == "step" and row.seconds is not None:
            steps[row.job_hash].append(row.seconds)
    off = [max(s) / min(s) - 1 for s in steps.values() if len(s) > 1]
    if not off:
        return ""
    said = f"{float(np.median(off)):.1%} apart in the median of {len(off)} jobs, {max(off):.1%} at most"
    return f'<p class="sub">One job measured twice, interleaved: {html.escape(said)}.</p>'
