"""What ran when, as figures: each stage's work over the step, its utilisation and memory, links and the critical path.

Drawn as bars and lines only. A heat map would be a picture inside the page, and the page's policy forbids pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reports import units
from reports.draw import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    ROSE,
    STEEL,
    TEAL,
    YELLOW,
    Figure,
    bar,
    figure,
    label,
    limit,
    name_rows,
    rounded,
)
from simulator.results.forecast import Events
from simulator.results.links import LinkUse
from simulator.results.timeline import KINDS, STREAMS, Timeline

# As the parts of a step are coloured: exchanges orange, other communication in yellows, host purple, imbalance rose.
KIND_COLOURS = {
    "forward": BLUE,
    "backward": TEAL,
    "input gradient": "#6cc3b6",
    "weight gradient": GREEN,
    "forward and backward": STEEL,
    "optimizer": "#7582d6",
    "all-to-all": ORANGE,
    "tensor": YELLOW,
    "parameters": "#a8842c",
    "gradients": "#e3c461",
    "host": PURPLE,
    "imbalance": ROSE,
}
LINE_COLOURS = (BLUE, ORANGE, TEAL, PURPLE, YELLOW, ROSE, GREEN, STEEL)
# A browser draws so many bars at once without a pause; more show only the step's beginning and end.
MOST_BARS = 4000
ENDS = 0.1
MOST_CLASSES = 32
MOST_LINES = 8
MOST_POINTS = 400
TOP_LINKS = 15
# Finer bins beat against the rhythm of the microbatches.
BINS = 48
LEVELS = 5
# On the compute stream, but nothing is worked on.
IDLE_KINDS = ("host", "imbalance")
_COMPUTE, _NETWORK, _HOST = (STREAMS.index(name) for name in ("compute", "network", "host"))


def shown_classes(timeline: Timeline) -> list[int]:
    """The device classes that figures show: all, or as many as a page holds, evenly spread."""
    n = len(timeline.classes)
    if n <= MOST_CLASSES:
        return list(range(n))
    return sorted({round(i * (n - 1) / (MOST_CLASSES - 1)) for i in range(MOST_CLASSES)})


def windows(timeline: Timeline) -> tuple[tuple[float, float], ...]:
    """The times (s) that the chart of rows shows: all, or equal parts at the beginning and the end."""
    shown = np.isin(timeline.device, shown_classes(timeline))
    start, end, step = timeline.start_s[shown], timeline.end_s[shown], timeline.step_s
    if len(start) <= MOST_BARS:
        return ((0.0, step),)
    share = ENDS
    while share > 1e-4 and ((start < share * step) | (end > (1 - share) * step)).sum() > MOST_BARS:
        share *= 0.8
    return ((0.0, share * step), ((1 - share) * step, step))


def gantt(timeline: Timeline) -> Figure:
    """Every row as a bar: one line per device class, compute above and network below, coloured by kind.

    What the host launches is left out: where the device waits for it, compute shows `host`.
    """
    classes = shown_classes(timeline)
    factor, unit = units.time_scale(timeline.step_s)
    parts = windows(timeline)
    fig = figure(len(classes), f"time ({unit})", rangemode="normal")
    # One or two classes deserve more than a line of text's height.
    fig.update_layout(barmode="overlay", height=max(28 * len(classes), 110) + 60)
    for n, (low, high) in enumerate(parts):
        # The second axis is the first one's twin.
        axis = fig.layout.xaxis.to_plotly_json() | {"range": [rounded(low / factor), rounded(high / factor)]}
        if len(parts) > 1:
            axis |= {"domain": [0, 0.49] if n == 0 else [0.51, 1], "anchor": "y"}
        fig.update_layout({"xaxis2" if n else "xaxis": axis})
    place = {c: y for y, c in enumerate(classes)}
    shown = timeline.stream != _HOST
    for k in (k for k in range(len(KINDS)) if ((timeline.kind == k) & shown).any()):
        for n, (low, high) in enumerate(parts):
            mine = shown & (timeline.kind == k) & (timeline.end_s > low) & (timeline.start_s < high)
            rows = [i for i in np.flatnonzero(mine).tolist() if int(timeline.device[i]) in place]
            # The legend knows a kind by its first trace; a name without bars would be a legend for nothing.
            if rows or n == 0:
                _bars(fig, timeline, rows, place, (low, high), factor, KINDS[k], "x2" if n else "x")
    name_rows(fig, [label(timeline.classes[c]) for c in classes])
    return fig


def _bars(
    fig: Figure,
    timeline: Timeline,
    rows: Sequence[int],
    place: dict[int, int],
    window: tuple[float, float],
    factor: float,
    kind: str,
    axis: str,
) -> None:
    starts = [max(float(timeline.start_s[i]), window[0]) for i in rows]
    ends = [min(float(timeline.end_s[i]), window[1]) for i in rows]
    below = [int(timeline.stream[i]) == _NETWORK for i in rows]
    fig.add_bar(
        x=[rounded((b - a) / factor) for a, b in zip(starts, ends, strict=True)],
        base=[rounded(a / factor) for a in starts],
        y=[place[int(timeline.device[i])] for i in rows],
        offset=[0.12 if b else -0.4 for b in below],
        width=[0.26 if b else 0.5 for b in below],
        orientation="h",
        name=kind if axis == "x" else None,
        marker={"color": KIND_COLOURS.get(kind, GREY), "line": {"width": 0}},
        xaxis=axis,
        hovertext=[_said(timeline, i) for i in rows],
        hovertemplate=f"{kind}%{{hovertext}}<extra></extra>",
    )


def _said(timeline: Timeline, i: int) -> str:
    microbatch, chunk = int(timeline.microbatch[i]), int(timeline.chunk[i])
    where = f" of microbatch {microbatch}" + (f", chunk {chunk}" if chunk else "") if microbatch >= 0 else ""
    return f"{where}: {units.seconds(float(timeline.end_s[i] - timeline.start_s[i]))}"


def working(timeline: Timeline, index: int) -> NDArray[np.bool_]:
    """Rows in which device class `index` is in a pass or an update, exposed transfers inside a row included."""
    idle = np.isin(timeline.kind, [KINDS.index(k) for k in IDLE_KINDS])
    mine: NDArray[np.bool_] = (timeline.device == index) & (timeline.stream == _COMPUTE) & ~idle
    return mine


def utilisation(timeline: Timeline) -> Figure:
    """How busy each class is over the whole step, in five shades; neighbouring bins of equal shade are one bar."""
    classes = shown_classes(timeline)
    factor, unit = units.time_scale(timeline.step_s)
    fig = figure(len(classes), f"time ({unit})", range=[0, rounded(timeline.step_s / factor)])
    fig.update_layout(barmode="overlay", height=max(28 * len(classes), 110) + 60)
    edges = np.linspace(0.0, timeline.step_s, BINS + 1)
    bars: list[list[tuple[int, int, int]]] = [[] for _ in range(LEVELS)]
    for y, c in enumerate(classes):
        mine = working(timeline, c)
        start, took = timeline.start_s[mine], (timeline.end_s - timeline.start_s)[mine]
        busy = np.diff(np.array([np.clip(t - start, 0, took).sum() for t in edges])) / (timeline.step_s / BINS)
        level = np.where(busy < 0.005, -1, np.minimum((busy * LEVELS).astype(int), LEVELS - 1))
        cuts = [0, *(np.flatnonzero(np.diff(level)) + 1).tolist(), BINS]
        for a, b in zip(cuts, cuts[1:], strict=False):
            if level[a] >= 0:
                bars[level[a]].append((y, a, b))
    for n, some in enumerate(bars):
        said = f"{100 * n // LEVELS} to {100 * (n + 1) // LEVELS} %"
        if some:
            fig.add_bar(
                x=[rounded((edges[b] - edges[a]) / factor) for _, a, b in some],
                base=[rounded(edges[a] / factor) for _, a, _ in some],
                y=[y for y, _, _ in some],
                # Else Plotly takes it from how far a trace's own bars are apart.
                width=0.84,
                orientation="h",
                name=f"busy {said}" if not any(bars[:n]) else said,
                marker={"color": f"rgba(63,135,204,{0.2 * (n + 1):.1f})", "line": {"width": 0}},
                hovertemplate=f"%{{base}} to %{{x}} {unit}: {said}<extra></extra>",
            )
    name_rows(fig, [label(timeline.classes[c]) for c in classes])
    return fig


def fullest(timeline: Timeline) -> list[int]:
    """The classes whose memory is drawn: all, or the fullest ones, in order."""
    peaks = [float(values.max()) if len(values) else 0.0 for _, values in timeline.memory]
    return sorted(sorted(range(len(peaks)), key=lambda c: (-peaks[c], c))[:MOST_LINES])


def memory_over_time(timeline: Timeline, capacity_bytes: float) -> Figure | None:
    """Bytes on one device of each class over the step, as steps, against the capacity."""
    classes = [c for c in fullest(timeline) if len(timeline.memory[c][0])]
    if not classes:
        return None
    largest = max(capacity_bytes, *(float(timeline.memory[c][1].max()) for c in classes))
    (factor, unit), (second, time_unit) = units.memory_scale(largest), units.time_scale(timeline.step_s)
    fig = figure(12, f"time ({time_unit})", range=[0, rounded(timeline.step_s / second)])
    fig.update_yaxes(title={"text": f"memory per device ({unit})"}, range=[0, rounded(1.05 * largest / factor)])
    for n, c in enumerate(classes):
        times, values = _steps(*timeline.memory[c], timeline.step_s)
        colour, name = LINE_COLOURS[n % len(LINE_COLOURS)], label(timeline.classes[c])
        fig.add_scatter(
            x=[rounded(t / second) for t in times],
            y=[rounded(v / factor) for v in values],
            mode="lines",
            name=name,
            marker={"color": colour},
            line={"color": colour, "shape": "hv", "width": 1.5},
            hovertemplate=f"{name}: %{{y}} {unit} at %{{x}} {time_unit}<extra></extra>",
        )
    if capacity_bytes > 0:
        limit(fig, y=capacity_bytes / factor)
    return fig


def _steps(times: NDArray[np.float64], values: NDArray[np.float64], step_s: float) -> tuple[list[float], list[float]]:
    """The curve up to the step's end; of many points the highest of each bin, since the peak is what matters."""
    if len(times) > MOST_POINTS:
        cuts = np.unique(np.searchsorted(times, np.linspace(0.0, step_s, MOST_POINTS + 1)[:-1]))
        cuts = cuts[cuts < len(times)]
        times, values = times[cuts], np.maximum.reduceat(values, cuts)
    return [*times.tolist(), step_s], [*values.tolist(), float(values[-1])]


