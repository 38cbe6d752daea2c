"""A forecast as HTML tables; every cell is escaped here, in `table`, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from reports import units
from reports.parts import MEMORY_PARTS, TIME_PARTS, routes, unique_names, words
from simulator.results.forecast import Collective, Cost, Forecast, OpRow

# A model of many kinds of layers has hundreds of ops; the tail is one row, so that a page stays a page.
MOST_ROWS = 40
# Up to so many stages are columns, more are rows.
TALL_STAGES = 4


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
    caption: str = "",
    loud: Sequence[int] = (),
) -> str:
    """One table; columns in `numbers` align right, rows in `loud` are marked as bad."""
    aligned = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in aligned else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    body = "\n".join(f"<tr{' class=bad' if i in loud else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows))
    # Not <caption>: that is never wider than its table.
    said = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="wide">{said}<table>{top}<tbody>\n{body}\n</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, name and value."""
    return table(("", ""), rows).replace("<table>", '<table class="facts">', 1)


def cost_text(cost: Cost) -> str:
    """Dollars per billion tokens, or why there are none."""
    if cost.usd_per_1b_tokens is None:
        return f"no price known: {cost.source}" if cost.source else "no price known"
    return units.dollars(cost.usd_per_1b_tokens)


def price_text(cost: Cost) -> str:
    """The price that the cost rests on: per chip and hour, terms, source, date."""
    if cost.usd_per_chip_hour is None:
        return "no price known"
    said = (f"{units.dollars(cost.usd_per_chip_hour)} per chip-hour", cost.terms, cost.source, cost.date)
    return ", ".join(s for s in said if s)


def headline(forecast: Forecast) -> tuple[str, str]:
    """Two tables: time, rates and FLOPs; communication, routing and money."""
    f, cost = forecast, forecast.cost
    speed = [
        ("step time", f"{units.seconds(f.step_time_s)} ({units.seconds_range(*f.step_time_interval_s)})"),
        ("interval", f.interval_meaning),
        ("throughput", f"{units.rate(f.tokens_per_s, 'tokens')}, {units.rate(f.sequences_per_s, 'sequences')}"),
        ("per device", units.rate(f.tokens_per_s_per_device, "tokens")),
        ("MFU", f"{units.percent(f.mfu)} of {_peak(f)}"),
        ("HFU", f"{units.percent(f.hfu)} of {_peak(f)}"),
        (
            "model FLOPs",
            f"{units.flops(f.flops.model_per_step)} per step, {units.flops(f.flops.model_per_token)} per token",
        ),
        ("forward FLOPs", f"{units.flops(f.flops.model_forward_per_sequence)} per sequence"),
        ("executed FLOPs", f"{units.flops(f.flops.executed_per_device)} per device and step"),
    ]
    rest = [("all-to-all", all_to_all_text(f)), ("routing", routing_text(f)), ("cost per 1B tokens", cost_text(cost))]
    if cost.usd_per_step is not None:
        rest.append(("cost per step", units.dollars(cost.usd_per_step)))
    if cost.usd_per_chip_hour is not None:
        rest.append(("price", price_text(cost)))
    if cost.kwh_per_step is not None:
        rest.append(("energy", f"{units.significant(cost.kwh_per_step)} kWh per step"))
    return facts(speed), facts(rest)


def _peak(forecast: Forecast) -> str:
    return f"{units.flops_rate(forecast.evidence.peak_flops_per_s)} {forecast.evidence.peak_dtype} per device"


def all_to_all_text(forecast: Forecast) -> str:
    """Total and exposed time of all all-to-alls, and bytes sent per device."""
    a2a = forecast.all_to_all
    if not a2a.time_s and not a2a.bytes_per_device:
        return "none"
    share = units.percent(units.share(a2a.exposed_s, forecast.step_time_s))
    exposed = f"{units.seconds(a2a.exposed_s)} exposed ({share} of the step)"
    return f"{units.seconds(a2a.time_s)}, {exposed}, {units.traffic(a2a.bytes_per_device)} per device"


def routing_text(forecast: Forecast) -> str:
    """Routing model, drops and the hottest rank."""
    routing = forecast.routing
    if not routes(forecast):
        return "none"
    drops = f"{units.percent(routing.dropped_token_fraction)} of tokens dropped"
    return f"{routing.model}: {drops}, hottest rank {units.significant(routing.max_over_mean_load)} x the mean"


def time_parts(forecast: Forecast) -> str:
    """Seconds and share of every part of the step."""
    step = forecast.step_time_s
    values = [(said, getattr(forecast.parts, name), meaning) for name, said, meaning in TIME_PARTS]
    rows = [(said, units.seconds(v), units.percent(units.share(v, step)), meaning) for said, v, meaning in values]
    rows.append(("step", units.seconds(step), units.percent(1.0), ""))
    return table(("part", "time", "share", "meaning"), rows, numbers=(1, 2))


def ops(forecast: Forecast) -> str:
    """The compute ops by time, the shortest summed up in one row."""
    every = sorted(forecast.ops, key=lambda op: -op.time_s)
    total = sum(op.time_s for op in every)
    rows = [_op(op, total) for op in every[:MOST_ROWS]]
    if rest := every[MOST_ROWS:]:
        time_s = sum(op.time_s for op in rest)
        rows.append(
            (
                f"{len(rest)} more",
                "",
                "",
                units.seconds(time_s),
                units.percent(units.share(time_s, total)),
                "",
                "",
                "",
                "",
            )
        )
    head = ("scope", "phase", "count", "time", "of compute", "bound", "FLOPs", "bytes", "FLOP/s")
    return table(head, rows, numbers=(2, 3, 4, 6, 7, 8))


