"""The sections of a page, in order: each takes forecasts and gives HTML, or "" where it has nothing to say.

A new section is one function and one line in `FORECAST` or `COMPARISON`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from reports import figures, tables, timeline_tables, topology, units
from reports import timeline as timeline_figures
from reports.draw import figure_html
from reports.parts import devices, misfit_text, plan_line
from simulator.results.forecast import Forecast


def _block(anchor: str, title: str, *parts: str) -> str:
    return f'<section id="{anchor}"><h3>{html.escape(title)}</h3>\n' + "\n".join(parts) + "\n</section>"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _card(name: str, value: str, note: str = "", bad: bool = False) -> str:
    style = "card bad" if bad else "card"
    name, value, note = html.escape(name), html.escape(value), html.escape(note)
    return f'<div class="{style}"><div>{name}</div><b>{value}</b><small>{note}</small></div>'


def headline(forecast: Forecast, anchor: str) -> str:
    """The numbers a person came for, first what forbids the job."""
    f, a2a, m, cost = forecast, forecast.all_to_all, forecast.memory, forecast.cost
    said = misfit_text(m)
    warning = f'<p class="alarm">{html.escape(said)}</p>' if said else ""
    used, full = units.memory_of(m.peak_bytes, m.capacity_bytes), units.share(m.peak_bytes, m.capacity_bytes)
    waits = f"{units.seconds(a2a.exposed_s)} of {units.seconds(a2a.time_s)}" if a2a.time_s else "no all-to-all"
    priced = cost.usd_per_1b_tokens is not None
    cards = (
        _card("step time", units.seconds(f.step_time_s), units.seconds_range(*f.step_time_interval_s)),
        _card(
            "tokens/s per device", units.significant(f.tokens_per_s_per_device), units.rate(f.tokens_per_s, "tokens")
        ),
        _card("MFU", units.percent(f.mfu), f"HFU {units.percent(f.hfu)}, {f.evidence.peak_dtype} peak"),
        _card("peak memory", units.percent(full), used, bad=not m.fits),
        _card("all-to-all exposed", units.percent(units.share(a2a.exposed_s, f.step_time_s)), waits),
        _card(
            "per 1B tokens",
            tables.cost_text(cost) if priced else "no price",
            tables.price_text(cost) if priced else cost.source,
        ),
    )
    return f'{warning}<div class="cards">{"".join(cards)}</div>' + _block(
        f"{anchor}-numbers", "Numbers", _pair(*tables.headline(f))
    )


def time(forecast: Forecast, anchor: str) -> str:
    """Where the time goes."""
    figure = figure_html(
        figures.time_breakdown([forecast]),
        f"{anchor}-time-figure",
        "Parts of a step, mean over devices; they sum to the step.",
    )
    return _block(f"{anchor}-time", "Where the time goes", _pair(figure, tables.time_parts(forecast)))


def ops(forecast: Forecast, anchor: str) -> str:
    """The longest ops, the roofline, and the table of both."""
    drawn = []
    if (figure := figures.top_ops(forecast)) is not None:
        shown = min(figures.TOP, len(forecast.ops))
        drawn.append(
            figure_html(
                figure,
                f"{anchor}-ops-figure",
                f"The {shown} longest of {len(forecast.ops)} compute ops; busiest stage, per device.",
            )
        )
    if (figure := figures.roofline(forecast)) is not None:
        caption = (
            "FLOP/s reached by each op over its FLOPs per byte; area follows time; ops without FLOPs are left out."
        )
        drawn.append(figure_html(figure, f"{anchor}-roofline-figure", caption))
    if not drawn:
        return ""
    return _block(f"{anchor}-ops", "Compute ops", _pair(*drawn), tables.ops(forecast))


def memory(forecast: Forecast, anchor: str) -> str:
    """Memory by part and stage against the capacity."""
    caption = "Memory on one device of each pipeline stage; the dashed line is the capacity."
    figure = figure_html(figures.memory_by_stage(forecast), f"{anchor}-memory-figure", caption)
    note = f'<p class="caption">Counted: {html.escape(forecast.memory.definition)}.</p>'
    # Of few stages the table is tall and narrow, of many it is as wide as the page.
    both = figure + tables.memory(forecast)
    together = _pair(figure, tables.memory(forecast)) if len(forecast.memory.by_stage) <= tables.TALL_STAGES else both
    return _block(f"{anchor}-memory", "Memory", together, note)


def collectives(forecast: Forecast, anchor: str) -> str:
    """Communication: what waits and what hides."""
    figure = figures.collectives(forecast)
    if figure is None:
        return _block(f"{anchor}-collectives", "Collectives", "<p>This job needs no collectives.</p>")
    caption = (
        "Collectives and their group size; busiest stage, per device. "
        "Exposed time waits, hidden time runs behind compute; bytes are nccl-tests' size."
    )
    drawn = figure_html(figure, f"{anchor}-collectives-figure", caption)
    return _block(f"{anchor}-collectives", "Collectives", drawn, tables.collectives(forecast))


def rests_on(forecast: Forecast, anchor: str) -> str:
    """Evidence, warnings and definitions."""
    e = forecast.evidence
    warnings = f'<h4>Warnings</h4><div class="warn">{_list(e.warnings)}</div>' if e.warnings else ""
    basis = tables.facts(
        [
            ("profile", e.profile),
            ("calibration", e.calibration),
            ("peak for MFU and HFU", f"{units.flops_rate(e.peak_flops_per_s)} {e.peak_dtype} per device"),
            ("interval", forecast.interval_meaning),
            ("FLOPs", forecast.flops.convention),
            ("memory", forecast.memory.definition),
            ("price", tables.price_text(forecast.cost)),
            ("engine", f"{forecast.engine}, forecast format {forecast.version}"),
        ]
    )
    sources = f"<h4>Sources</h4>{_list(e.rests_on)}" if e.rests_on else ""
    return _block(f"{anchor}-evidence", "What this rests on", warnings, basis, sources)


def question(forecast: Forecast, anchor: str) -> str:
    """The plan and the job."""
    plan = f"<div><h4>Plan</h4>{tables.plan(forecast)}</div>"
    return _block(f"{anchor}-job", "The job", _pair(f"<div><h4>Job</h4>{tables.job(forecast)}</div>", plan))


def timeline(forecast: Forecast, anchor: str) -> str:
    """What ran when on each stage, and how busy each was."""
    t = forecast.timeline
    if t is None or not len(t):
        return ""
    shown, parts = timeline_figures.shown_classes(t), timeline_figures.windows(t)
    said = "Compute above, network below; a pass lasts until the transfers beside it are done."
    if len(parts) > 1:
        share = units.percent(units.share(parts[0][1], t.step_s))
        said += f" Of {len(t):,} rows, those of the first and last {share} of the step."
    if len(shown) < len(t.classes):
        said += f" {len(shown)} of {len(t.classes):,} device classes, evenly spread."
    rows = figure_html(timeline_figures.gantt(t), f"{anchor}-timeline-figure", said)
    whole = "The whole step in equal bins: how much of each the stage is in a pass or an update. Blank is waiting."
    busy = figure_html(timeline_figures.utilisation(t), f"{anchor}-utilisation-figure", whole)
    notes = _list(t.notes) if t.notes else ""
    return _block(f"{anchor}-timeline", "Timeline", rows, _pair(busy, timeline_tables.classes(t)), notes)


def memory_over_time(forecast: Forecast, anchor: str) -> str:
    """Memory of each stage over the step."""
    t, capacity = forecast.timeline, forecast.memory.capacity_bytes
    figure = timeline_figures.memory_over_time(t, capacity) if t is not None else None
    if t is None or figure is None:
        return ""
    said = "Memory on one device of each stage over the step; the dashed line is the capacity."
    if len(t.memory) > timeline_figures.MOST_LINES:
        said += f" The {timeline_figures.MOST_LINES} fullest of {len(t.memory)}."
    drawn = figure_html(figure, f"{anchor}-curve-figure", said)
    return _block(f"{anchor}-curve", "Memory over time", _pair(drawn, timeline_tables.memory(t, capacity)))


def links(forecast: Forecast, anchor: str) -> str:
    """Load on the network, and its busiest links."""
    busiest = forecast.events.links if forecast.events else ()
    if not busiest and forecast.timeline is not None:
        busiest = forecast.timeline.links
    figure = timeline_figures.links(busiest)
    if figure is None:
        return ""
    said = "The share of the step that a link's bytes take at its full rate."
    drawn = figure_html(figure, f"{anchor}-links-figure", said)
    network = forecast.timeline.network if forecast.timeline is not None else None
    whole = ""
    if network is not None and network.links:
        said = f"Links by the share of the step that they are busy, the busier direction of two. {network.note}"
        whole = figure_html(topology.network(network), f"{anchor}-network-figure", said)
    return _block(f"{anchor}-links", "Links", whole, _pair(drawn, timeline_tables.links(busiest)))


def critical_path(forecast: Forecast, anchor: str) -> str:
    """What the step's length depends on."""
    figure = timeline_figures.critical_path(forecast.events) if forecast.events else None
    if forecast.events is None or figure is None:
        return ""
    said = "The chain of work and waiting that ends the step: it gets shorter only where something on it gets faster."
    drawn = figure_html(figure, f"{anchor}-path-figure", said)
    return _block(f"{anchor}-path", "Critical path", _pair(drawn, timeline_tables.critical_path(forecast.events)))


