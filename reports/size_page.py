"""How many chips a run needs, as one HTML page: days, dollars and scaling over chips, and every count tried."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from hw_profiles.files import write_whole
from reports import draw, tables, units
from reports.page import page
from simulator.results.sizing import SizePoint, Sizing

COLOURS = (draw.BLUE, draw.ORANGE, draw.TEAL, draw.PURPLE, draw.ROSE, draw.YELLOW, draw.GREEN, draw.STEEL)


def write_size_page(s: Sizing, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_whole(path, render(s).encode())


def render(s: Sizing) -> str:
    """The page as text; the same sizing gives the same bytes."""
    undo = draw.fixed_json()
    try:
        body = [f'<p class="sub">{html.escape(_question(s))}</p>', _answer(s)]
        ran = [p for p in s.points if p.refused is None and p.days is not None]
        if ran:
            days = _curves(ran, lambda p: p.days, "days of the run")
            draw.limit(days, y=s.days)
            body += ["<h2>Time</h2>", draw.figure_html(days, "days", "days over chips; dashed: what the run may take")]
            body += _money(s, [p for p in ran if s.terms in p.usd])
            first: dict[str, SizePoint] = {}
            for p in ran:
                first.setdefault(p.chip, p)
            strong = _curves(ran, lambda p: _per_chip(p) / _per_chip(first[p.chip]), "of the fewest chips' rate")
            said = "strong scaling: tokens/s of a chip over that at the fewest chips, the batch unchanged"
            body += ["<h2>Scaling</h2>", draw.figure_html(strong, "strong", said)]
            if s.weak:
                said = "weak scaling: the same with the batch grown with the chips"
                body.append(draw.figure_html(_weak(s), "weak", said))
        body += ["<h2>Every count tried</h2>", _points(s), "<h2>Prices</h2>", _prices(s)]
    finally:
        undo()
    return page("\n".join(body), f"moecast: chips for {s.model}")


def _question(s: Sizing) -> str:
    budget = "" if s.budget_usd is None else f", at most {units.dollars(s.budget_usd)} ({s.terms})"
    return f"{units.count(s.tokens)} tokens in {s.days:g} days{budget}; the best plan of each count, by closed form"


def _answer(s: Sizing) -> str:
    rows = [(p.chip, f"{p.chips:,}", f"{p.days or 0:.1f}", _usd(s, p)) for p in s.smallest]
    out = tables.table(("chip", "fewest chips", "days", "run"), rows, numbers=(1, 2, 3)) if rows else (
        '<p class="sub">No count that was tried is in time and in budget.</p>'
    )  # fmt: skip
    written = "" if s.checkpoint_s is None else f", {units.seconds(s.checkpoint_s)} to write"
    said = f"a checkpoint has {units.traffic(s.checkpoint_bytes)}{written}"
    if s.largest is not None:
        said += f"; the largest {s.largest[0]} that fits the fewest chips is {s.largest[1]:,}"
    return out + f'<p class="caption">{html.escape(said)}</p>'


def _usd(s: Sizing, p: SizePoint) -> str:
    return units.dollars(p.usd[s.terms]) if s.terms in p.usd else "no price"


def _money(s: Sizing, priced: list[SizePoint]) -> list[str]:
    """The curve of dollars; the budget is drawn where the curve would still be seen under it."""
    if not priced:
        return []
    fig, said = _curves(priced, lambda p: p.usd[s.terms], f"dollars of the run ({s.terms})"), "dollars over chips"
    if s.budget_usd is not None:
        if s.budget_usd < 3 * max(p.usd[s.terms] for p in priced):
            draw.limit(fig, y=s.budget_usd)
            said += "; dashed: the budget"
        else:
            said += f"; the budget of {units.dollars(s.budget_usd)} is far above"
    return ["<h2>Money</h2>", draw.figure_html(fig, "dollars", said)]


def _empty(counts: Sequence[int], title: str) -> draw.Figure:
    """Axes for curves over chips: counts by their logarithm, values from zero."""
    ticks = sorted(set(counts))
    axis = {"type": "log", "rangemode": "normal", "tickvals": ticks, "ticktext": [f"{n:,}" for n in ticks]}
    fig = draw.figure(12, "chips", **axis)
    fig.update_yaxes(title={"text": title}, rangemode="tozero")
    return fig


def _per_chip(p: SizePoint) -> float:
    return (p.tokens_per_s or 0.0) / p.chips


def _curves(points: Sequence[SizePoint], of: Callable[[SizePoint], float | None], title: str) -> draw.Figure:
    """A line for each chip over counts."""
    fig = _empty([p.chips for p in points], title)
    for i, chip in enumerate(dict.fromkeys(p.chip for p in points)):
        own = [p for p in points if p.chip == chip]
        colour = COLOURS[i % len(COLOURS)]
        fig.add_scatter(
            x=[p.chips for p in own], y=[draw.rounded(of(p) or 0.0) for p in own], mode="lines+markers",
            name=draw.label(chip), marker={"color": colour, "size": 8}, line={"color": colour, "width": 1.5},
            hovertext=[draw.label(f"{p.chips:,} {p.chip}: {p.days or 0:.1f} days, MFU {units.percent(p.mfu or 0)}", 80)
                       for p in own],
            hoverinfo="text",
        )  # fmt: skip
    return fig


def _weak(s: Sizing) -> draw.Figure:
    fig = _empty([n for _, n, _ in s.weak], "of the fewest chips' rate")
    for i, chip in enumerate(dict.fromkeys(chip for chip, _, _ in s.weak)):
        own = [(n, rate) for name, n, rate in s.weak if name == chip]
        base = own[0][1] / own[0][0]
        colour = COLOURS[i % len(COLOURS)]
        fig.add_scatter(
            x=[n for n, _ in own], y=[draw.rounded(rate / n / base) for n, rate in own], mode="lines+markers",
            name=draw.label(chip), marker={"color": colour, "size": 8}, line={"color": colour, "width": 1.5},
            hovertext=[draw.label(f"{n:,} {chip}: {units.rate(rate, 'tokens')}", 80) for n, rate in own],
            hoverinfo="text",
        )  # fmt: skip
    return fig


def _points(s: Sizing) -> str:
    rows, loud = [], []
    for i, p in enumerate(s.points):
        if p.refused is not None or p.days is None:
            rows.append((p.chip, f"{p.chips:,}", *[""] * 7, p.refused or "no plan"))
            loud.append(i)
            continue
        each = "" if p.usd_per_1b_tokens is None else units.dollars(p.usd_per_1b_tokens)
        said = "in time and in budget" if p.in_time and p.in_budget else "too dear" if p.in_time else "too slow"
        rows.append(
            (p.chip, f"{p.chips:,}", f"{p.days:.1f}", units.seconds(p.phases[-1].step_time_s),
             units.percent(p.mfu or 0.0), _usd(s, p), each,
             "" if p.kwh is None else units.significant(p.kwh / 1000), said,
             " ".join(p.phases[-1].overrides) or "no split")
        )  # fmt: skip
    head = ("chip", "chips", "days", "step", "MFU", "run", "per 1B tokens", "MWh", "", "plan")
    return tables.table(head, rows, numbers=(1, 2, 3, 4, 5, 6, 7), loud=loud)


def _prices(s: Sizing) -> str:
    rows = [
        (chip, terms, units.dollars(usd), source, date)
        for chip, known in s.prices.items()
        for terms, usd, source, date in known
    ]
    return tables.table(("chip", "terms", "per chip-hour", "source", "date"), rows, numbers=(2,))
