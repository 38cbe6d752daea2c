"""A forecast as Plotly figures, one function per figure; None where there is nothing to draw.

Times are drawn in the unit that suits the largest, memory in binary units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from reports import units
from reports.draw import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    ROSE,
    STEEL,
    TEAL,
    YELLOW,
    Figure,
    bar,
    decades,
    figure,
    label,
    limit,
    name_rows,
    rounded,
)
from reports.parts import memory_parts, time_parts, unique_names
from simulator.results.forecast import Collective, Forecast, OpRow

# In the order of parts.TIME_PARTS and parts.MEMORY_PARTS.
TIME_COLOURS = (BLUE, ORANGE, YELLOW, PURPLE, ROSE, GREY)
MEMORY_COLOURS = (BLUE, TEAL, PURPLE, ORANGE, YELLOW, ROSE, GREEN, STEEL, GREY)
BOUND_COLOURS = {"compute": BLUE, "memory": ORANGE, "overhead": PURPLE, "launch": PURPLE}
SPARE_COLOURS = (TEAL, YELLOW, ROSE, GREEN, STEEL, GREY)
TOP = 15


def time_breakdown(forecasts: Sequence[Forecast]) -> Figure:
    """Where the time of a step goes: one stacked bar per forecast."""
    factor, unit = units.time_scale(max(f.step_time_s for f in forecasts))
    fig = figure(max(len(forecasts), 2), f"time per step ({unit})")
    parts = [time_parts(f) for f in forecasts]
    for i, colour in enumerate(TIME_COLOURS):
        part, values = parts[0][i][0], [p[i][1] for p in parts]
        if any(values):
            shares = [units.percent(units.share(v, f.step_time_s)) for v, f in zip(values, forecasts, strict=True)]
            hover = [f"{part}: {units.seconds(v)}, {s} of the step" for v, s in zip(values, shares, strict=True)]
            bar(fig, [v / factor for v in values], part, colour, hover)
    name_rows(fig, [label(n, 24) for n in unique_names(forecasts)] if len(forecasts) > 1 else [""])
    return fig


def bound_colours(ops: Sequence[OpRow]) -> dict[str, str]:
    """A colour for every bound that occurs, known ones first."""
    found = {op.bound for op in ops}
    colours = {b: c for b, c in BOUND_COLOURS.items() if b in found}
    for i, bound in enumerate(sorted(found - set(colours))):
        colours[bound] = SPARE_COLOURS[i % len(SPARE_COLOURS)]
    return colours


def top_ops(forecast: Forecast) -> Figure | None:
    """The longest compute ops, coloured by what bounds them."""
    ops = sorted(forecast.ops, key=lambda op: -op.time_s)[:TOP]
    if not ops:
        return None
    factor, unit = units.time_scale(ops[0].time_s)
    fig = figure(len(ops), f"time per step ({unit})")
    hover = [f"{label(op.scope, 60)} {label(op.phase)}: {units.seconds(op.time_s)}" for op in ops]
    for bound, colour in bound_colours(ops).items():
        values = [op.time_s / factor if op.bound == bound else 0.0 for op in ops]
        bar(fig, values, f"{label(bound)}-bound", colour, hover)
    name_rows(fig, [f"{label(op.scope)} · {label(op.phase, 12)}" for op in ops])
    return fig


def roofline(forecast: Forecast) -> Figure | None:
    """FLOP/s reached by each op over its FLOPs per byte, below the chip's peak; area follows time."""
    ops = [op for op in forecast.ops if op.flops > 0 and op.bytes > 0 and op.time_s > 0]
    if not ops:
        return None
    peak = forecast.evidence.peak_flops_per_s / 1e12
    speeds = [op.flops / op.time_s / 1e12 for op in ops]
    fig = figure(TOP, "FLOP per byte of device memory", **decades([op.flops / op.bytes for op in ops]))
    # Room above the line for its label.
    fig.update_yaxes(title={"text": "TFLOP/s per device"}, **decades([*speeds, 1.5 * peak] if peak else speeds))
    longest = max(op.time_s for op in ops)
    for bound, colour in bound_colours(ops).items():
        some = [op for op in ops if op.bound == bound]
        fig.add_scatter(
            x=[rounded(op.flops / op.bytes) for op in some],
            y=[rounded(op.flops / op.time_s / 1e12) for op in some],
            mode="markers",
            name=f"{label(bound)}-bound",
            marker={
                "color": colour,
                "opacity": 0.75,
                "size": [round(6 + 22 * math.sqrt(op.time_s / longest), 1) for op in some],
                "line": {"width": 0},
            },
            hovertext=[_roof_text(op) for op in some],
            hoverinfo="text",
        )
    if peak:
        limit(fig, y=peak)
        said = f"peak {label(forecast.evidence.peak_dtype, 16)}: {units.flops_rate(1e12 * peak)}"
        # Plotly places shapes by value but notes by logarithm on such an axis.
        fig.add_annotation(
            text=said, xref="paper", x=0, y=rounded(math.log10(peak)), xanchor="left", yanchor="bottom",
            showarrow=False,
        )  # fmt: skip
    return fig


