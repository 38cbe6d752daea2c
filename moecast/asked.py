"""What the planner's commands share: the job as asked for, its cluster, pages, and JSON."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError, nearest

if TYPE_CHECKING:
    from hw_profiles.cluster import Cluster
    from simulator.job.job import Job

Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write a report page that works offline.")
]
Profile = Annotated[Path | None, typer.Option(metavar="FILE", help="A chip profile to use instead of the shipped one.")]
Engine = Annotated[str, typer.Option(help="How steps are timed: closed-form, or events.")]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error within says that it is about the job in `path`, unless it is about an option."""
    try:
        yield
    except QuestionError as error:
        said = str(error)
        raise QuestionError(said if said.startswith((str(path), "--", "engine")) else f"{path}: {said}") from None


def job_of(path: Path, changes: Sequence[str] | None, profile: Path | None = None) -> tuple[Job, Cluster]:
    """The job in `path` with `changes`, and its cluster; an error says which file it is in."""
    from hw_profiles.loader import load_chip_file, resolve_cluster
    from simulator.job.load import load_job

    chip = load_chip_file(profile) if profile is not None else None
    with naming(path):
        job = load_job(path, changes or ())
        return job, resolve_cluster(job.cluster, chip=chip)


def check_engine(engine: str) -> None:
    """QuestionError for an engine that there is not."""
    known = ("closed-form", "events")
    if engine not in known:
        raise QuestionError(f"--engine {engine!r:.40}: must be one of {', '.join(known)}{nearest(engine, known)}")


def check_page(path: Path | None) -> None:
    """OSError, before the work, where no page can be written: a page replaces a file, never a folder or a device."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is there and is not a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))


def print_json(data: Any) -> None:
    """`data` as JSON; QuestionError where a number is not finite."""
    try:
        print(json.dumps(data, indent=2, allow_nan=False))
    except ValueError:
        raise QuestionError("the answer is not finite: a number of the job or profile is too large or small") from None


def finite(text: str, option: str) -> float:
    """A positive number after `option`; QuestionError for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise QuestionError(f"{option} {text!r:.40}: must be a finite number above zero")
    return number
