"""Searches as processes of their own, and Dask clusters for them, for tests that kill some."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
JOB = {
    "model": "mixtral-8x7b",
    "cluster": {"chip": "h100-sxm", "nodes": 4},
    "batch": {"sequences": 64, "length": 2048},
    "plan": {"expert": 8, "shard": "optimizer"},
}
# 16 parts of about 0.1 s each.
SPACE = {
    "plan": {
        "tensor": [1, 2], "pipeline": [1, 2, 4, 8], "virtual_stages": 1, "expert": [2, 4, 8], "expert_tensor": 1,
        "microbatch_sequences": [1, 2], "schedule": ["1f1b", "dualpipe"],
    },
}  # fmt: skip
PLANS_PER_PART = 150
# No test of time: others may have the cores for minutes.
LONGEST_S = 300.0


def environment(root: Path = ROOT) -> dict[str, str]:
    """What a process needs to import moecast from `root`, and to share two cores with others."""
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def command(*arguments: str) -> list[str]:
    """The search, saving often."""
    plan = [sys.executable, "-m", "moecast", "plan", "job.yaml", "--search", "space.yaml", "--json"]
    return [*plan, "--part-plans", str(PLANS_PER_PART), *arguments]


def write_question(folder: Path) -> None:
    """The files that `command` reads."""
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The search to its end."""
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, check=False,
        timeout=LONGEST_S,
    )  # fmt: skip


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The search while it runs; killed in the end, if it is not over."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(*arguments), cwd=folder, env=environment(), text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def saved(folder: Path) -> dict[str, int]:
    """Parts that are there, and when each was written, ns."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "plans").glob("part-*.parquet")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of results but the hidden ones, which a killed driver may leave."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def wait_for(what: Callable[[], object], said: str) -> None:
    """Until `what()` holds."""
    end = time.monotonic() + LONGEST_S
    while not what():
        assert time.monotonic() < end, f"waited {LONGEST_S} s for {said}"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Worker processes that a driver, or a Dask nanny, has started."""
    # Whichever thread has started them.
    found = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    """As if the machine had gone."""
    os.kill(pid, signal.SIGKILL)


@contextmanager
def dask_scheduler(folder: Path) -> Iterator[tuple[str, int]]:
    """A scheduler on the loopback; its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _dask(folder, "scheduler", "--host", "127.0.0.1", "--port", str(port)) as process:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(listens, "the scheduler")
        yield f"tcp://127.0.0.1:{port}", process.pid


@contextmanager
def dask_workers(folder: Path, address: str, count: int, root: Path = ROOT) -> Iterator[list[int]]:
    """Workers of one thread each, from the moecast in `root`; the processes that keep them alive."""
    with ExitStack() as stack:
        arguments = ("worker", address, "--nthreads", "1", "--host", "127.0.0.1")
        yield [stack.enter_context(_dask(folder, *arguments, root=root)).pid for _ in range(count)]


@contextmanager
def _dask(folder: Path, kind: str, *arguments: str, root: Path = ROOT) -> Iterator[subprocess.Popen[bytes]]:
    run_it = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments, "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(run_it, cwd=folder, env=environment(root), **quiet) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
