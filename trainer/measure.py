"""Measures a job as it really runs: whole steps without the profiler, then traced steps by scope, pass and device.

Batches are placed before the clock starts: the input pipeline is not part of a step here (a note in every row says so).
Of several processes each does the same at the same time with its own devices; process 0 has the rows of all.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from hw_profiles.errors import WorkFailed
from hw_profiles.loader import resolve_cluster
from simulator.job.rules import resolve
from simulator.results.measurement import Measurement
from trainer.attribution import Program
from trainer.batches import Placer
from trainer.hlo import parse_module, read_program
from trainer.hlo_memory import compile_lowered
from trainer.measured import Rows, Sample, rows_of
from trainer.others import COMPILE_S, Others
from trainer.step import Trainer
from trainer.telemetry import LayerSeen, layer_numbers, seen_layers
from trainer.xplane import Execution, read_trace, trace_file

if TYPE_CHECKING:
    from simulator.job.job import Job

# The first step of a new state is slow, and now and then the second.
WARM_UP = 2
# Programs compiled at once: XLA's compiler is one thread for the most part.
COMPILERS = 2
# Steps of one trace, where several turns share them.
FEWEST_TRACED = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one measurement of a job gave: rows of the table, what its routers did, and the last traced step."""

    job: Job
    rows: tuple[Measurement, ...]
    routing: tuple[LayerSeen, ...]
    timeline: tuple[tuple[int, str, float, float], ...] = ()


@dataclass(frozen=True)
class Asked:
    """A job to measure, and the folder of its files."""

    job: Job
    folder: Path


def measure(
    asked: Sequence[Asked],
    devices: Sequence[Any],
    *,
    steps: int,
    traced: int,
    rounds: int = 1,
    turns: int = 1,
    say: Say = lambda _: None,
    others: Others | None = None,
) -> list[Measured]:
    """Run jobs on `devices`: each in turn `steps` timed steps after a warm-up and `traced` ones under the profiler.

    All of that happens `rounds` times; each of these measurements is taken in `turns` parts between those of all
    others, so that a machine whose speed drifts drifts alike for all (`traced_in` says in which it is traced). What is
    compiled is kept, the state is drawn anew. `say` is told what is done, `count` times. `others` are this process and
    those with the other devices, of which process 0 gets the rows. QuestionError for a job the trainer cannot run, or
    where another process was asked something else; WorkFailed where a step fails, its trace cannot be matched with the
    program, or a process is gone.
    """
    out = []
    others = others or Others()
    counts = {"--steps": steps, "--traced": traced, "--rounds": rounds, "--turns": turns}
    others.same({"jobs (hash)": [one.job.hash[:12] for one in asked], **counts})
    with contextlib.ExitStack() as stack:
        ready, compiling = [], []
        # Compilers of several processes may ask each other: one program after the other.
        with ThreadPoolExecutor(COMPILERS if others.count == 1 else 1) as pool:
            for one in asked:
                say(f"{one.job.name}: building")
                ready.append(Ready(one, devices, others))
                stack.callback(ready[-1].close)
                compiling.append(pool.submit(ready[-1].compile))
            for made, compiled in zip(ready, compiling, strict=True):
                compiled.result()
                say(f"{made.job.name}: compiled")
        # Programs and what they were made of stay to the end: the collector need not go through them again and again.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        samples = [[Sample() for _ in ready] for _ in range(rounds)]
        traces = traced_in(traced, turns)
        for turn in range(turns):
            timed = steps // turns + (turn < steps % turns)
            seen = traces[turn]
            for part in range(rounds):
                for made, sample in zip(ready, samples[part], strict=True):
                    say(f"{made.job.name}: measuring")
                    made.sample(timed, seen, sample)
        for part in range(rounds):
            name = str(part + 1) if rounds > 1 else ""
            out += [made.measured(sample, name) for made, sample in zip(ready, samples[part], strict=True)]
    return out


