"""Scores of a validation as one HTML page: parity, residuals, scores by group, worst rows, and what was left out."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from hw_profiles.files import write_whole
from reports import draw, tables, units
from reports.page import page
from reports.parts import signed_percent
from simulator.results.validation import Group, ScoredRow, Scores, ValidationResult

COLOURS = (draw.BLUE, draw.ORANGE, draw.TEAL, draw.PURPLE, draw.ROSE, draw.GREEN, draw.YELLOW, draw.STEEL)
# Rows of a table, boxes of a figure, groups of a grouping: JSON has all, and a page stays a page.
MOST_ROWS, MOST_BOXES, MOST_GROUPS = 400, 16, 14
NO_SCORES = Scores(0, None, None, None, None, None)
# Marks of the axis of residuals, which a logarithmic axis of less than a decade would do without.
COARSE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
FINE = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 2)
FEW_MARKS = 4.0
WORDS = {
    "table": "table", "quantity": "quantity", "chip": "chip", "model": "model", "op_class": "op class",
    "kind": "the table's kind",
}  # fmt: skip
SAID: dict[str, Callable[[float], str]] = {"s": units.seconds, "bytes": units.memory, "FLOPs": units.flops}
TITLES = {"s": "time, s", "bytes": "bytes", "FLOPs": "FLOPs"}


def write_validation_page(
    result: ValidationResult,
    path: Path,
    title: str = "moecast: forecasts beside measurements",
    more: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Writes the page to `path`, whole or not at all; `more` makes sections that follow the summary."""
    write_whole(path, render(result, title, more).encode())


def render(result: ValidationResult, title: str, more: Callable[[], Sequence[str]] = tuple) -> str:
    """The page as text; the same result gives the same bytes."""
    undo = draw.fixed_json()
    try:
        parts = _sections(result)
        body = "\n".join(part for part in (parts[0], *more(), *parts[1:]) if part)
    finally:
        undo()
    return page(body, title)


def _sections(result: ValidationResult) -> list[str]:
    rows = result.scored
    out = [_summary(result)]
    out += [f'<p class="warn">{html.escape(note)}</p>' for note in result.notes]
    if rows:
        out.append("<h2>Parity</h2>")
        by = _telling(rows)
        for unit in dict.fromkeys(r.unit for r in rows):
            out.append(_parity([r for r in rows if r.unit == unit], unit, by))
        out.append("<h2>Residuals</h2>")
        out += [_boxes(rows, name) for name in dict.fromkeys(["op_class", *([by] if by != "quantity" else []), "chip"])]
        out += ["<h2>Scores by group</h2>", _groups(result)]
        out += ["<h2>Rows, the worst first</h2>", _rows(rows)]
    out += ["<h2>Rows without a forecast</h2>", _reasons(result)]
    return out


def _summary(result: ValidationResult) -> str:
    s, b = result.scores, result.baseline or NO_SCORES
    used = ", ".join(f"{t.name} ({t.kind}, {t.chosen_rows:,} of {t.table_rows:,} rows)" for t in result.tables)
    sub = f"{used}; profiles {result.profile}; steps by {result.engine}"

    def card(value: str, what: str, beside: str = "") -> str:
        small = f"<small>{html.escape(beside)}</small>" if beside else ""
        return f'<div class="card"><b>{html.escape(value)}</b>{html.escape(what)}{small}</div>'

    cards = [
        card(
            f"{len(result.scored):,} of {result.rows:,}", "rows forecast", f"{len(result.skipped):,} without a forecast"
        ),
        card(_share(s.median_abs_error), "median of the absolute error", f"baseline {_share(b.median_abs_error)}"),
        card(_share(s.p90_abs_error), "its 90th percentile", f"baseline {_share(b.p90_abs_error)}"),
        card(_signed(s.bias), "bias (median error)", f"baseline {_signed(b.bias)}"),
    ]
    if s.spearman is not None:
        cards.append(card(f"{s.spearman:.3f}", "rank correlation", f"baseline {_rank(b.spearman)}"))
    if s.flops_spearman is not None:
        cards.append(
            card(f"{s.flops_spearman:.3f}", "the same of FLOP/s a device", f"baseline {_rank(b.flops_spearman)}")
        )
    if s.coverage is not None:
        cards.append(
            card(_share(s.coverage), "of measurements inside the stated interval", f"{s.intervals:,} rows state one")
        )
    if result.fitted_rows:
        cards.append(card(f"{result.fitted_rows:,}", "scored rows that the profiles were fitted on"))
    constants = [
        (c.table, c.quantity.replace("_", " "), f"{c.value:.3g}", c.meaning, f"{c.rows:,}") for c in result.constants
    ]
    told = tables.table(
        ("table", "quantity", "baseline's constant", "which is", "rows"), constants, (2, 4),
        "One constant a quantity, the least mean absolute error on the very rows that are scored",
    ) if constants else ""  # fmt: skip
    return f'<p class="sub">{html.escape(sub)}</p><div class="cards">{"".join(cards)}</div>{told}'


