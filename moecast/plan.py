"""The command `plan`: search the plans of a job, and say why not the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError, nearest
from moecast.asked import Html, check_page
from moecast.programs import Changes, Json
from moecast.progress import counting

if TYPE_CHECKING:
    from simulator.planner.outcome import Outcome
    from simulator.planner.search import Search
    from simulator.planner.spread.question import Question

EXAMPLE = "Example: moecast plan examples/mixtral-8x7b.yaml --constraint 'memory_peak_bytes<=28e9' --engine-top 3"
KEEP = ("best", "all")
# From here on, half a minute of one core, a pool is taken unasked: its start costs a second or two. The answer is the
# same, byte for byte. No more of somebody's cores than this.
MANY_PARTS, MOST_UNASKED = 16, 8


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLE)(plan)


def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file; its plan is where the search begins.")],
    search: Annotated[
        Path | None, typer.Option(metavar="SPACE.yaml", help="Values of fields to try instead of the default ones.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="What to rank by: step_time, tokens_per_usd, or memory.")
    ] = "step_time",
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPR", help="Such as memory_peak_bytes<=70e9 or plan.tensor<=8; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="Plans to keep and print.")] = 20,
    engine_top: Annotated[int, typer.Option(min=0, max=1_000, help="Best plans to time by events and rank anew.")] = 0,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Work out every plan; the answer is the same.")] = (
        False
    ),
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="ADDRESS", help="Also write plans as Parquet: a folder, s3://..., ..."),
    ] = None,
    keep: Annotated[str, typer.Option(help="Plans to write: best (and the front), or all that are feasible.")] = "best",
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chip profile to use instead of the shipped one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1_024, help="Processes to search with; large spaces take up to 8.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Search with the workers of this Dask scheduler.")
    ] = None,
    part_plans: Annotated[
        int | None,
        typer.Option(
            min=1, max=1 << 26, help="Plans of a part: how often -o saves, what a worker takes (default 4,194,304)."
        ),
    ] = None,
    html: Html = None,
    set_: Changes = None,
    as_json: Json = False,
) -> None:
    """Search the plans of a job: the best, the front of time and memory, and what rejected the winner's neighbours."""
    from moecast.terminal_plan import print_search
    from simulator.planner.answer import answer_of
    from simulator.planner.search import OBJECTIVES

    for name, given, known in (("--objective", objective, OBJECTIVES), ("--keep", keep, KEEP)):
        if given not in known:
            raise QuestionError(f"{name} {given!r:.40}: must be one of {', '.join(known)}{nearest(given, known)}")
    check_page(html)
    if workers is not None and scheduler is not None:
        raise QuestionError("--workers, --scheduler: one of them; a scheduler has workers of its own")
    asked = _question(
        job, search, profile, set_, objective=objective, constraints=tuple(constraint or ()), top=top,
        exhaustive=exhaustive, keep=keep, **({} if part_plans is None else {"plans_per_part": part_plans}),
    )  # fmt: skip
    found = asked.search()
    with counting("searching plans", "plans") as tell:
        found.progress = tell
        outcome = _outcome(asked, found, output, workers, scheduler)
    with counting("timing the best by events", "plans") as tell:
        answer = answer_of(
            found, outcome, engine_top=engine_top, source=_source(job, set_), folder=job.parent, progress=tell
        )
    if html is not None:
        from reports.plan_page import write_plan_page

        write_plan_page(answer, html)
    if as_json:
        print(json.dumps(answer.to_dict(), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        print_search(answer, Console())
        if html is not None:
            print(f"report: {html}")


def _question(
    path: Path, space_path: Path | None, profile: Path | None, changes: list[str] | None, **asked: Any
) -> Question:
    """What is asked, read and checked; `asked` are the other fields of the question."""
    from hw_profiles.loader import load_chip_file, resolve_cluster
    from simulator.job.load import load_job
    from simulator.planner.constraints import parse_constraint
    from simulator.planner.space import read_space, space_of
    from simulator.planner.spread.question import Question

    asked["constraints"] = tuple(parse_constraint(text).text for text in asked["constraints"])
    given = read_space(space_path) if space_path is not None else None
    job = load_job(path, changes or ())
    chip = load_chip_file(profile) if profile is not None else None
    space = space_of(job, resolve_cluster(job.cluster, chip=chip), given, str(space_path or "the default space"))
    return Question(job=job, chip=chip, space=dict(space.values), **asked)


def _outcome(asked: Question, found: Search, output: str | None, workers: int | None, scheduler: str | None) -> Outcome:
    """The search in this process, in several, or by a scheduler's workers; what it saves is told on standard error."""
    from simulator.planner.spread.drive import here, spread
    from simulator.planner.spread.folder import folder_at
    from simulator.planner.spread.results import Results

    parts = found.parts.count
    if workers is None and scheduler is None and parts >= MANY_PARTS:
        from moecast.measure import cores

        workers = min(cores(), MOST_UNASKED)
    if scheduler is not None:
        from simulator.planner.spread.on_dask import on_dask

        runner = on_dask(scheduler)
    elif (workers or 1) > 1:
        from simulator.planner.spread.local import local

        runner = local(workers or 1)
    elif output is None:
        return found.run()
    else:
        runner = here(asked, found)
    results = None if output is None else Results(folder_at(output), asked, parts)
    outcome = spread(asked, found, runner, results, found.progress)
    if results is not None:
        for name in results.torn:
            print(f"{output}: {name} was not whole, and was done again", file=sys.stderr)
        print(f"{results.rows:,} plans in {parts:,} parts: {output}", file=sys.stderr)
    return outcome


def _source(job: Path, changes: list[str] | None) -> tuple[str, ...]:
    """The words of a command that name the job as it was asked for."""
    return (str(job), *(part for text in changes or () for part in ("--set", text)))
