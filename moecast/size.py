"""The command `size`: how many chips finish a run in time and in budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError, nearest
from moecast.asked import Html, check_page, finite, print_json
from moecast.programs import Changes, Json
from moecast.progress import NO, busy

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.results.sizing import Sizing

EXAMPLE = "Example: moecast size mixtral-8x7b --tokens 2e12 --days 60 --chips h100-sxm,tpu-v5p --budget 2e7"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLE)(size)


def size(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, or a job file (its plan is searched anew).")],
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of the run, such as 15e12.")],
    days: Annotated[str, typer.Option(metavar="N", help="Days that it may take.")],
    budget: Annotated[str | None, typer.Option(metavar="USD", help="Dollars that it may cost.")] = None,
    chips: Annotated[str, typer.Option(metavar="NAME,NAME", help="Chips to try.")] = "h100-sxm",
    prices: Annotated[Path | None, typer.Option(metavar="FILE", help="Dated prices instead of the profiles'.")] = None,
    terms: Annotated[
        str, typer.Option(help="Price of the budget: on_demand, reserved, spot, capacity_block.")
    ] = "on_demand",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences a step, where MODEL is a preset.")] = 2048,
    length: Annotated[int, typer.Option(min=1, help="Tokens a sequence, where MODEL is a preset.")] = 4096,
    phase: Annotated[
        list[str] | None,
        typer.Option(metavar="tokens=N,sequences=N[,length=N]", help="A first part with its own batch; repeatable."),
    ] = None,
    weak: Annotated[bool, typer.Option("--weak", help="Also the curve with the batch grown with the chips.")] = False,
    largest: Annotated[
        str | None, typer.Option(help="Largest microbatch, sequence or experts that fits the smallest answer.")
    ] = None,
    storage: Annotated[str | None, typer.Option(metavar="GB/S", help="Storage bandwidth, for checkpoints.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 where no count is enough.")] = False,
    html: Html = None,
    set_: Changes = None,
    as_json: Json = False,
) -> None:
    """Find the smallest count of chips that finishes a run in time and in budget, with the best plan of each."""
    from hw_profiles.yaml_reader import read_yaml
    from simulator.planner.largest import WHAT
    from simulator.planner.sizes import TERMS, Asked, read_prices

    check_page(html)
    for name, given, known in (("--terms", terms, TERMS), ("--largest", largest, WHAT)):
        if given is not None and given not in known:
            raise QuestionError(f"{name} {given!r:.40}: must be one of {', '.join(known)}{nearest(given, known)}")
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        data: Any = read_yaml(path)
        if not isinstance(data, dict):
            raise QuestionError(f"{path}: a job is a mapping with model, cluster and batch")
    else:
        data = {"model": model, "batch": {"sequences": sequences, "length": length}}
    asked = Asked(
        data, tuple(set_ or ()), path.parent, path.stem if path.suffix else model, finite(tokens, "--tokens"),
        finite(days, "--days"), None if budget is None else finite(budget, "--budget"), terms, _phases(phase),
    )  # fmt: skip
    if sum(n for n, _ in asked.phases) > asked.tokens:
        raise QuestionError(f"--phase: together more tokens than --tokens {asked.tokens:g}")
    rate = None if storage is None else finite(storage, "--storage") * 1e9
    names = [n.strip() for n in chips.split(",") if n.strip()]
    if not names:
        raise QuestionError(f"--chips {chips!r:.40}: names no chip")
    answer = _answer(asked, names, read_prices(prices) if prices is not None else None, weak, largest, rate)
    if html is not None:
        from reports.size_page import write_size_page

        write_size_page(answer, html)
    if as_json:
        print_json(answer.to_dict())
    else:
        from rich.console import Console

        print_sizing(answer, Console())
        if html is not None:
            print(f"report: {html}")
    if strict and not answer.smallest:
        raise typer.Exit(NO)


def _phases(texts: list[str] | None) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """`tokens=1e12,sequences=512` as (tokens, changes)."""
    out = []
    for text in texts or ():
        given = dict(part.partition("=")[::2] for part in text.split(","))
        if bad := next((k for k in given if k not in ("tokens", "sequences", "length")), None):
            hint = nearest(bad, ("tokens", "sequences", "length"))
            raise QuestionError(f"--phase {text!r:.60}: unknown {bad!r:.40}{hint}")
        if "tokens" not in given or len(given) < 2:
            raise QuestionError(f"--phase {text!r:.60}: needs tokens, and sequences or length")
        changes = tuple(f"batch.{k}={v}" for k, v in given.items() if k != "tokens")
        out.append((finite(given["tokens"], "--phase tokens"), changes))
    return tuple(out)


def _answer(asked: Any, names: list[str], prices: Any, weak: bool, largest: str | None, rate: float | None) -> Sizing:
    from hw_profiles.loader import load_chip
    from simulator.planner import sizes
    from simulator.planner.largest import largest as largest_of
    from simulator.results.sizing import Sizing

    points, smallest, curve, checkpoint = [], [], [], 0.0
    for name in names:
        with busy(f"sizing on {name}"):
            found = sizes.sweep(asked, name, prices)
            points += found
            good = [p for p in found if p.in_time and p.in_budget]
            smallest += good[:1]
            chip = load_chip(name)
            specs = dict(sizes.clusters_of(chip))
            whole = asked.job(specs[found[0].chips])
            checkpoint = max(checkpoint, sizes.checkpoint_bytes(whole, chip))
            ran = [p for p in found if p.refused is None] if weak else []
            for p in ran:
                grown = whole.batch.sequences * p.chips / ran[0].chips
                if grown == int(grown):
                    plan = sizes.best_plan(asked.job(specs[p.chips], [f"batch.sequences={int(grown)}"]))
                    curve.append((chip.name, p.chips, plan.tokens_per_s))
    most = None
    if largest is not None:
        if not smallest:
            raise QuestionError(f"--largest {largest}: no count is in time and in budget, so there is nothing to fill")
        spec = dict(sizes.clusters_of(load_chip(smallest[0].chip)))[smallest[0].chips]
        most = (largest, largest_of(sizes.planned(asked, spec), largest))
    known = {
        load_chip(n).name: tuple(
            (t, p.usd_per_chip_hour, p.source, p.date) for t, p in sizes.prices_of(load_chip(n), prices).items()
        )
        for n in names
    }
    return Sizing(
        asked.name, asked.tokens, asked.days, asked.budget_usd, asked.terms, tuple(points), tuple(smallest),
        tuple(curve), most, known, checkpoint, None if rate is None else checkpoint / rate,
    )  # fmt: skip


def print_sizing(s: Sizing, console: Console) -> None:
    """Print a sizing: the smallest of each chip, every count tried, prices and checkpoints."""
    from moecast.terminal_text import Say
    from reports import units

    say = Say(console)
    budget = "" if s.budget_usd is None else f", {units.dollars(s.budget_usd)} ({s.terms})"
    say.line(f"{s.model}: {units.count(s.tokens)} tokens in {s.days:g} days{budget}, by closed form", "bold")
    for p in s.smallest:
        said = f"{p.chips:,} {p.chip} are the fewest of those tried: {p.days or 0:.1f} days"
        say.line(said + (f", {units.dollars(p.usd[s.terms])} {s.terms}" if s.terms in p.usd else ", no price"), "green")
    if not s.smallest:
        say.line("no count that was tried is in time and in budget", "bold red")
    say.line("")
    table = say.new(("chip", "left"), ("chips", "right"), ("days", "right"), ("step", "right"), ("MFU", "right"),
                    ("run", "right"), ("$/1B", "right"), ("MWh", "right"), ("strong", "right"))  # fmt: skip
    first: dict[str, tuple[float, int]] = {}
    for p in s.points:
        if p.refused is not None or p.days is None:
            table.add_row(say.text(p.chip), say.text(f"{p.chips:,}"), say.text("none", "yellow"))
            continue
        rate, chips = first.setdefault(p.chip, (p.tokens_per_s or 0.0, p.chips))
        strong = (p.tokens_per_s or 0.0) / rate * chips / p.chips
        usd = f"${units.count(p.usd[s.terms])}" if s.terms in p.usd else "?"
        each = "?" if p.usd_per_1b_tokens is None else units.dollars(p.usd_per_1b_tokens).removeprefix("$")
        style = "green" if p.in_time and p.in_budget else ""
        cells = (p.chip, f"{p.chips:,}", f"{p.days:.1f}", units.seconds(p.phases[-1].step_time_s),
                 units.percent(p.mfu or 0.0), usd, each, "?" if p.kwh is None else units.significant(p.kwh / 1000),
                 f"{strong:.2f}")  # fmt: skip
        table.add_row(*(say.text(c, style) for c in cells))
    say.table(table)
    for p in s.points:
        if p.refused is not None:
            say.line(f"{p.chips:,} {p.chip}: {p.refused}", "yellow")
    for p in s.smallest:
        for i, part in enumerate(p.phases, 1):
            said = f"{p.chips:,} {p.chip}, phase {i}: {units.count(part.tokens)} tokens, {part.sequences:,} sequences:"
            say.line(f"{said} {part.days:.1f} days; {' '.join(part.overrides) or 'no split'}", "dim")
    for name, terms in s.prices.items():
        for kind, hourly, source, date in terms:
            say.line(f"{name} {kind} {units.dollars(hourly)} per chip-hour ({source}, {date})", "dim")
    for chip, chips, rate in s.weak:
        say.line(f"weak: {chips:,} {chip}, batch grown with them: {units.rate(rate, 'tokens')}")
    if s.largest is not None:
        say.line(f"largest {s.largest[0]} that fits the fewest chips, all else as planned: {s.largest[1]:,}")
    written = "" if s.checkpoint_s is None else f", {units.seconds(s.checkpoint_s)} to write at the bandwidth given"
    say.line(f"checkpoint {units.traffic(s.checkpoint_bytes)}{written}")