def traced_in(traced: int, turns: int) -> list[int]:
    """How many steps of each turn are traced: as many traces of `FEWEST_TRACED` as there can be, evenly apart.

    To start and end the profiler takes longer than a few steps, and its first step is lost.
    """
    traces = max(1, min(turns, traced // FEWEST_TRACED))
    out = [0] * turns
    for i in range(traces):
        out[(2 * i + 1) * turns // (2 * traces)] += traced // traces + (i < traced % traces)
    return out


def count(jobs: int, rounds: int, turns: int) -> int:
    """How often `measure` says something."""
    return jobs * (2 + rounds * turns)


class Ready:
    """A job on its devices: its trainer, its data, and what XLA makes of its step.

    Once compiled it can be measured again and again, as the network around it changes.
    """

    def __init__(self, asked: Asked, devices: Sequence[Any], others: Others | None = None) -> None:
        self.job, self.devices = asked.job, len(devices)
        self.others = others or Others()
        self.cluster = resolve_cluster(self.job.cluster)
        self.trainer = Trainer.of(self.job, resolve(self.job, self.cluster), devices, asked.folder)
        self.placer = Placer(self.job, asked.folder, self.trainer)
        try:
            self.lowered = self.trainer.step.lower(self.trainer.state_shapes(), self.placer.shapes)
        except BaseException:
            self.close()
            raise

    def compile(self) -> Ready:
        """Compile the step and the first state, and read what a step will execute."""
        _ = self.trainer.first
        self.compiled, report = compile_lowered(self.lowered, self.trainer.platform)
        self.program = read_program(self.compiled, self.trainer.platform, report)
        self.index = Program(parse_module(self.compiled.as_text()), self.program.collectives)
        return self

    def sample(self, steps: int, traced: int, into: Sample | None = None) -> Sample:
        """Time `steps` steps and trace `traced` more, from the first state on, and add them to `into`."""
        into = into or Sample()
        name = self.job.name
        self.others.barrier(f"{name}: all to have compiled it", COMPILE_S)
        run = Steps(self.trainer, self.placer, self.compiled, self.others)
        run.some(WARM_UP)
        into.seconds += run.some(steps)
        if traced:
            into.executions += _traced(run, traced, name)
        before = into.routing[-1].step if into.routing else 0
        into.routing += [replace(one, step=one.step + before) for one in run.seen]
        return into

    def measured(self, sample: Sample, part: str, job: Job | None = None) -> Measured:
        """The rows of a sample; `part` goes into their ids. `job` is this one on the same devices with other links."""
        job = job or self.job
        maker = Rows(job, self.cluster.chip.name, self.devices, part)
        rows, timeline = rows_of(sample, maker, self.index, self.program, self.others)
        return Measured(job, tuple(rows), tuple(sample.routing), tuple(timeline))

    def close(self) -> None:
        """End what reads batches ahead."""
        self.placer.close()


class Steps:
    """Runs steps one after the other and times each, from when all processes have their batch until its end here."""

    def __init__(self, trainer: Trainer, placer: Placer, compiled: Any, others: Others | None = None) -> None:
        self.trainer, self.placer, self.compiled = trainer, placer, compiled
        self.others = others or Others()
        with self.others.working(f"{trainer.job.name}: the first state", COMPILE_S):
            self.state = jax.block_until_ready(trainer.init())
        self.done = 0
        self.seen: list[LayerSeen] = []
        self.numbers = layer_numbers(trainer.job, trainer.degrees)

    def some(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, waited for."""
        out, fetched = [], []
        for _ in range(count):
            what = f"{self.trainer.job.name}: step {self.done + 1}"
            batch = self.placer.next()
            jax.block_until_ready((self.state, batch))
            self.others.barrier(f"{what} to begin")
            with self.others.working(what):
                begun = time.perf_counter()
                self.state, metrics = self.compiled(self.state, batch)
                jax.block_until_ready((self.state, metrics))
                out.append(time.perf_counter() - begun)
            self.done += 1
            fetched.append((self.done, metrics))
        for step, metrics in fetched:
            if any(len(n) for n in self.numbers.values()):
                values = jax.device_get(metrics["experts"])
                self.seen += seen_layers(step, values, self.numbers, self.trainer.degrees.expert)
        return out


def _traced(run: Steps, count: int, name: str) -> tuple[Execution, ...]:
    """The traced executions; the first after the profiler starts is left out, since it is slowed."""
    with tempfile.TemporaryDirectory(prefix="moecast-trace-") as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        # On CPUs events name their instructions; to write out all programs in memory takes longer than the steps.
        options.enable_hlo_proto = jax.default_backend() != "cpu"
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run.some(count + 1)
        finally:
            jax.profiler.stop_trace()
        found = read_trace(trace_file(Path(folder)), "jit__step")[1:]
    if jax.process_count() > 1:
        found = tuple(_renamed(one) for one in found)
    if len(found) != count:
        raise WorkFailed(f"{name}: the trace has {len(found) + 1} steps where {count + 1} ran")
    return found


def _renamed(one: Execution) -> Execution:
    """An execution with its devices by their place in the whole run, as the program numbers them.

    Traces have JAX's ids on CPUs, which leave gaps between processes (0, 2048, ...), and each process's own count from
    0 elsewhere.
    """
    place = {d.id: i for i, d in enumerate(jax.devices())}
    here = [d.id for d in jax.local_devices()]
    ids = {d: d if jax.default_backend() == "cpu" else here[d] for d in one.devices}
    return replace(one, devices={place[ids[d]]: events for d, events in one.devices.items()})