def formula(forecast: Forecast, anchor: str) -> str:
    """The closed form against the run by events."""
    events = forecast.events
    if events is None:
        return ""
    said = "Step time by formula and by events"
    said += "; draws are of the routing." if events.percentiles_s else "."
    figure = timeline_figures.formula(events, forecast.step_time_s)
    drawn = figure_html(figure, f"{anchor}-formula-figure", said)
    return _block(
        f"{anchor}-formula",
        "What the formula missed",
        _pair(drawn, timeline_tables.formula(events, forecast.step_time_s)),
    )


def compare_table(forecasts: Sequence[Forecast], anchor: str) -> str:
    """All forecasts in one table, first which of them do not fit."""
    bad = [f.job.name for f in forecasts if not f.memory.fits]
    said = f"{len(bad)} of {len(forecasts)} jobs do not fit in memory: {', '.join(bad)}"
    warning = f'<p class="alarm">{html.escape(said)}</p>' if bad else ""
    return warning + tables.comparison(forecasts)


def compare_bars(forecasts: Sequence[Forecast], anchor: str) -> str:
    """Step time, tokens, MFU and memory side by side."""
    drawn = (
        ("step", figures.compare_step_time, "Step time; the whisker is the forecast's interval."),
        ("tokens", figures.compare_tokens, "Trained tokens per second and device."),
        ("mfu", figures.compare_mfu, "Model FLOPs utilisation, each against the peak of its own chip and precision."),
        ("memory", figures.compare_memory, "Peak memory of the fullest device; red does not fit."),
    )
    return _pair(*(figure_html(make(forecasts), f"{anchor}-{name}-figure", said) for name, make, said in drawn))


def compare_time(forecasts: Sequence[Forecast], anchor: str) -> str:
    """The parts of all steps on one axis."""
    figure = figure_html(
        figures.time_breakdown(forecasts), f"{anchor}-time-figure", "Parts of a step, mean over devices."
    )
    return _block(f"{anchor}-time", "Where the time goes", figure)


def _pair(*parts: str) -> str:
    return f'<div class="pair">{"".join(parts)}</div>'


def subtitle(forecast: Forecast) -> str:
    """Model, cluster and plan in one line."""
    j = forecast.job
    return f"{j.model} on {j.cluster}: {devices(j.devices)}; {plan_line(j.plan)}"


FORECAST: tuple[Callable[[Forecast, str], str], ...] = (
    headline,
    time,
    timeline,
    critical_path,
    formula,
    ops,
    memory,
    memory_over_time,
    collectives,
    links,
    rests_on,
    question,
)
COMPARISON: tuple[Callable[[Sequence[Forecast], str], str], ...] = (compare_table, compare_bars, compare_time)
