"""A search over plans on a terminal: the winner beside the job as given, the best, the front, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecast.terminal_text import Say
from reports import units
from reports.parts import plan_text, plan_value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from simulator.results.plans import PlanSearch, RankedPlan, Rejection

ROWS, FRONT_ROWS, WHY_ROWS = 10, 8, 12


def print_search(answer: PlanSearch, console: Console) -> None:
    """Print the answer of a search."""
    best = answer.best[0]
    say = Say(console)
    say.line(f"{answer.job} on {answer.cluster}: the best of {answer.searched:,} plans by {answer.objective}", "bold")
    say.line(_counts(answer), "dim")
    rate = units.significant(answer.searched / answer.seconds)
    say.line(f"{units.seconds(answer.seconds)} for the search, {rate} plans/s", "dim")
    say.line("")
    say.table(_beside(answer, best, say))
    say.line("")
    events = sum(p.engine == "events" for p in answer.best)
    said = f"The best ({events} timed by events)" if events else "The best (closed form; --engine-top times by events)"
    say.line(said, "bold")
    say.table(_plans(answer.best[:ROWS], best.step_time_s, say))
    say.line("")
    say.line(f"Front (closed form, {len(answer.pareto)} plans): none is both faster and smaller", "bold")
    say.table(_plans(_spread(answer.pareto, FRONT_ROWS), answer.pareto[0].step_time_s, say))
    say.line("")
    say.line(f"Why not: one step from the winner ({len(answer.rejected)}; --json has the command of each)", "bold")
    say.table(_why(answer.rejected[:WHY_ROWS], say))


def _counts(a: PlanSearch) -> str:
    broke = a.searched - a.valid
    parts = [f"{broke:,} break a rule", f"{a.pruned:,} cannot fit or cannot win"]
    parts.append(f"{a.evaluated:,} worked out")
    return ", ".join(parts)


def _beside(answer: PlanSearch, best: RankedPlan, say: Say) -> Table:
    """The winner and the job as given: numbers, then the fields that differ."""
    given = answer.given
    table = say.new(("", "left"), ("best", "right"), ("as given", "right"), ("", "wrap"))
    if given is None:
        table.add_row(say.text("as given"), "", say.text("no plan"), say.text(answer.given_said, "dim"))

    def add(name: str, new: str, old: str, said: str = "") -> None:
        table.add_row(say.text(name), say.text(new, "bold"), say.text(old if given else ""), say.text(said, "dim"))

    old = given or best
    change = best.step_time_s / old.step_time_s - 1
    faster = f"{change * 100:+.1f} %, {best.engine}" if given else best.engine
    add("step time", units.seconds(best.step_time_s), units.seconds(old.step_time_s), faster)
    over = "" if old.memory_peak_bytes <= answer.capacity_bytes else "(as given it DOES NOT FIT)"
    of = f"of {units.memory(answer.capacity_bytes)} {over}".strip()
    add("memory", units.memory(best.memory_peak_bytes), units.memory(old.memory_peak_bytes), of)
    add("MFU", units.percent(best.mfu), units.percent(old.mfu))
    add("per 1B tokens", _usd(best), _usd(old))
    if given is not None:
        for name, new in best.plan.items():
            if new != given.plan.get(name):
                add(name, plan_value(new), plan_value(given.plan.get(name)))
    return table


def _usd(plan: RankedPlan) -> str:
    return "no price" if plan.usd_per_1b_tokens is None else units.dollars(plan.usd_per_1b_tokens)


def _plans(plans: Sequence[RankedPlan], fastest_s: float, say: Say) -> Table:
    """A row per plan; how much longer it takes is over `fastest_s`."""
    table = say.new(("step", "right"), ("", "right"), ("memory", "right"), ("$/1B", "right"), ("plan", "wrap"))
    for p in plans:
        usd = "?" if p.usd_per_1b_tokens is None else units.dollars(p.usd_per_1b_tokens).removeprefix("$")
        longer = f"{(p.step_time_s / fastest_s - 1) * 100:+.1f} %"
        cells = (units.seconds(p.step_time_s), longer, units.memory(p.memory_peak_bytes), usd, plan_text(p.plan))
        table.add_row(*(say.text(c) for c in cells))
    return table


def _spread(plans: Sequence[RankedPlan], most: int) -> list[RankedPlan]:
    """Up to `most` plans from end to end."""
    if len(plans) <= most:
        return list(plans)
    return [plans[round(i * (len(plans) - 1) / (most - 1))] for i in range(most)]


def _why(rejected: Sequence[Rejection], say: Say) -> Table:
    table = say.new(("field", "left"), ("not", "left"), ("", "left"), ("because", "wrap"))
    for r in rejected:
        name = r.field.removeprefix("plan.").removeprefix("training.").removeprefix("software.")
        cells = (name, plan_value(r.value), r.kind, r.said)
        table.add_row(*(say.text(c) for c in cells))
    return table
