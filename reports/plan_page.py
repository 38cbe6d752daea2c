"""A search over plans as one HTML page: the front, parallel coordinates of the best, and why not the neighbours."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hw_profiles.files import write_whole
from reports import draw, tables, units
from reports.page import page
from reports.parts import plan_text, signed_percent, words
from simulator.results.plans import PlanSearch, RankedPlan

# Lines that an eye can still follow; rows that a page can still scroll.
MOST_LINES, MOST_ROWS = 40, 200
# The fields that a split is spoken of by, in the order in which they are drawn.
COORDINATES = (
    "plan.tensor", "plan.context", "plan.pipeline", "plan.virtual_stages", "plan.expert", "plan.expert_tensor",
    "plan.microbatch_sequences", "plan.schedule", "plan.shard", "plan.sequence_parallel", "training.remat",
)  # fmt: skip
NUMBERS = ("memory", "step time")


def write_plan_page(answer: PlanSearch, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_whole(path, render(answer).encode())


def render(answer: PlanSearch) -> str:
    """The page as text; the same answer gives the same bytes."""
    undo = draw.fixed_json()
    try:
        broke = answer.searched - answer.valid
        said = (
            f"{answer.cluster}: {answer.searched:,} plans by {answer.objective}; {broke:,} break a rule,"
            f" {answer.pruned:,} cannot fit or cannot win, {answer.evaluated:,} worked out"
        )
        body = [f'<p class="sub">{html.escape(said)}</p>', _beside(answer)]
        front = "step time and memory: the front, the best, the job as given, and what a device has (dashed)"
        body += ["<h2>The front</h2>", draw.figure_html(_front(answer), "front", front)]
        body += [_plans(answer.pareto, "Closed form; no plan is both faster and smaller.")]
        lines = "each line is a plan, from its degrees to its step time; the best is drawn last"
        body += ["<h2>What the best have in common</h2>", draw.figure_html(_coordinates(answer), "lines", lines)]
        body += [_plans(answer.best, "In order; by events where the last column says so.")]
        body += ["<h2>Why not</h2>", _why_not(answer)]
    finally:
        undo()
    return page("\n".join(body), f"moecast: plans of {answer.job}")


def _beside(answer: PlanSearch) -> str:
    best, given = answer.best[0], answer.given
    if given is None:
        return tables.facts([("as given", answer.given_said), ("best", plan_text(best.plan))])
    rows = [
        ("step time", units.seconds(best.step_time_s), units.seconds(given.step_time_s)),
        ("memory of " + units.memory(answer.capacity_bytes), units.memory(best.memory_peak_bytes),
         units.memory(given.memory_peak_bytes)),
        ("MFU", units.percent(best.mfu), units.percent(given.mfu)),
        ("per 1B tokens", _usd(best), _usd(given)),
    ]  # fmt: skip
    changed = [(k, words(v), words(given.plan.get(k))) for k, v in best.plan.items() if v != given.plan.get(k)]
    misfit = [1] if given.memory_peak_bytes > answer.capacity_bytes else []
    return tables.table(("", "best", "as given"), [*rows, *changed], numbers=(1, 2), loud=misfit)


def _usd(p: RankedPlan) -> str:
    return "no price" if p.usd_per_1b_tokens is None else units.dollars(p.usd_per_1b_tokens)


def _front(answer: PlanSearch) -> draw.Figure:
    shown = [*answer.pareto, *answer.best, *([answer.given] if answer.given else [])]
    factor, unit = units.time_scale(max(p.step_time_s for p in shown))
    fig = draw.figure(14, f"step time ({unit}, closed form)", rangemode="normal")
    fig.update_yaxes(title={"text": "memory of a device (GiB)"}, rangemode="tozero")
    given = [answer.given] if answer.given else []
    for plans, name, colour, mode in (
        (answer.pareto, "front", draw.BLUE, "lines+markers"),
        (answer.best, "the best", draw.ORANGE, "markers"),
        (given, "as given", draw.GREY, "markers"),
    ):
        fig.add_scatter(
            x=[draw.rounded(p.closed_form_step_time_s / factor) for p in plans],
            y=[draw.rounded(p.memory_peak_bytes / 2**30) for p in plans],
            mode=mode, name=name, marker={"color": colour, "size": 8}, line={"color": colour, "width": 1.5},
            hovertext=[draw.label(f"{units.seconds(p.closed_form_step_time_s)}, {units.memory(p.memory_peak_bytes)}: "
                                  f"{plan_text(p.plan)}", 120) for p in plans],
            hoverinfo="text",
        )  # fmt: skip
    draw.limit(fig, y=answer.capacity_bytes / 2**30)
    return fig


def _coordinates(answer: PlanSearch) -> draw.Figure:
    """Every plan a line across one axis a field; values that differ are spread over an axis in their order."""
    plans = answer.best[:MOST_LINES]
    names = [n for n in COORDINATES if len({words(p.plan[n]) for p in plans}) > 1]
    scales: list[dict[str, float]] = []
    fig = draw.figure(16, "", rangemode="normal", showgrid=False, zeroline=False)
    for at, name in enumerate(names):
        values = _ordered([p.plan[name] for p in plans])
        scales.append({v: _place(i, len(values)) for i, v in enumerate(values)})
        _axis(fig, at, list(scales[-1].items()))
    ends = []
    for at, (column, text) in enumerate(
        (([p.memory_peak_bytes for p in plans], units.memory), ([p.step_time_s for p in plans], units.seconds)),
        start=len(names),
    ):
        low, high = min(column), max(column)
        ends.append((low, high))
        _axis(fig, at, [(text(low), 0.0), (text(high), 1.0)] if high > low else [(text(low), 0.5)])
    for rank, p in reversed(list(enumerate(plans))):
        y = [scales[at][words(p.plan[name])] for at, name in enumerate(names)]
        for (low, high), value in zip(ends, (p.memory_peak_bytes, p.step_time_s), strict=True):
            y.append((value - low) / (high - low) if high > low else 0.5)
        fig.add_scatter(
            x=list(range(len(y))), y=[draw.rounded(v) for v in y], mode="lines", opacity=1.0 if rank == 0 else 0.45,
            line={"color": draw.ORANGE if rank == 0 else draw.BLUE, "width": 3 if rank == 0 else 1.5},
            hovertext=draw.label(f"{rank + 1}. {units.seconds(p.step_time_s)}: {plan_text(p.plan)}", 120),
            hoverinfo="text",
        )  # fmt: skip
    labels = [n.rpartition(".")[2].replace("_", " ") for n in names]
    fig.update_xaxes(tickvals=list(range(len(names) + 2)), ticktext=[draw.label(n) for n in (*labels, *NUMBERS)])
    fig.update_yaxes(visible=False, range=[-0.08, 1.12])
    fig.update_layout(margin={"l": 24, "r": 60, "t": 8, "b": 60})
    return fig


def _ordered(values: Sequence[Any]) -> list[str]:
    """Distinct values as text, numbers by size and before words."""
    keys = {words(v): (0, v, "") if isinstance(v, int) and not isinstance(v, bool) else (1, 0, words(v))
            for v in values}  # fmt: skip
    return sorted(keys, key=keys.__getitem__)


def _place(i: int, count: int) -> float:
    return i / (count - 1) if count > 1 else 0.5


def _axis(fig: draw.Figure, at: int, ticks: Sequence[tuple[str, float]]) -> None:
    fig.add_vline(x=at, line={"color": draw.INK, "width": 1})
    for text, y in ticks:
        fig.add_annotation(
            x=at, y=draw.rounded(y), text=draw.label(text, 18), showarrow=False, xanchor="left", yanchor="bottom",
            font={"size": 11},
        )  # fmt: skip


def _plans(plans: Sequence[RankedPlan], said: str) -> str:
    fastest = min(p.step_time_s for p in plans)
    rows = [
        (units.seconds(p.step_time_s), signed_percent(p.step_time_s / fastest - 1), units.memory(p.memory_peak_bytes),
         units.percent(p.mfu), _usd(p), plan_text(p.plan), p.engine)
        for p in plans[:MOST_ROWS]
    ]  # fmt: skip
    head = ("step", "over the fastest", "memory", "MFU", "per 1B tokens", "plan", "timed by")
    return tables.table(head, rows, numbers=(0, 1, 2, 3, 4), caption=said)


def _why_not(answer: PlanSearch) -> str:
    rows = [(r.field, words(r.winner), words(r.value), r.kind, r.said, r.command) for r in answer.rejected]
    head = ("field", "winner", "not", "what rejected it", "because", "shown by")
    return tables.table(head, rows, caption="One step from the winner; each command shows what is said.")
