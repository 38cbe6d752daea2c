"""Grids and sensitivities on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecast.terminal_text import Say
from reports import units
from reports.parts import words

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.results.whatif import Cell, Grid, Sensitivity, Weight

MOST_CELLS, MOST_WEIGHTS = 60, 24
BAR = 12


def print_grid(grid: Grid, console: Console) -> None:
    """Print a grid: the job as given first, then a row for each cell, in order."""
    say = Say(console)
    refused = sum(c.refused is not None for c in grid.cells)
    misfit = sum(c.fits is False for c in grid.cells)
    say.line(f"{grid.job} on {grid.cluster}: {len(grid.cells):,} cells by {grid.engine}", "bold")
    say.line(f"{refused:,} break a rule, {misfit:,} do not fit", "dim")
    say.line("")
    names = [(name.rpartition(".")[2], "wrap") for name in grid.axes]
    numbers = [("step", "right"), ("", "right"), ("memory", "right"), ("fits", "left"), ("MFU", "right"),
               ("$/1B", "right")]  # fmt: skip
    table = say.new(*names, *numbers)
    table.add_row(*(say.text("job" if i == 0 else "", "dim") for i in range(len(names))),
                  *(say.text(c, "dim") for c in _numbers(grid.base, grid.base)))  # fmt: skip
    rules: dict[str, int] = {}
    for cell in grid.cells[:MOST_CELLS]:
        shown = [say.text(words(v)) for v in cell.values.values()]
        if cell.refused is not None:
            at = rules.setdefault(cell.refused, len(rules) + 1)
            table.add_row(*shown, say.text(f"rule {at}", "yellow"))
            continue
        style = "" if cell.fits else "red"
        table.add_row(*shown, *(say.text(c, style) for c in _numbers(cell, grid.base)))
    say.table(table)
    if len(grid.cells) > MOST_CELLS:
        say.line(f"and {len(grid.cells) - MOST_CELLS:,} more cells (--json, --output)", "dim")
    for rule, at in rules.items():
        say.line(f"rule {at}: {rule}", "yellow")
    good = [c for c in grid.cells if c.fits and c.step_time_s is not None]
    if good:
        best = min(good, key=lambda c: c.step_time_s or 0.0)
        said = ", ".join(f"{name}={words(v)}" for name, v in best.values.items())
        say.line(f"fastest that fits: {said}: {units.seconds(best.step_time_s or 0.0)}", "bold")
    else:
        say.line("none of the cells fits in memory", "bold red")


def _numbers(c: Cell, base: Cell) -> tuple[str, ...]:
    step, memory = c.step_time_s or 0.0, c.memory_peak_bytes or 0.0
    usd = "?" if c.usd_per_1b_tokens is None else units.dollars(c.usd_per_1b_tokens).removeprefix("$")
    change = f"{100 * (step / (base.step_time_s or step) - 1):+.1f} %"
    fits = "yes" if c.fits else "NO"
    return units.seconds(step), change, units.memory(memory), fits, units.percent(c.mfu or 0.0), usd


def print_sensitivity(s: Sensitivity, console: Console) -> None:
    """Print the tornado: bars to the left make the step shorter as the number grows, to the right longer."""
    say = Say(console)
    say.line(f"{s.job} on {s.cluster}: step {units.seconds(s.step_time_s)} by closed form", "bold")
    say.line("per cent of step time for one per cent of a number, and the step with it twice as good", "dim")
    say.line("")
    table = say.new(("number", "wrap"), ("value", "right"), ("", "right"), ("", "left"), ("weight", "right"),
                    ("change", "right"), ("twice", "right"))  # fmt: skip
    shown = [w for w in s.weights if w.elasticity is not None and abs(w.elasticity) >= 5e-4]
    largest = max((abs(w.elasticity or 0.0) for w in shown), default=1.0)
    for w in shown[:MOST_WEIGHTS]:
        slope = w.elasticity or 0.0
        bar = say.bar(abs(slope) / largest, BAR // 2, "green" if slope < 0 else "red")
        left, right = (bar, "") if slope < 0 else ("", bar)
        name = w.name.removeprefix("model.")
        table.add_row(say.text(name), say.text(f"{w.value:g}"), left, right, say.text(f"{slope:+.3f}"),
                      say.text(_span(w), "dim"), say.text(_twice(w)))  # fmt: skip
    say.table(table)
    rest = [w.name for w in s.weights if w.elasticity is not None and w not in shown[:MOST_WEIGHTS]]
    if rest:
        say.line(f"{len(rest)} more weigh less than these, most nothing (--json)", "dim")
    for w in s.weights:
        if w.refused:
            say.line(f"{w.name} could not be varied: {w.refused}", "yellow")
    total = s.rates - s.latencies
    say.line(f"all rates {s.rates:+.3f}, all latencies {s.latencies:+.3f}: rates less latencies {total:+.3f}, of -1")


def _span(w: Weight) -> str:
    low, high = 100 * (w.down - 1), 100 * (w.up - 1)
    return f"±{high:.3g} %" if abs(low + high) < 1e-9 else f"{low:+.3g} to {high:+.3g} %"


def _twice(w: Weight) -> str:
    return "" if w.speed_up is None else f"{w.speed_up:.3f} x"
