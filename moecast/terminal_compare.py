"""The difference of two steps on a terminal: both in numbers, what was changed, and rows that add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecast.terminal_text import Say
from reports import units
from reports.differences import PART_WORDS, shown_rows, signed_seconds
from reports.parts import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from simulator.results.comparison import Comparison, Side

BAR = 6
MOST_CHANGES = 8
TEXT = 30


def print_comparison(c: Comparison, console: Console) -> None:
    """Print a comparison."""
    say = Say(console)
    ratio = c.b.step_time_s / c.a.step_time_s
    verdict = f"B takes {units.significant(ratio)} times the step of A ({signed_seconds(c.difference_s)}, {c.engine})"
    say.line(verdict, "bold")
    say.line("")
    say.table(_sides(c, say))
    if c.a.tokens_per_step != c.b.tokens_per_step:
        say.line("The steps train different numbers of tokens: compare tokens/s per device.", "yellow")
    say.line("")
    say.line("Where the difference comes from (mean over devices)", "bold")
    say.table(_rows(c, say))


def _sides(c: Comparison, say: Say) -> Table:
    table = say.new(("", "left"), ("A", "wrap"), ("B", "wrap"))

    def add(name: str, of: Any) -> None:
        table.add_row(say.text(name, "dim"), say.text(of(c.a)), say.text(of(c.b)))

    add("job", lambda s: s.name)
    add("model", lambda s: s.model)
    add("cluster", lambda s: f"{s.cluster}, {s.devices:,} devices")
    add("step time", lambda s: units.seconds(s.step_time_s))
    add("tokens/s a device", lambda s: units.significant(s.tokens_per_s_per_device))
    add("MFU", lambda s: units.percent(s.mfu))
    add("memory", _memory)
    add("per 1B tokens", lambda s: "no price" if s.usd_per_1b_tokens is None else units.dollars(s.usd_per_1b_tokens))
    for name, one, two in c.changed[:MOST_CHANGES]:
        table.add_row(say.text(name, "cyan"), say.text(_short(one), "cyan"), say.text(_short(two), "cyan"))
    if len(c.changed) > MOST_CHANGES:
        table.add_row(say.text(f"and {len(c.changed) - MOST_CHANGES} more (--json)", "dim"), "", "")
    return table


def _memory(s: Side) -> str:
    over = "" if s.memory_peak_bytes <= s.memory_capacity_bytes else ", DOES NOT FIT"
    return f"{units.memory_of(s.memory_peak_bytes, s.memory_capacity_bytes)}{over}"


def _short(value: object) -> str:
    said = "none" if value is None else words(value)
    return said if len(said) <= TEXT else f"{said[: TEXT - 3]}..."


def _rows(c: Comparison, say: Say) -> Table:
    """Each part, and below it its op classes; a bar for each, over the largest."""
    table = say.new(("", "wrap"), ("A", "right"), ("B", "right"), ("B - A", "right"), ("", "right"), ("", "left"))
    rows = shown_rows(c)
    largest = max((abs(r.difference_s) for r in rows), default=0.0)
    for r in rows:
        whole = not r.name
        style = "bold" if whole else ""
        name = PART_WORDS[r.part] if whole else f"  {r.name}"
        share = units.share(abs(r.difference_s), largest)
        bar = say.bar(share, BAR, "red" if r.difference_s > 0 else "green")
        percent = f"{100 * r.difference_s / c.a.step_time_s:+.1f} %"
        cells = (name, units.seconds(r.a_s), units.seconds(r.b_s), signed_seconds(r.difference_s), percent)
        table.add_row(*(say.text(cell, style) for cell in cells), bar)
    a, b = c.a.step_time_s, c.b.step_time_s
    total = ("step", units.seconds(a), units.seconds(b), signed_seconds(b - a), f"{100 * (b / a - 1):+.1f} %")
    table.add_row(*(say.text(cell, "bold") for cell in total), "")
    return table
