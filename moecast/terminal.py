"""Forecasts on a terminal: a page of 80 columns that a person reads in ten seconds.

rich is imported inside the functions, since start-up time is budgeted. Text from a job file is never read as markup,
and its control characters are replaced, so that a name cannot recolour or move the cursor of a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import units
from reports.parts import (
    devices,
    memory_parts_short,
    misfit_text,
    plan_line,
    routes,
    signed_percent,
    time_parts,
    unique_names,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from simulator.results.forecast import Events, Forecast

# Below this, two columns of parts do not fit side by side.
TWO_COLUMNS_FROM = 76
EVIDENCE_LINES = 4
# Kinds of work on the critical path that are named; the rest is summed up.
PATH_KINDS = 4


@dataclass(frozen=True, slots=True)
class _Pen:
    """Makes text for one terminal: its width in characters, and whether it shows more than ASCII."""

    width: int
    ascii_only: bool = False

    def text(self, said: str, style: str = "") -> Text:
        from rich.text import Text

        shown = "".join(c if c.isprintable() else " " for c in said)
        if self.ascii_only:
            shown = shown.replace("µ", "u").encode("ascii", "replace").decode("ascii")
        return Text(shown, style=style, overflow="fold")

    def bar(self, share: float, width: int, style: str) -> Text:
        """A bar of `width` characters filled to `share` (0 to 1), in eighths; what is there at all shows."""
        eighths = min(8 * width, round(8 * share * width))
        if share > 0:
            eighths = max(eighths, 1)
        if self.ascii_only:
            return self.text("#" * ((eighths + 7) // 8), style).append("." * (width - (eighths + 7) // 8), "dim")
        full, part = divmod(eighths, 8)
        text = self.text("█" * full + "▏▎▍▌▋▊▉"[part - 1 : part], style)
        return text.append("·" * (width - len(text)), "dim")

    def grid(self, *ratios: int) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2), expand=bool(ratios))
        for ratio in ratios:
            table.add_column(ratio=ratio or None)
        return table


def print_forecast(forecast: Forecast, console: Console) -> None:
    """Prints one forecast."""
    console.print(forecast_table(forecast, console.width, ascii_only=console.options.ascii_only))


def forecast_table(forecast: Forecast, width: int, *, ascii_only: bool = False) -> RenderableType:
    """One forecast for a terminal of `width` characters; a job that does not fit in memory says so first."""
    from rich.console import Group
    from rich.table import Table

    pen = _Pen(width, ascii_only)
    out: list[RenderableType] = []
    if said := misfit_text(forecast.memory):
        out.append(pen.text(said, "bold red"))
    job = forecast.job
    out.append(pen.text(job.name, "bold"))
    out.append(
        pen.text(f"{job.model} on {job.cluster}: {devices(job.devices)}, {job.precision}; {plan_line(job.plan)}", "dim")
    )
    out.append(pen.text(""))
    out.append(_numbers(forecast, pen))
    out.append(pen.text(""))
    time, memory = _time(forecast, pen), _memory(forecast, pen)
    if width >= TWO_COLUMNS_FROM:
        both = Table.grid(padding=(0, 4))
        both.add_row(time, memory)
        out.append(both)
    else:
        out += [time, pen.text(""), memory]
    out.append(pen.text(""))
    if forecast.events is not None:
        out += [_events(forecast.events, pen), pen.text("")]
    out.append(_evidence(forecast, pen))
    return Group(*out)


def _numbers(forecast: Forecast, pen: _Pen) -> RenderableType:
    """Name, number, remark: one line each."""
    f, a2a, routing, cost = forecast, forecast.all_to_all, forecast.routing, forecast.cost
    peak = f"of {units.flops_rate(f.evidence.peak_flops_per_s)} {f.evidence.peak_dtype} per device"
    interval = f"{units.seconds_range(*f.step_time_interval_s)}: {f.interval_meaning}"
    rows = [
        ("step time", units.seconds(f.step_time_s), interval),
        ("throughput", units.rate(f.tokens_per_s, "tokens"), units.rate(f.sequences_per_s, "sequences")),
        ("per device", units.rate(f.tokens_per_s_per_device, "tokens"), ""),
        ("MFU", units.percent(f.mfu), peak),
        ("HFU", units.percent(f.hfu), "with recompute and padding"),
    ]
    if a2a.time_s or a2a.bytes_per_device:
        share = units.percent(units.share(a2a.exposed_s, f.step_time_s))
        sent = units.traffic(a2a.bytes_per_device)
        said = f"{units.seconds(a2a.exposed_s)} exposed ({share} of step), {sent} per device"
        rows.append(("all-to-all", units.seconds(a2a.time_s), said))
    else:
        rows.append(("all-to-all", "none", ""))
    if routes(f):
        hottest = f"hottest rank {units.significant(routing.max_over_mean_load)} x the mean ({routing.model})"
        rows.append(("routing", f"{units.percent(routing.dropped_token_fraction)} dropped", hottest))
    if cost.usd_per_1b_tokens is None:
        rows.append(("per 1B tokens", "no price known", cost.source))
    else:
        per_hour = None if cost.usd_per_chip_hour is None else f"{units.dollars(cost.usd_per_chip_hour)} per chip-hour"
        said = ", ".join(s for s in (per_hour, cost.terms, cost.date) if s)
        rows.append(("per 1B tokens", units.dollars(cost.usd_per_1b_tokens), said))
    grid = pen.grid(0, 0, 1)
    grid.columns[1].no_wrap = True
    for name, value, remark in rows:
        grid.add_row(pen.text(name), pen.text(value, "bold"), pen.text(remark, "dim"))
    return grid


def _parts(title: str, rows: Sequence[tuple[str, str, float]], style: str, pen: _Pen) -> RenderableType:
    """A titled block of (words, number, share) with bars, 36 characters wide in two columns."""
    from rich.console import Group

    bar = 8 if pen.width < 100 else 16
    grid = pen.grid()
    grid.padding = (0, 1, 0, 0)
    for justify in ("left", "right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    for name, number, share in rows:
        grid.add_row(pen.text(name), pen.text(number), pen.text(units.percent(share)), pen.bar(share, bar, style))
    return Group(pen.text(title, "bold"), grid)


def _time(forecast: Forecast, pen: _Pen) -> RenderableType:
    rows = [(said, units.seconds(v), units.share(v, forecast.step_time_s)) for said, v in time_parts(forecast)]
    return _parts("Where the time goes", rows, "cyan", pen)


def _memory(forecast: Forecast, pen: _Pen) -> RenderableType:
    """The fullest stage by part; shares are of the capacity, so that the bars show what is left."""
    m = forecast.memory
    rows = [
        (said.removesuffix(" state").removesuffix(" buffers"), units.memory(v), units.share(v, m.capacity_bytes))
        for said, v in memory_parts_short(m.worst)
    ]
    rows.append(("peak", units.memory(m.peak_bytes), units.share(m.peak_bytes, m.capacity_bytes)))
    stage = f", stage {m.worst.stage} (fullest)" if len(m.by_stage) > 1 else ""
    return _parts(f"Memory of {units.memory(m.capacity_bytes)}{stage}", rows, "magenta" if m.fits else "red", pen)


def _events(events: Events, pen: _Pen) -> RenderableType:
    """What the run by events adds: difference from the formula, critical path, spread, busiest link."""
    grid = pen.grid(0, 1)
    said = f"closed form {units.seconds(events.closed_form_step_time_s)}, events {signed_percent(events.difference)}"
    grid.add_row(pen.text("events"), pen.text(said))
    for missed in events.missed:
        grid.add_row("", pen.text(f"missed: {missed}", "dim"))
    total = sum(events.critical_path_s.values())
    if total:
        ordered = sorted(events.critical_path_s.items(), key=lambda item: -item[1])
        # A tail below half a per cent is noise in one line.
        large = [(k, v) for k, v in ordered[:PATH_KINDS] if v >= 0.005 * total]
        parts = [f"{kind} {v / total:.0%}" for kind, v in large]
        if (rest := 1 - sum(v for _, v in large) / total) >= 0.005:
            parts.append(f"other {rest:.0%}")
        grid.add_row(pen.text("path"), pen.text(", ".join(parts).replace("%", " %")))
    if events.percentiles_s:
        spread = ", ".join(f"{name} {units.seconds(v)}" for name, v in events.percentiles_s.items())
        if events.out_of_memory_probability is not None:
            spread += f"; out of memory in {units.percent(events.out_of_memory_probability)}"
        grid.add_row(pen.text("draws"), pen.text(spread))
    if events.links:
        link = max(events.links, key=lambda use: use.utilisation)
        busy = f"{link.name} ({link.level}): {units.percent(link.utilisation)} busy, {units.traffic(link.bytes)}"
        grid.add_row(pen.text("busiest link"), pen.text(busy))
    return grid


def _evidence(forecast: Forecast, pen: _Pen) -> RenderableType:
    """What the forecast rests on, shortened; every warning."""
    e = forecast.evidence
    grid = pen.grid(0, 1)
    grid.add_row(pen.text("rests on"), pen.text(f"{e.profile}; {e.calibration}"))
    for said in e.rests_on[:EVIDENCE_LINES]:
        grid.add_row("", pen.text(said, "dim"))
    if len(e.rests_on) > EVIDENCE_LINES:
        grid.add_row("", pen.text(f"and {len(e.rests_on) - EVIDENCE_LINES} more (--json)", "dim"))
    for said in e.warnings:
        grid.add_row(pen.text("beware", "yellow"), pen.text(said, "yellow"))
    return grid


def print_comparison(forecasts: Sequence[Forecast], console: Console) -> None:
    """One row per forecast, first which of them do not fit in memory."""
    from rich.table import Table

    pen = _Pen(console.width, console.options.ascii_only)
    names = unique_names(forecasts)
    if bad := [n for n, f in zip(names, forecasts, strict=True) if not f.memory.fits]:
        console.print(pen.text(f"{len(bad)} of {len(forecasts)} DO NOT FIT: {', '.join(bad)}", "bold red"))
    table = Table(box=None, padding=(0, 2 if pen.width >= 100 else 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("job", vertical="bottom", overflow="fold", min_width=10)
    for head in (
        "devices",
        "step\ntime",
        "tokens/s\n/device",
        "MFU",
        "memory\n% full",
        "fits",
        "a2a\nexposed",
        "$ per\n1B tok",
    ):
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    for name, f in zip(names, forecasts, strict=True):
        cost = f.cost.usd_per_1b_tokens
        cells = (
            f"{f.job.devices:,}",
            units.seconds(f.step_time_s),
            units.significant(f.tokens_per_s_per_device),
            units.percent(f.mfu),
            units.percent(units.share(f.memory.peak_bytes, f.memory.capacity_bytes)),
            "yes" if f.memory.fits else "NO",
            units.seconds(f.all_to_all.exposed_s) if f.all_to_all.time_s else "none",
            "unknown" if cost is None else units.dollars(cost).removeprefix("$"),
        )
        style = "" if f.memory.fits else "red"
        table.add_row(pen.text(name, style), *(pen.text(c, style) for c in cells))
    console.print(table)
