"""The difference of two steps as one HTML page: a waterfall from the first to the second, and the table behind it."""

from __future__ import annotations

import html
from pathlib import Path

from hw_profiles.files import write_whole
from reports import draw, tables, units
from reports.differences import NOTHING, PART_WORDS, shown_rows, signed_seconds
from reports.page import page
from reports.parts import words
from simulator.results.comparison import Comparison, Difference, Side


def write_comparison_page(c: Comparison, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_whole(path, render(c).encode())


def render(c: Comparison) -> str:
    """The page as text; the same comparison gives the same bytes."""
    undo = draw.fixed_json()
    try:
        said = f"{c.a.name} and {c.b.name}: {signed_seconds(c.difference_s)} a step, by {c.engine}"
        body = [f'<p class="sub">{html.escape(said)}; seconds are means over devices.</p>', _sides(c)]
        if c.changed:
            changed = [
                (n, "none" if a is None else words(a), "none" if b is None else words(b)) for n, a, b in c.changed
            ]
            body += ["<h2>What was changed</h2>", tables.table(("field", "A", "B"), changed)]
        body += ["<h2>From A to B</h2>", draw.figure_html(_waterfall(c), "waterfall", "the difference, piece by piece")]
        body += ["<h2>All rows</h2>", _table(c)]
    finally:
        undo()
    return page("\n".join(body), f"moecast: from {c.a.name} to {c.b.name}")


def _sides(c: Comparison) -> str:
    def column(s: Side) -> tuple[str, ...]:
        usd = "no price" if s.usd_per_1b_tokens is None else units.dollars(s.usd_per_1b_tokens)
        return (
            s.model, f"{s.cluster}, {s.devices:,} devices", f"{s.tokens_per_step:,.0f}", units.seconds(s.step_time_s),
            units.significant(s.tokens_per_s_per_device), units.percent(s.mfu),
            units.memory_of(s.memory_peak_bytes, s.memory_capacity_bytes), usd,
        )  # fmt: skip

    names = ("model", "cluster", "tokens a step", "step time", "tokens/s a device", "MFU", "memory", "per 1B tokens")
    rows = list(zip(names, column(c.a), column(c.b), strict=True))
    misfits = [6] if any(s.memory_peak_bytes > s.memory_capacity_bytes for s in (c.a, c.b)) else []
    return tables.table(("", f"A: {c.a.name}", f"B: {c.b.name}"), rows, loud=misfits)


def _leaves(c: Comparison) -> list[Difference]:
    """Rows that are no sums of other shown rows: op classes, and parts without any."""
    rows = shown_rows(c)
    with_ops = {r.part for r in rows if r.name}
    return [r for r in rows if r.name or r.part not in with_ops]


def _waterfall(c: Comparison) -> draw.Figure:
    """The first step, a bar for each difference where the last one ended, and the second step."""
    rows = [r for r in _leaves(c) if r.difference_s]
    factor, unit = units.time_scale(max(c.a.step_time_s, c.b.step_time_s))
    ends = [c.a.step_time_s]
    for r in rows:
        ends.append(ends[-1] + r.difference_s)
    low = min(ends)
    # Of two nearly equal steps, bars from zero would hide what differs.
    start = 0.0 if low < 0.6 * max(ends) else low - 0.5 * (max(ends) - low)
    axis = {"range": [draw.rounded(start / factor), draw.rounded((max(ends) + 0.02 * (max(ends) - start)) / factor)]}
    fig = draw.figure(len(rows) + 2, f"time per step ({unit})", **axis)
    names = ["A", *(f"{PART_WORDS[r.part]} · {r.name}" if r.name else PART_WORDS[r.part] for r in rows), "B"]

    def add(name: str, colour: str, at: dict[int, tuple[float, float, float]]) -> None:
        n = len(names)
        values = [(at[i][1] - at[i][0]) / factor if i in at else 0.0 for i in range(n)]
        hover = [f"{draw.label(names[i], 60)}: {signed_seconds(at[i][2])}" if i in at else ""
                 for i in range(n)]  # fmt: skip
        base = [draw.rounded(at[i][0] / factor) if i in at else 0.0 for i in range(n)]
        draw.bar(fig, values, name, colour, hover, base=base)

    steps = {0: (start, ends[0], ends[0]), len(names) - 1: (start, ends[-1], ends[-1])}
    add("step", draw.STEEL, steps)
    slower = {i: (ends[i - 1], ends[i], r.difference_s) for i, r in enumerate(rows, 1) if r.difference_s > 0}
    faster = {i: (ends[i], ends[i - 1], r.difference_s) for i, r in enumerate(rows, 1) if r.difference_s < 0}
    add("longer in B", draw.ORANGE, slower)
    add("shorter in B", draw.TEAL, faster)
    draw.name_rows(fig, [draw.label(n) for n in names])
    return fig


def _table(c: Comparison) -> str:
    rows = [
        (PART_WORDS[r.part], r.name or "(no ops)", units.seconds(r.a_s), units.seconds(r.b_s),
         signed_seconds(r.difference_s), f"{100 * r.difference_s / c.a.step_time_s:+.2f} %")
        for r in c.rows
        if max(abs(r.a_s), abs(r.b_s)) > NOTHING * c.a.step_time_s
    ]  # fmt: skip
    rows.append(
        ("step", "", units.seconds(c.a.step_time_s), units.seconds(c.b.step_time_s), signed_seconds(c.difference_s),
         f"{100 * c.difference_s / c.a.step_time_s:+.2f} %")
    )  # fmt: skip
    head = ("part", "op class", "A", "B", "difference", "of A")
    return tables.table(head, rows, numbers=(2, 3, 4, 5), caption="Differences add up to that of the steps.")
