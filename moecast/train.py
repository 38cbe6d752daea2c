"""`moecast train`: really runs a job in JAX, on this machine's devices or on several processes'.

Everything heavy is imported once the question is known to be right, JAX last: how many devices a CPU shows is fixed
when it starts.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecast.several import Coordinator, Process, Processes, met, place, supervised

if TYPE_CHECKING:
    from hw_profiles.cluster import Cluster
    from simulator.job.job import Job
    from trainer.report import Result

# Set in a worker: the process that started it and waits for it.
WORKER = "MOECAST_WORKER_OF"
PLATFORMS = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("gpu", "cuda", "rocm")}
# In-process collectives end the process when a device is late. On shared cores it may be minutes late, and the run's
# own bound on a step (900 s) comes first, with a line that says what was waited for.
LATE_S = 1200


def train(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in all (default: training.run.steps).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --out.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, max=512, metavar="N", help="JAX devices (default: those of the job's cluster).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the run is written (default: runs/NAME beside the job).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=4; repeatable."),
    ] = None,
    coordinator: Coordinator = None,
    process: Process = None,
    processes: Processes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train the job for real, sharded as its plan says, and record losses, routing and checkpoints."""
    from hw_profiles.loader import resolve_cluster
    from moecast.cli import _naming
    from simulator.job.load import load_job
    from simulator.job.rules import resolve

    with _naming(job):
        asked = load_job(job, set_ or ())
        cluster = resolve_cluster(asked.cluster)
        if cluster.chip.kind == "cpu" and devices is not None and devices != cluster.devices:
            asked = asked.model_copy(update={"cluster": {"chip": "cpu-host", "devices": devices}})
            cluster = resolve_cluster(asked.cluster)
        where = place(coordinator, process, processes, cluster.chip.kind)
        if cluster.chip.kind == "cpu":
            resolve(asked, cluster)
            where.divides(cluster.devices)
    if where.several and WORKER not in os.environ:
        raise typer.Exit(supervised(sys.argv[1:], WORKER, hint="; --resume goes on"))
    prepare(cluster, cluster.devices // where.count)
    target = out or job.parent / "runs" / asked.name
    with met(where) if WORKER in os.environ else nullcontext():
        result = _run(job, asked, cluster, target, devices, steps, resume)
    if result is not None:
        _show(result, as_json)


def prepare(cluster: Cluster, local: int) -> None:
    """Settings that JAX reads when it starts."""
    if cluster.chip.kind != "cpu":
        return
    _keep_memory()
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = [
        f"--xla_force_host_platform_device_count={local}",
        f"--xla_cpu_collective_call_warn_stuck_timeout_seconds={LATE_S // 5}",
        f"--xla_cpu_collective_call_terminate_timeout_seconds={LATE_S}",
        f"--xla_cpu_collective_timeout_seconds={LATE_S}",
    ]
    if cluster.devices > 1:
        # Each device has a thread of its own; more threads in each would fight for the cores.
        flags.append("--xla_cpu_multi_thread_eigen=false")
        # A program for several CPU devices that comes from JAX's cache no longer keeps its collectives in order: one
        # device waits in an all-reduce, another in an all-to-all, for ever (jaxlib 0.10.2, soon after the start).
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def _keep_memory() -> None:
    """Have the C library keep the memory of a step for the next one, where it can be told (glibc's mallopt).

    XLA:CPU takes the temporaries of every step anew; from some MiB on they would be mapped, cleared page by page and
    given back each time: 140 ms a step instead of 76 (128 hidden, two devices, November 2026).
    """
    import contextlib
    import ctypes

    trim, top_pad, most_mapped = -1, -2, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((most_mapped, 0), (trim, 2**31 - 1), (top_pad, 64 * 2**20)):
            libc.mallopt(option, value)


def _run(
    path: Path, job: Job, cluster: Cluster, out: Path, devices: int | None, steps: int | None, resume: bool
) -> Result | None:
    """The run in this process; what process 0 shows of it."""
    from hw_profiles.errors import Interrupted, QuestionError, WorkFailed
    from moecast.cli import _complain, _naming
    from moecast.progress import INTERRUPTED

    try:
        import jax

        from trainer import run as trainer
    except ImportError as error:
        raise QuestionError(f"moecast train: needs {error.name}: pip install 'moecast[train]'") from None
    try:
        present = jax.devices()
    except RuntimeError as error:
        raise WorkFailed(f"JAX found no devices: {' '.join(str(error).split())}") from None
    check_present(path, cluster, present, devices)
    from moecast.train_progress import TrainProgress

    _quieten()
    lead = jax.process_index() == 0
    progress = TrainProgress(job.training.run.log_every) if lead else None
    parent = int(os.environ[WORKER]) if WORKER in os.environ else None
    try:
        with _naming(path):
            result = trainer.run(
                job, path.parent, out, devices=present, steps=steps, resume=resume, progress=progress, parent=parent
            )
    except Interrupted as stopped:
        if progress is not None:
            progress.close()
        _complain(str(stopped))
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if progress is not None:
            progress.close()
    return result if lead else None


def _quieten() -> None:
    """Keep TensorStore, after a failed write, from printing that nobody waits for its other writes any more."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def check_present(path: Path, cluster: Cluster, present: list[Any], devices: int | None) -> None:
    """QuestionError where the job is for other devices than there are."""
    from hw_profiles.errors import QuestionError

    platform = str(present[0].platform)
    if platform in PLATFORMS[cluster.chip.kind] and len(present) == cluster.devices:
        return
    here = f"{len(present)} {platform} device" + ("s" if len(present) > 1 else "")
    fits = devices or (len(present) if platform != "cpu" else 8)
    raise QuestionError(
        f"{path}: cluster = {cluster.name}, {cluster.devices:,} devices, and here are {here}: "
        f"moecast scale {path} --devices {fits} makes a small job of it that runs here"
    )


def _show(result: Result, as_json: bool) -> None:
    from moecast.cli import _print_json

    if as_json:
        _print_json(result.to_dict())
        return
    from rich.console import Console

    from moecast.train_progress import result_table

    Console().print(result_table(result))


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: moecast train examples/tiny-moe.yaml --steps 100")(train)
