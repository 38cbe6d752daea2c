"""The `validate` command: forecasts scored against tables of measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hw_profiles.errors import QuestionError, nearest
from moecast.programs import Json
from moecast.progress import bar

if TYPE_CHECKING:
    from hw_profiles.schema import Chip
    from simulator.results.validation import ValidationResult

EXAMPLE = "Example: moecast validate train_steps.csv --where spec_level=full --first-per dup_group --html scores.html"
ENGINES = ("closed-form", "events")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLE)(validate)


def validate(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="TABLE...", help="Measurements: our tables, or the published ones as they stand."),
    ],
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A chip profile to use for rows of its chip; others are left out."),
    ] = None,
    engine: Annotated[str, typer.Option(help="How steps are timed: closed-form, or events.")] = "closed-form",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only rows with this value in this column; repeatable."),
    ] = None,
    first_per: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Only the first row of each value of this column.")
    ] = None,
    allow_fitted: Annotated[
        bool, typer.Option("--allow-fitted", help="Also score rows that the profiles were fitted on, and say so.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page of figures that works offline.")
    ] = None,
    all_groups: Annotated[
        bool, typer.Option("--all", help="Print every group, reason and table, however small.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score forecasts against measured steps, kernels, collectives and memory, beside a baseline of one constant.

    Which table a file is, its columns tell. Every row that cannot be forecast is listed with the reason.
    """
    from hw_profiles.loader import load_chip_file
    from simulator.calibration.published import read_rows
    from simulator.calibration.validate import Options
    from simulator.calibration.validate import validate as run

    if engine not in ENGINES:
        raise QuestionError(f"--engine {engine:.40}: known engines: {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    chosen = [_condition(text) for text in where or ()]
    if html is not None and not html.resolve().parent.is_dir():
        raise QuestionError(f"--html {html}: its folder does not exist")
    seen: dict[Path, Path] = {}
    for path in tables:
        if path.resolve() in seen:
            raise QuestionError(f"{path}: is given twice")
        seen[path.resolve()] = path
    chip = load_chip_file(profile) if profile is not None else None
    read = []
    with bar("reading tables", len(tables)) as done:
        for path in tables:
            done.say(path.name)
            read.append(read_rows(path, chosen, first_per))
            done.advance()
    options = Options(chip, str(profile) if profile is not None else "as shipped", engine, allow_fitted)
    with bar("forecasting rows", sum(len(t.entries) for t in read)) as done:
        result = run(read, options, done.advance)
    if html is not None:
        from reports.validation_page import write_validation_page

        before = run(read, Options(None, "as shipped", engine, allow_fitted)) if chip is not None else None
        write_validation_page(result, html, more=lambda: _loop(tables, result, before, chip))
    if as_json:
        print(json.dumps(result.to_dict(), indent=1, allow_nan=False))
        return
    from moecast.terminal_validate import print_validation

    print_validation(result, html, all_groups)


def _loop(paths: list[Path], result: ValidationResult, before: ValidationResult | None, chip: Chip | None) -> list[str]:
    """What a page shows of our own tables beside scores: before and after, two measurements of one job, timelines."""
    from reports.loop_page import before_and_after, side_by_side, spread_of
    from simulator.analysis.forecast import forecast
    from simulator.calibration.tables import read_table
    from simulator.job.load import load_job

    out = [before_and_after(before, result)] if before is not None else []
    own = [p for p, t in zip(paths, result.tables, strict=True) if t.kind == "measurements"]
    for table in map(read_table, own):
        jobs = {key: load_job(dict(table.jobs[key])) for key in list(table.timelines)[:4] if key in table.jobs}
        simulated = {key: forecast(job, chip=chip).timeline for key, job in jobs.items()}
        known = {key: timeline for key, timeline in simulated.items() if timeline is not None}
        out += [spread_of(table), side_by_side(table, known, {key: job.name for key, job in jobs.items()})]
    return [part for part in out if part]


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise QuestionError(f"--where {text:.60}: must be COLUMN=VALUE")
    return column, value
