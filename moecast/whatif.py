"""The commands `whatif` (a grid of forecasts) and `sensitivity` (how much every number weighs)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError
from moecast.asked import Engine, Html, Profile, check_engine, check_page, naming, print_json
from moecast.programs import Changes, Json
from moecast.progress import counting as bar

if TYPE_CHECKING:
    from simulator.planner.what_if import Question

WHATIF = (
    "Example: moecast whatif examples/deepseek-v3.yaml --vary plan.expert=32,64,128"
    " --vary 'cluster.chip.nic_bandwidth=*1,*2'"
)
SENSITIVITY = "Example: moecast sensitivity examples/mixtral-8x7b.yaml --html tornado.html"
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=WHATIF)(whatif)
    app.command(epilog=SENSITIVITY)(sensitivity)


def _question(path: Path, changes: list[str] | None, profile: Path | None) -> Question:
    from hw_profiles.loader import load_chip_file
    from hw_profiles.yaml_reader import read_yaml
    from simulator.planner.what_if import Question

    chip = load_chip_file(profile) if profile is not None else None
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise QuestionError(f"{path}: a job is a mapping with model, cluster and batch")
    return Question(data, tuple(changes or ()), chip, path.parent, path.stem)


def whatif(
    job: JobFile,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=V,V", help="Values of a field, or of cluster.chip.NUMBER; *2 scales; repeatable."),
    ] = None,
    engine: Engine = "closed-form",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the cells as a Parquet file.")
    ] = None,
    profile: Profile = None,
    html: Html = None,
    set_: Changes = None,
    as_json: Json = False,
) -> None:
    """Forecast every combination of some values; what a rule refuses stays in the table, with the rule."""
    from hw_profiles.loader import resolve_cluster
    from simulator.planner.vary import parse_axis
    from simulator.planner.what_if import what_if

    check_engine(engine)
    for path in (html, output):
        check_page(path)
    if not vary:
        raise QuestionError("whatif: say what to vary, such as --vary plan.expert=8,16,32")
    question = _question(job, set_, profile)
    with naming(job), bar("forecasting", "cells") as tell:
        base = question.job()
        chip = resolve_cluster(base.cluster, chip=question.chip).chip
        grid = what_if(question, [parse_axis(text, base, chip) for text in vary], engine, tell)
    if output is not None:
        _write_cells(grid, output)
    if html is not None:
        from reports.whatif_page import write_grid_page

        write_grid_page(grid, html)
    if as_json:
        print_json(grid.to_dict())
        return
    from rich.console import Console

    from moecast.terminal_whatif import print_grid

    print_grid(grid, Console())


def _write_cells(grid: Any, path: Path) -> None:
    """The cells as one Parquet file, a column for each field and number."""
    import importlib
    from dataclasses import asdict

    from hw_profiles.files import write_whole

    pa: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    rows = [asdict(c) for c in grid.cells]
    columns: dict[str, Any] = {}
    for field in grid.axes:
        values = [r["values"][field] for r in rows]
        plain = {type(v) for v in values} <= {int} or {type(v) for v in values} <= {float}
        columns[field] = values if plain else [str(v) for v in values]
    columns |= {name: [r[name] for r in rows] for name in rows[0] if name != "values"}
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    write_whole(path, sink.getvalue().to_pybytes())


def sensitivity(
    job: JobFile,
    step: Annotated[float, typer.Option(help="Relative change of a chip's number to either side.")] = 0.01,
    profile: Profile = None,
    html: Html = None,
    set_: Changes = None,
    as_json: Json = False,
) -> None:
    """Show how much every number of chip and model weighs in a step, and what twice as good would bring."""
    from simulator.planner.sensitivity import sensitivity as weigh

    if not 1e-6 <= step <= 0.5:
        raise QuestionError(f"--step {step:g}: must be from 0.000001 to 0.5")
    check_page(html)
    question = _question(job, set_, profile)
    with naming(job), bar("varying", "numbers") as tell:
        found = weigh(question, step, tell)
    if html is not None:
        from reports.whatif_page import write_tornado_page

        write_tornado_page(found, html)
    if as_json:
        print_json(found.to_dict())
        return
    from rich.console import Console

    from moecast.terminal_whatif import print_sensitivity

    print_sensitivity(found, Console())