def _roof_text(op: OpRow) -> str:
    reached = f"{units.significant(op.flops / op.bytes)} FLOP/B, {units.flops_rate(op.flops / op.time_s)}"
    return f"{label(op.scope, 60)} {label(op.phase)}: {reached}, {units.seconds(op.time_s)}"


def memory_by_stage(forecast: Forecast) -> Figure:
    """Memory of one device of each pipeline stage by part, against the capacity."""
    memory, stages = forecast.memory, forecast.memory.by_stage
    largest = max(memory.capacity_bytes, memory.peak_bytes)
    factor, unit = units.memory_scale(largest)
    axis = {"range": [0, rounded(1.04 * largest / factor)]}
    fig = figure(max(len(stages), 2), f"memory per device ({unit})", **axis)
    parts = [memory_parts(s) for s in stages]
    for i, colour in enumerate(MEMORY_COLOURS):
        part, values = parts[0][i][0], [p[i][1] for p in parts]
        if any(values):
            hover = [f"stage {s.stage}, {part}: {units.memory(v)}" for s, v in zip(stages, values, strict=True)]
            bar(fig, [v / factor for v in values], part, colour, hover)
    if memory.capacity_bytes > 0:
        limit(fig, x=memory.capacity_bytes / factor)
    name_rows(fig, [f"stage {s.stage}" for s in stages])
    return fig


def collectives(forecast: Forecast) -> Figure | None:
    """Time of each collective: what waits (exposed) and what hides behind compute."""
    rows = sorted(forecast.collectives, key=lambda c: -c.time_s)[:TOP]
    if not rows:
        return None
    factor, unit = units.time_scale(rows[0].time_s)
    fig = figure(len(rows), f"time per step ({unit})")

    def add(said: str, colour: str, value: Callable[[Collective], float]) -> None:
        hover = [f"{label(c.scope, 60)}: {units.seconds(value(c))} {said} of {units.seconds(c.time_s)}" for c in rows]
        bar(fig, [value(c) / factor for c in rows], said, colour, hover)

    add("exposed", ORANGE, lambda c: c.exposed_s)
    add("hidden", STEEL, lambda c: max(0.0, c.time_s - c.exposed_s))
    name_rows(fig, [f"{label(c.scope)} · {c.group_size}" for c in rows])
    return fig


def compare_step_time(forecasts: Sequence[Forecast]) -> Figure:
    """Step times with their intervals."""
    factor, unit = units.time_scale(max(max(f.step_time_s, f.step_time_interval_s[1]) for f in forecasts))
    hover = [f"{units.seconds(f.step_time_s)}, {units.seconds_range(*f.step_time_interval_s)}" for f in forecasts]
    # An interval need not contain the value (a biased profile), and a whisker cannot point backwards.
    above = [max(0.0, f.step_time_interval_s[1] - f.step_time_s) / factor for f in forecasts]
    below = [max(0.0, f.step_time_s - f.step_time_interval_s[0]) / factor for f in forecasts]
    whisker = {"type": "data", "color": INK, "thickness": 1.5}
    whisker |= {"array": [rounded(v) for v in above], "arrayminus": [rounded(v) for v in below]}
    return _compare(forecasts, [f.step_time_s / factor for f in forecasts], f"step time ({unit})", hover, whisker)


def compare_tokens(forecasts: Sequence[Forecast]) -> Figure:
    """Tokens per second and device."""
    values = [f.tokens_per_s_per_device for f in forecasts]
    return _compare(forecasts, values, "tokens/s per device", [units.rate(v, "tokens") for v in values])


def compare_mfu(forecasts: Sequence[Forecast]) -> Figure:
    """Model FLOPs utilisation."""
    values = [f.mfu for f in forecasts]
    return _compare(forecasts, [100 * v for v in values], "MFU (% of peak)", [units.percent(v) for v in values])


def compare_memory(forecasts: Sequence[Forecast]) -> Figure:
    """Peak memory of the fullest device as a share of its capacity."""
    values = [units.share(f.memory.peak_bytes, f.memory.capacity_bytes) for f in forecasts]
    hover = [units.memory_of(f.memory.peak_bytes, f.memory.capacity_bytes) for f in forecasts]
    fig = _compare(forecasts, [100 * v for v in values], "peak memory (% of capacity)", hover)
    fig.update_traces(marker={"color": [BLUE if f.memory.fits else RED for f in forecasts]})
    limit(fig, x=100)
    fig.update_xaxes(range=[0, rounded(max(108, *(103 * v for v in values)))])
    return fig


def _compare(
    forecasts: Sequence[Forecast],
    values: Sequence[float],
    title: str,
    hover: Sequence[str],
    whisker: Mapping[str, object] | None = None,
) -> Figure:
    fig = figure(max(len(forecasts), 2), title)
    names = [label(n, 24) for n in unique_names(forecasts)]
    bar(fig, values, title, BLUE, [f"{n}: {h}" for n, h in zip(names, hover, strict=True)], error_x=whisker)
    name_rows(fig, names)
    return fig
