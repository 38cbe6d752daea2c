"""Scores of a validation on a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.results.validation import Group, ScoredRow, Scores, ValidationResult

# Lines that a part of the answer has where --all does not ask for the rest.
MOST_GROUPS, MOST_REASONS, WORST = 8, 12, 5
LEGEND = (
    "error: forecast / measured - 1; med., mean, p90: of the absolute error; bias: its median with the sign; rank:"
    " Spearman; cover: rows inside the interval that their forecast states; base, p90: median and 90th percentile of"
    " one constant"
)
TITLES = {
    "table": "table",
    "quantity": "quantity",
    "chip": "chip",
    "model": "model",
    "op_class": "op class",
    "kind": "kind",
}
WIDEST_NAME = 24


def print_validation(result: ValidationResult, html: Path | None, every: bool) -> None:
    """The counts, the scores beside the baseline, groups, what was skipped, and the worst rows."""
    from rich.console import Console

    console = Console()
    for t in result.tables:
        of = "" if t.chosen_rows == t.table_rows else f" of {t.table_rows:,}"
        _say(console, f"{t.name}: {t.kind}, {t.chosen_rows:,}{of} rows")
    held = f"{len(result.scored):,} forecast, {len(result.skipped):,} not, of {result.rows:,}"
    _say(console, f"{held}; profiles {result.profile}, steps by {result.engine}")
    _scores(console, result, every)
    for c in result.constants:
        what = f"{c.table} {c.quantity.replace('_', ' ')}"
        _paragraph(console, f"baseline of {what}: {c.value:.3g} {c.meaning}, least mean error on these {c.rows:,} rows")
    for note in result.notes:
        _paragraph(console, f"note: {note}")
    _worst(console, result.scored)
    _reasons(console, result, every)
    if html is not None:
        console.print(f"report: {html}", style="dim", highlight=False, markup=False)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _paragraph(console: Console, text: str) -> None:
    """Text of more than a line, the further ones indented."""
    _say(console, textwrap.fill(text, console.width, subsequent_indent="  "))


def _scores(console: Console, result: ValidationResult, every: bool) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("errors in percent", overflow="ellipsis", no_wrap=True, max_width=WIDEST_NAME)
    for name in ("rows", "med.", "mean", "p90", "bias", "rank", "cover", "base", "p90"):
        table.add_column(name, justify="right", no_wrap=True, min_width=4)
    _line(table, "all", result.scores, result.baseline)
    if result.held_out is not None:
        _line(table, "rows no fit has seen", result.held_out, None)
    for by, members in _grouped(result.groups):
        if len(members) < 2:
            continue
        table.add_section()
        shown = members if every else members[:MOST_GROUPS]
        for g in shown:
            _line(
                table, f"{TITLES[by]} {g.name}" if by in ("table", "quantity", "kind") else g.name, g.scores, g.baseline
            )
        if len(members) > len(shown):
            table.add_row(f"and {len(members) - len(shown)} more (--all)", style="dim")
    console.print(table)
    speeds = result.scores.flops_spearman
    if speeds is not None:
        beside = result.baseline.flops_spearman if result.baseline else None
        told = _rank(beside) or "none (the same for every row)"
        _say(console, f"rank of achieved FLOP/s a device: {_rank(speeds)}, baseline {told}")
    sample = result.scores
    if sample.coverage_in_sample is not None:
        share = f"{100 * sample.coverage_in_sample:.0f} % of {sample.intervals_in_sample:,}"
        _say(console, f"stated intervals cover {share} rows that they were read from (cover counts others only)")
    _paragraph(console, LEGEND)


def _grouped(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    out: dict[str, list[Group]] = {}
    for g in groups:
        out.setdefault(g.by, []).append(g)
    return list(out.items())


def _line(table: object, name: str, s: Scores, baseline: Scores | None) -> None:
    cells = [
        name, f"{s.rows:,}", _percent(s.median_abs_error), _percent(s.mean_abs_error), _percent(s.p90_abs_error),
        _percent(s.bias, signed=True), _rank(s.spearman), _percent(s.coverage),
        _percent(baseline.median_abs_error if baseline else None),
        _percent(baseline.p90_abs_error if baseline else None),
    ]  # fmt: skip
    table.add_row(*cells)  # type: ignore[attr-defined]


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return ""
    sign = "+" if signed else ""
    digits = 1 if abs(value) < 0.0995 else 0
    return f"{100 * value:{sign}.{digits}f}"


def _rank(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _worst(console: Console, rows: Sequence[ScoredRow]) -> None:
    if not rows:
        return
    worst = sorted(rows, key=lambda r: -abs(r.error))[:WORST]
    _say(console, "worst rows:")
    for r in worst:
        about = ", ".join(word for word in (r.chip, r.model, r.op_class) if word)
        line = f"  {100 * r.error:+7.0f}%  {r.table} {r.id}: {about}"
        _say(console, line if len(line) <= console.width else line[: console.width - 1] + "…")


def _reasons(console: Console, result: ValidationResult, every: bool) -> None:
    reasons = list(result.reasons.items())
    if not reasons:
        return
    _say(console, f"{len(result.skipped):,} rows without a forecast, by reason:")
    for reason, count in reasons if every else reasons[:MOST_REASONS]:
        lines = textwrap.wrap(reason, max(console.width - 10, 20)) or [""]
        _say(console, "\n".join(f"  {'' if i else format(count, ','):>6}  {line}" for i, line in enumerate(lines)))
    left = reasons[MOST_REASONS:]
    if left and not every:
        rest = sum(count for _, count in left)
        _say(console, f"  {rest:6,}  for {len(left)} other reasons (--all, or --json with every row)")