def links(busiest: Sequence[LinkUse]) -> Figure | None:
    """Share of the step that the busiest links are busy, coloured by level."""
    rows = sorted(busiest, key=lambda use: -use.utilisation)[:TOP_LINKS]
    if not rows:
        return None
    fig = figure(max(len(rows), 2), "busy (% of the step)")
    hover = [f"{label(u.name, 60)}: {units.traffic(u.bytes)} of {label(u.level)}" for u in rows]
    for n, level in enumerate(dict.fromkeys(u.level for u in rows)):
        values = [100 * u.utilisation if u.level == level else 0.0 for u in rows]
        bar(fig, values, label(level), LINE_COLOURS[n % len(LINE_COLOURS)], hover)
    name_rows(fig, [label(u.name) for u in rows])
    return fig


def critical_path(events: Events) -> Figure | None:
    """Seconds of each kind of work on the critical path, as one stacked bar."""
    total = sum(events.critical_path_s.values())
    if not total:
        return None
    factor, unit = units.time_scale(total)
    fig = figure(2, f"time on the critical path ({unit})")
    for kind, value in events.critical_path_s.items():
        said = f"{label(kind)}: {units.seconds(value)}, {units.percent(value / total)} of the path"
        bar(fig, [value / factor], label(kind), KIND_COLOURS.get(kind, GREY), [said])
    name_rows(fig, [""])
    return fig


def formula(events: Events, step_s: float) -> Figure:
    """The step by the closed form, by events, and over draws of the routing."""
    rows = [("closed form", events.closed_form_step_time_s), ("events", step_s)]
    rows += [(f"draws, {name}", value) for name, value in (events.percentiles_s or {}).items()]
    factor, unit = units.time_scale(max(value for _, value in rows))
    fig = figure(max(len(rows), 2), f"step time ({unit})")
    colours = [GREY, BLUE, *[STEEL] * (len(rows) - 2)]
    bar(fig, [value / factor for _, value in rows], "step time", colours, [units.seconds(v) for _, v in rows])
    name_rows(fig, [label(name) for name, _ in rows])
    return fig