def _telling(rows: Sequence[ScoredRow]) -> str:
    """What tells most about the rows: the first of these that has several values."""
    return next(
        (by for by in ("table", "quantity", "op_class", "chip") if len({getattr(r, by) for r in rows}) > 1), "model"
    )


def _by_name(rows: Sequence[ScoredRow], by: str, most: int) -> list[tuple[str, list[ScoredRow]]]:
    """Rows by what they have in common, most rows first; the smallest groups together as `other`."""
    found: dict[str, list[ScoredRow]] = {}
    for r in rows:
        found.setdefault(getattr(r, by) or "not named", []).append(r)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) > most:
        rest = [r for _, members in ordered[most - 1 :] for r in members]
        ordered = [*ordered[: most - 1], (f"other ({len(ordered) - most + 1})", rest)]
    return ordered


def _parity(rows: Sequence[ScoredRow], unit: str, by: str) -> str:
    """Forecast over measured, both axes logarithmic; the diagonal is a perfect forecast."""
    seen = [r for r in rows if r.forecast > 0]
    if not seen:
        return ""
    both = [v for r in seen for v in (r.measured, r.forecast)]
    axis = draw.decades(both)
    fig = draw.figure(18, f"measured {TITLES[unit]}", **axis)
    fig.update_yaxes(title={"text": f"forecast {TITLES[unit]}"}, **axis)
    for (name, members), colour in zip(_by_name(seen, by, len(COLOURS)), COLOURS, strict=False):
        fig.add_scatter(
            x=[draw.rounded(r.measured) for r in members], y=[draw.rounded(r.forecast) for r in members],
            mode="markers", name=draw.label(name),
            marker={"color": colour, "size": 6, "opacity": 0.6, "line": {"width": 0}},
            hovertext=[_hover(r) for r in members], hoverinfo="text",
        )  # fmt: skip
    low, high = min(both), max(both)
    line = {"dash": "dash", "color": draw.INK, "width": 1.5}
    fig.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line)
    caption = f"{len(seen):,} rows by {WORDS[by]}; on the dashed line a forecast is right"
    if len(seen) < len(rows):
        caption += f"; {len(rows) - len(seen)} forecasts of nothing have no place on this scale"
    return draw.figure_html(fig, f"parity-{unit.lower()}", caption)