def _op(op: OpRow, total_s: float) -> tuple[str, ...]:
    speed = units.flops_rate(op.flops / op.time_s) if op.time_s and op.flops else ""
    return (
        op.scope,
        op.phase,
        units.count(op.count),
        units.seconds(op.time_s),
        units.percent(units.share(op.time_s, total_s)),
        op.bound,
        units.flops(op.flops),
        units.traffic(op.bytes),
        speed,
    )


def memory(forecast: Forecast) -> str:
    """Bytes by part and stage, without the parts that no stage has; what does not fit is marked."""
    m = forecast.memory
    stages = m.by_stage
    loud = [i for i, s in enumerate(stages) if s.peak_bytes > m.capacity_bytes]
    columns = [
        ["stage", *(str(s.stage) for s in stages)],
        ["layers", *(f"{s.layers:,}" for s in stages)],
        ["in flight", *(f"{s.microbatches_in_flight:,}" for s in stages)],
    ]
    for name, said, _ in MEMORY_PARTS:
        values = [getattr(s, name) for s in stages]
        if any(values):
            columns.append([said, *(units.memory(v) for v in values)])
    columns.append(["peak", *(units.memory(s.peak_bytes) for s in stages)])
    columns.append(["of capacity", *(units.percent(units.share(s.peak_bytes, m.capacity_bytes)) for s in stages)])
    caption = (
        f"Capacity {units.memory(m.capacity_bytes)} per device; in flight: microbatches whose activations are held"
    )
    if len(stages) <= TALL_STAGES:
        bad = range(len(columns) - 3, len(columns) - 1) if loud else ()
        return table(columns[0], columns[1:], numbers=range(1, len(stages) + 1), caption=caption, loud=bad)
    head, *rows = list(zip(*columns, strict=True))
    return table(head, rows, numbers=range(len(columns)), caption=caption, loud=loud)


def collectives(forecast: Forecast) -> str:
    """The collectives by time, with bytes and group."""
    every = sorted(forecast.collectives, key=lambda c: -c.time_s)
    rows = [_collective(c) for c in every[:MOST_ROWS]]
    if rest := every[MOST_ROWS:]:
        time_s, exposed_s = sum(c.time_s for c in rest), sum(c.exposed_s for c in rest)
        rows.append((f"{len(rest)} more", "", "", "", "", units.seconds(time_s), units.seconds(exposed_s), "", ""))
    head = ("scope", "kind", "group", "level", "count", "time", "exposed", "bytes", "bytes/s")
    return table(head, rows, numbers=(2, 4, 5, 6, 7, 8))


def _collective(c: Collective) -> tuple[str, ...]:
    speed = f"{units.traffic(c.bytes / c.time_s)}/s" if c.time_s else ""
    times = (units.seconds(c.time_s), units.seconds(c.exposed_s))
    return (c.scope, c.kind, f"{c.group_size:,}", c.level, units.count(c.count), *times, units.traffic(c.bytes), speed)


def comparison(forecasts: Sequence[Forecast]) -> str:
    """One row per forecast; those that do not fit are marked."""
    rows = [
        (
            name,
            f"{f.job.devices:,} ({f.job.chip})",
            units.seconds(f.step_time_s),
            units.seconds_range(*f.step_time_interval_s),
            units.significant(f.tokens_per_s_per_device),
            units.percent(f.mfu),
            units.memory_of(f.memory.peak_bytes, f.memory.capacity_bytes),
            "yes" if f.memory.fits else "NO",
            units.seconds(f.all_to_all.exposed_s),
            "unknown" if f.cost.usd_per_1b_tokens is None else units.dollars(f.cost.usd_per_1b_tokens),
        )
        for name, f in zip(unique_names(forecasts), forecasts, strict=True)
    ]
    head = (
        "job",
        "devices",
        "step time",
        "interval",
        "tokens/s per device",
        "MFU",
        "peak memory",
        "fits",
        "all-to-all exposed",
        "per 1B tokens",
    )
    return table(
        head, rows, numbers=(2, 3, 4, 5, 6, 8, 9), loud=[i for i, f in enumerate(forecasts) if not f.memory.fits]
    )


def job(forecast: Forecast) -> str:
    """The question: model, cluster, batch and training choices."""
    j = forecast.job
    return facts(
        [
            ("name", j.name),
            ("hash", j.hash[:16]),
            ("model", j.model),
            ("parameters", f"{units.count(j.total_parameters)}, {units.count(j.active_parameters)} active per token"),
            ("cluster", j.cluster),
            ("devices", f"{j.devices:,} on {j.chips:,} chips ({j.chip})"),
            ("batch", f"{j.sequences:,} sequences, {units.count(j.tokens_per_step)} tokens per step"),
            ("precision", j.precision),
            ("optimizer", j.optimizer),
            ("remat", j.remat),
            ("capacity", j.capacity),
            ("dispatch", j.dispatch),
            ("software", j.stack),
            ("engine", forecast.engine),
        ]
    )


def plan(forecast: Forecast) -> str:
    """The plan as it was given."""
    if not forecast.job.plan:
        return "<p>no parallelism</p>"
    return facts([(key.replace("_", " "), words(value)) for key, value in forecast.job.plan.items()])
