"""The command `plan`: search the plans of a job, and say why not the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError, nearest
from moecast.programs import Changes, Json

if TYPE_CHECKING:
    from simulator.planner.search import Search
    from simulator.planner.store import Store

EXAMPLE = "Example: moecast plan examples/mixtral-8x7b.yaml --constraint 'memory_peak_bytes<=28e9' --engine-top 3"
KEEP = ("best", "all")


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
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Also write plans as a Parquet dataset.")
    ] = None,
    keep: Annotated[str, typer.Option(help="Plans to write: best (and the front), or all that are feasible.")] = "best",
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chip profile to use instead of the shipped one.")
    ] = None,
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
    found, store = _prepared(job, search, objective, constraint, top, exhaustive, output, keep, profile, set_)
    with _bar("searching plans", "plans") as tell:
        found.progress = tell
        outcome = found.run()
    with _bar("timing the best by events", "plans") as tell:
        answer = answer_of(
            found, outcome, engine_top=engine_top, source=_source(job, set_), folder=job.parent, progress=tell
        )
    if store is not None:
        if keep == "best":
            _write_best(store, outcome)
        store.close()
        print(f"{store.rows:,} plans: {output}", file=sys.stderr)
    if as_json:
        print(json.dumps(answer.to_dict(), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        print_search(answer, Console())


def _prepared(
    path: Path,
    space_path: Path | None,
    objective: str,
    constraints: list[str] | None,
    top: int,
    exhaustive: bool,
    output: Path | None,
    keep: str,
    profile: Path | None,
    changes: list[str] | None,
) -> tuple[Search, Store | None]:
    """The search, and where its plans go."""
    from hw_profiles.loader import load_chip_file, resolve_cluster
    from simulator.job.load import load_job
    from simulator.planner.constraints import parse_constraint
    from simulator.planner.search import Search
    from simulator.planner.space import read_space, space_of
    from simulator.planner.store import Store

    limits = [parse_constraint(text) for text in constraints or ()]
    given = read_space(space_path) if space_path is not None else None
    job = load_job(path, changes or ())
    chip = load_chip_file(profile) if profile is not None else None
    cluster = resolve_cluster(job.cluster, chip=chip)
    space = space_of(job, cluster, given, str(space_path or "the default space"))
    store = None
    if output is not None:
        asked = {"job": job.hash, "space": space.values, "objective": objective, "top": top, "keep": keep,
                 "constraints": [c.text for c in limits], "chip": cluster.chip.model_dump(mode="json")}  # fmt: skip
        store = Store(output, _hash(asked))
    found = Search(
        job, cluster, space, objective=objective, constraints=limits, top=top,
        exhaustive=exhaustive or keep == "all", sink=store.add if store is not None and keep == "all" else None,
    )  # fmt: skip
    return found, store


def _hash(data: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _source(job: Path, changes: list[str] | None) -> tuple[str, ...]:
    """The words of a command that name the job as it was asked for."""
    return (str(job), *(part for text in changes or () for part in ("--set", text)))


def _write_best(store: Store, outcome: Any) -> None:
    import numpy as np

    from simulator.planner.search import NUMBERS
    from simulator.planner.table import FIELDS

    both = outcome.best.joined(outcome.front.codes, outcome.front.numbers)
    _, first = np.unique(both.codes, axis=0, return_index=True)
    kept = both.taken(np.sort(first))
    store.add(dict(zip(FIELDS, kept.codes.T, strict=True)), dict(zip(NUMBERS, kept.numbers.T, strict=True)))


@contextmanager
def _bar(doing: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, with rate and time left; nothing where standard error is a file or a pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
