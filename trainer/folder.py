"""The folder of a run: whose it is, who writes in it now, and files that are written aside and renamed.

Layout: `run.json` (the job), `metrics.jsonl`, `routing.parquet`, `router.parquet`, `telemetry/`, `tensorboard/`,
`checkpoints/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.files import write_whole
from simulator.job.job import Job

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
VERSION = 1
MAX_JSON_BYTES = 50_000_000


def job_record(job: Job) -> dict[str, Any]:
    """What makes a run that run, as plain values: the job, without names and without how it is spread and timed.

    A run may go on with other devices, another plan, other software; not with another model, batch or learning.
    """
    texts = {"notes", "source", "published", "name"}
    away = {"run", "routing", "remat", "dispatch"}
    dropped: Any = {"name": True, "cluster": True, "plan": True, "software": True, "model": texts, "training": away}
    record: dict[str, Any] = job.model_dump(mode="json", exclude=dropped)
    return record


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """`field = old there, new here` for the first field in which the two differ; None where they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    if old == new:
        return None
    return f"{path} = {_shown(old)} there, {_shown(new)} in the job"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_same_job(record: Any, job: Job, where: str) -> None:
    """QuestionError, naming the first field that differs, where `record` is of another job."""
    difference = first_difference(record, job_record(job))
    if difference:
        raise QuestionError(f"{where}: of another job: {difference}")


def read_json(path: Path) -> Any:
    """The JSON in `path`; ValueError where there is none, OSError where it cannot be read."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError("too large")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(out: Path, job: Job, *, resume: bool) -> bool:
    """Whether `out` holds a run of `job` to go on with; QuestionError where it holds anything else.

    Without `resume` the folder must be new or empty.
    """
    if out.exists() and not out.is_dir():
        raise QuestionError(f"--out {out}: is there and is not a folder")
    found = [x.name for x in out.iterdir() if x.name != LOCK_FILE] if out.is_dir() else []
    if not found:
        return False
    file = out / RUN_FILE
    try:
        record = read_json(file)
        there = record["job"] if record.get("version") == VERSION else None
    except FileNotFoundError:
        raise QuestionError(f"--out {out}: is not empty and holds no run; name another folder") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise QuestionError(f"--out {out}: {RUN_FILE} cannot be read; name another folder") from None
    if there is None:
        raise QuestionError(f"--out {out}: {RUN_FILE} is not of this version of the trainer; name another folder")
    check_same_job(there, job, f"--out {out}")
    if not resume:
        raise QuestionError(f"--out {out}: holds a run of this job; --resume goes on with it, or name another folder")
    return True


@contextlib.contextmanager
def claimed(out: Path, job: Job, *, resume: bool) -> Iterator[bool]:
    """The folder as this process's alone; gives whether there is a run in it to go on with.

    Raises QuestionError where another process writes there, or the folder is another job's.
    """
    existing = check_folder(out, job, resume=resume)
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QuestionError(f"--out {out}: another run is writing there now") from None
        if not existing:
            text = json.dumps(
                {"version": VERSION, "name": job.name, "hash": job.hash, "job": job_record(job)}, indent=1
            )
            write_whole(out / RUN_FILE, text.encode())
        yield existing
