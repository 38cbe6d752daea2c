"""Grids and sensitivities as HTML pages: heat maps made of table cells, since pictures are forbidden, and a tornado."""

from __future__ import annotations

import html
from itertools import product
from pathlib import Path

from hw_profiles.files import write_whole
from reports import draw, tables, units
from reports.page import page
from reports.parts import words
from simulator.results.whatif import Cell, Grid, Sensitivity

MOST_MAPS, MOST_ROWS, MOST_BARS = 24, 2_000, 40


def write_grid_page(grid: Grid, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_whole(path, _grid(grid).encode())


def _grid(grid: Grid) -> str:
    said = f"{grid.job} on {grid.cluster}, by {grid.engine}: {len(grid.cells):,} cells"
    body = [f'<p class="sub">{html.escape(said)}</p>', "<h2>Step times</h2>", *_maps(grid), "<h2>All cells</h2>"]
    rows = [(*(words(v) for v in c.values.values()), *_cells(c)) for c in grid.cells[:MOST_ROWS]]
    loud = [i for i, c in enumerate(grid.cells[:MOST_ROWS]) if c.fits is False]
    head = (*grid.axes, "step", "memory", "fits", "MFU", "all-to-all exposed", "per 1B tokens", "refused by")
    n = len(grid.axes)
    body.append(tables.table(head, rows, numbers=(n, n + 1, n + 3, n + 4, n + 5), loud=loud))
    return page("\n".join(body), f"moecast: what if {grid.job}")


def _cells(c: Cell) -> tuple[str, ...]:
    if c.step_time_s is None:
        return ("",) * 6 + (c.refused or "",)
    usd = "no price" if c.usd_per_1b_tokens is None else units.dollars(c.usd_per_1b_tokens)
    return (
        units.seconds(c.step_time_s), units.memory(c.memory_peak_bytes or 0.0), "yes" if c.fits else "NO",
        units.percent(c.mfu or 0.0), units.seconds(c.all_to_all_exposed_s or 0.0), usd, "",
    )  # fmt: skip


def _maps(grid: Grid) -> list[str]:
    """One map of the last two fields for every combination of the others; darker takes longer."""
    names = list(grid.axes)
    across = names[-1]
    down = names[-2] if len(names) > 1 else None
    known = {tuple(map(repr, c.values.values())): c for c in grid.cells}
    times = [c.step_time_s for c in grid.cells if c.step_time_s is not None]
    low, high = min(times), max(times)
    out = []
    outer = list(product(*(grid.axes[n] for n in names[:-2])))
    for fixed in outer[:MOST_MAPS]:
        said = ", ".join(f"{n} = {words(v)}" for n, v in zip(names[:-2], fixed, strict=True)) or "step time"
        head = "".join(f"<th class=n>{html.escape(words(v))}</th>" for v in grid.axes[across])
        rows = []
        for v in grid.axes[down] if down else ("",):
            cells = []
            for w in grid.axes[across]:
                key = (*fixed, v, w) if down else (*fixed, w)
                cells.append(_heat(known[tuple(map(repr, key))], low, high))
            rows.append(f"<tr><th>{html.escape(words(v) if down else 'step')}</th>{''.join(cells)}</tr>")
        corner = html.escape(f"{down or ''} \\ {across}")
        out.append(
            f'<div class="wide"><p class="caption">{html.escape(said)}</p><table><thead><tr><th>{corner}</th>{head}'
            "</tr>"
            f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    if len(outer) > MOST_MAPS:
        out.append(f'<p class="sub">and {len(outer) - MOST_MAPS} more maps: their cells are in the table</p>')
    out.append('<p class="caption">Darker takes longer; struck out does not fit in memory; - breaks a rule.</p>')
    return out


def _heat(c: Cell, low: float, high: float) -> str:
    if c.step_time_s is None:
        return f'<td class=n title="{html.escape(c.refused or "", quote=True)}">-</td>'
    share = units.share(c.step_time_s - low, high - low)
    struck = "" if c.fits else ";text-decoration:line-through"
    style = f"background:rgba(224,123,57,{0.05 + 0.75 * share:.2f}){struck}"
    return f'<td class=n style="{style}">{units.seconds(c.step_time_s)}</td>'


def write_tornado_page(s: Sensitivity, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_whole(path, _tornado(s).encode())


def _tornado(s: Sensitivity) -> str:
    undo = draw.fixed_json()
    try:
        rows = [w for w in s.weights if w.elasticity is not None and abs(w.elasticity) >= 5e-4][:MOST_BARS]
        fig = draw.figure(len(rows), "% of step time for 1 % of the number")
        for said, colour, sign in (("shortens the step", draw.TEAL, -1), ("lengthens the step", draw.ORANGE, 1)):
            values = [w.elasticity or 0.0 if (w.elasticity or 0.0) * sign > 0 else 0.0 for w in rows]
            hover = [f"{draw.label(w.name, 60)}: {v:+.3f}" for w, v in zip(rows, values, strict=True)]
            draw.bar(fig, values, said, colour, hover)
        draw.name_rows(fig, [draw.label(w.name) for w in rows])
        drawn = draw.figure_html(fig, "tornado", "elasticity of the step time, heaviest first")
    finally:
        undo()
    body = [
        f'<p class="sub">{html.escape(s.job)} on {html.escape(s.cluster)}: {units.seconds(s.step_time_s)}</p>',
        drawn,
    ]
    cells = [
        (w.name, w.kind, f"{w.value:g}", "" if w.elasticity is None else f"{w.elasticity:+.4f}",
         f"{w.down:.4g} to {w.up:.4g} x", "" if w.better is None else f"{w.better:g}",
         "" if w.speed_up is None else f"{w.speed_up:.4f} x", w.refused or "")
        for w in s.weights
    ]  # fmt: skip
    head = ("number", "kind", "value", "weight", "varied", "twice as good", "step then faster", "refused")
    body += ["<h2>All numbers</h2>", tables.table(head, cells, numbers=(2, 3, 5, 6))]
    return page("\n".join(body), f"moecast: what weighs in {s.job}")