def _boxes(rows: Sequence[ScoredRow], by: str) -> str:
    """Forecast over measured of each group: box of quartiles, whiskers, outliers."""
    found = _by_name([r for r in rows if r.forecast > 0], by, MOST_BOXES)
    if not found:
        return ""
    ratios = [r.forecast / r.measured for _, members in found for r in members]
    fig = draw.figure(max(3, len(found)), "forecast / measured", type="log", rangemode="normal")
    finer = max(ratios) / min(ratios) < FEW_MARKS
    marks = [v for v in (FINE if finer else COARSE) if min(ratios) <= v <= max(ratios)]
    fig.update_xaxes(tickvals=marks, ticktext=[f"{v:g}" for v in marks])
    for i, (_, members) in enumerate(found):
        fig.add_box(
            x=[draw.rounded(r.forecast / r.measured) for r in members], y=[i] * len(members), orientation="h",
            marker={"color": draw.BLUE, "size": 3}, line={"width": 1.2}, boxpoints="outliers",
            hovertext=[_hover(r) for r in members], hoverinfo="text", showlegend=False,
        )  # fmt: skip
    draw.name_rows(fig, [f"{draw.label(name)} ({len(members):,})" for name, members in found])
    draw.limit(fig, x=1.0)
    return draw.figure_html(
        fig, f"residuals-{by}", f"By {WORDS[by]} (rows); left of the dashed line a forecast is too low"
    )


def _hover(r: ScoredRow) -> str:
    said = SAID[r.unit]
    about = ", ".join(word for word in (r.chip, r.model, r.op_class) if word)
    lines = [
        f"{r.table} {r.id}",
        about,
        f"forecast {said(r.forecast)}, measured {said(r.measured)}: {signed_percent(r.error)}",
    ]
    return "<br>".join(draw.label(line, 90) for line in lines)


def _groups(result: ValidationResult) -> str:
    found: dict[str, list[Group]] = {}
    for g in result.groups:
        found.setdefault(g.by, []).append(g)
    head = ("", "rows", "median", "mean", "p90", "bias", "rank", "covered", "baseline median", "baseline p90")
    out = []
    for by, members in found.items():
        if len(members) < 2 and by != "table":
            continue
        lines = [(g.name, *_cells(g.scores, g.baseline)) for g in members[:MOST_GROUPS]]
        more = f"; {len(members) - MOST_GROUPS} smaller ones are in the JSON" if len(members) > MOST_GROUPS else ""
        out.append(tables.table((WORDS[by], *head[1:]), lines, range(1, 10), f"By {WORDS[by]}{more}"))
    return "".join(out)


def _cells(s: Scores, baseline: Scores | None) -> tuple[str, ...]:
    b = baseline or NO_SCORES
    return (
        f"{s.rows:,}", _share(s.median_abs_error), _share(s.mean_abs_error), _share(s.p90_abs_error), _signed(s.bias),
        _rank(s.spearman), _share(s.coverage), _share(b.median_abs_error), _share(b.p90_abs_error),
    )  # fmt: skip


def _rows(rows: Sequence[ScoredRow]) -> str:
    worst = sorted(rows, key=lambda r: -abs(r.error))
    lines = []
    for r in worst[:MOST_ROWS]:
        said = SAID[r.unit]
        interval = f"{said(r.interval[0])} to {said(r.interval[1])}" if r.interval else ""
        beside = signed_percent(r.baseline / r.measured - 1) if r.baseline is not None else ""
        lines.append(
            (signed_percent(r.error), f"{r.table} {r.id}", r.chip, r.model, r.op_class, said(r.measured),
             said(r.forecast), interval, beside, r.fitted)
        )  # fmt: skip
    head = ("error", "row", "chip", "model", "op class", "measured", "forecast", "stated interval", "baseline's error",
            "fitted for")  # fmt: skip
    left = len(rows) - len(lines)
    caption = f"The {len(lines):,} worst; the other {left:,} are in the JSON" if left else ""
    return tables.table(head, lines, (0, 5, 6, 7, 8), caption)


def _reasons(result: ValidationResult) -> str:
    if not result.skipped:
        return "<p>None.</p>"
    first: dict[str, str] = {}
    for s in result.skipped:
        first.setdefault(s.reason, f"{s.table} {s.id}")
    lines = [(f"{n:,}", reason, first[reason]) for reason, n in result.reasons.items()]
    return tables.table(("rows", "reason", "such as"), lines, (0,))


def _share(value: float | None) -> str:
    return "" if value is None else units.percent(value)


def _signed(value: float | None) -> str:
    return "" if value is None else signed_percent(value)


def _rank(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
