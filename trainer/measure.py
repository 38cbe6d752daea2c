"""Measures a job as it really runs: whole steps without the profiler, then traced steps by scope, pass and device.

Batches are placed before the clock starts: the input pipeline is not part of a step here (a note in every row says so).
"""

from __future__ import annotations

import contextlib
import datetime
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from hw_profiles.errors import WorkFailed
from hw_profiles.loader import resolve_cluster
from simulator.job.rules import resolve
from simulator.results.measurement import NETWORK, Measurement
from trainer.attribution import Call, Part, Program, Share, check_program, collective_calls, intervals, shares
from trainer.batches import Placer
from trainer.hlo import CompiledProgram, parse_module, read_program
from trainer.hlo_memory import compile_lowered
from trainer.processes import short
from trainer.step import Trainer
from trainer.telemetry import LayerSeen, layer_numbers, seen_layers
from trainer.xplane import Execution, check_clocks, read_trace, trace_file

if TYPE_CHECKING:
    from simulator.job.job import Job

WARM_UP = 3
# Programs compiled at once: XLA's compiler is one thread for the most part.
COMPILERS = 2
NOTE = "batches in place before the clock starts"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one measurement of a job gave: rows of the table, what its routers did, and the last traced step."""

    job: Job
    rows: tuple[Measurement, ...]
    routing: tuple[LayerSeen, ...]
    timeline: tuple[tuple[int, str, float, float], ...] = ()


def software() -> str:
    """The software that runs a step here, with its versions."""
    return f"jax {jax.__version__}, XLA:{jax.default_backend().upper()} of jaxlib {version('jaxlib')}"


def today() -> str:
    """The date in a row."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


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
) -> list[Measured]:
    """Run jobs on `devices`: each in turn `steps` timed steps after a warm-up and `traced` ones under the profiler.

    All of that happens `rounds` times; each of these measurements is taken in `turns` parts between those of all
    others, so that a machine whose speed drifts drifts alike for all. What is compiled is kept, the state is drawn
    anew. `say` is told what is done, `count` times. QuestionError for a job the trainer cannot run, WorkFailed where a
    step fails or its trace cannot be matched with the program.
    """
    out = []
    with contextlib.ExitStack() as stack:
        ready = []
        for one in asked:
            say(f"{one.job.name}: building")
            ready.append(Ready(one, devices))
            stack.callback(ready[-1].close)
        with ThreadPoolExecutor(COMPILERS) as pool:
            for made in pool.map(Ready.compile, ready):
                say(f"{made.job.name}: compiled")
        samples = [[Sample() for _ in ready] for _ in range(rounds)]
        for turn in range(turns):
            timed, seen = (n // turns + (turn < n % turns) for n in (steps, traced))
            for part in range(rounds):
                for made, sample in zip(ready, samples[part], strict=True):
                    say(f"{made.job.name}: measuring")
                    made.sample(timed, seen, sample)
        for part in range(rounds):
            name = str(part + 1) if rounds > 1 else ""
            out += [made.measured(sample, name) for made, sample in zip(ready, samples[part], strict=True)]
    return out


def count(jobs: int, rounds: int, turns: int) -> int:
    """How often `measure` says something."""
    return jobs * (2 + rounds * turns)


@dataclass
class Sample:
    """What was seen of a job: seconds of timed steps, traced steps, what its routers did."""

    seconds: list[float] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    routing: list[LayerSeen] = field(default_factory=list)


class Ready:
    """A job on its devices: its trainer, its data, and what XLA makes of its step.

    Once compiled it can be measured again and again, as the network around it changes.
    """

    def __init__(self, asked: Asked, devices: Sequence[Any]) -> None:
        self.job, self.devices = asked.job, len(devices)
        self.cluster = resolve_cluster(self.job.cluster)
        self.trainer = Trainer.of(self.job, resolve(self.job, self.cluster), devices, asked.folder)
        self.placer = Placer(self.job, asked.folder, self.trainer)
        try:
            self.lowered = self.trainer.step.lower(self.trainer.state_shapes(), self.placer.shapes)
        except BaseException:
            self.close()
            raise

    def compile(self) -> Ready:
        """Compile the step and read what it will execute."""
        self.compiled, report = compile_lowered(self.lowered, self.trainer.platform)
        self.program = read_program(self.compiled, self.trainer.platform, report)
        self.index = Program(parse_module(self.compiled.as_text()), self.program.collectives)
        return self

    def sample(self, steps: int, traced: int, into: Sample | None = None) -> Sample:
        """Time `steps` steps and trace `traced` more, from the first state on, and add them to `into`."""
        into = into or Sample()
        run = Steps(self.trainer, self.placer, self.compiled)
        run.some(WARM_UP)
        into.seconds += run.some(steps)
        if traced:
            into.executions += _traced(run, traced, self.job.name)
        before = into.routing[-1].step if into.routing else 0
        into.routing += [replace(one, step=one.step + before) for one in run.seen]
        return into

    def measured(self, sample: Sample, part: str, job: Job | None = None) -> Measured:
        """The rows of a sample; `part` goes into their ids. `job` is this one on the same devices with other links."""
        job = job or self.job
        maker = _Rows(job, self.cluster.chip.name, self.devices, part)
        rows = [maker.step(sample.seconds), *maker.memory(self.program)]
        timeline: tuple[tuple[int, str, float, float], ...] = ()
        if sample.executions:
            rows += _trace_rows(maker, sample.executions, self.index, self.program, job.name)
            timeline = tuple(intervals(sample.executions[-1], self.index))
        return Measured(job, tuple(rows), tuple(sample.routing), timeline)

    def close(self) -> None:
        """End what reads batches ahead."""
        self.placer.close()


class Steps:
    """Runs steps one after the other and times each."""

    def __init__(self, trainer: Trainer, placer: Placer, compiled: Any) -> None:
        self.trainer, self.placer, self.compiled = trainer, placer, compiled
        self.state = trainer.init()
        self.done = 0
        self.seen: list[LayerSeen] = []
        self.numbers = layer_numbers(trainer.job, trainer.degrees)

    def some(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, waited for."""
        out, fetched = [], []
        for _ in range(count):
            batch = self.placer.next()
            jax.block_until_ready((self.state, batch))
            begun = time.perf_counter()
            try:
                self.state, metrics = self.compiled(self.state, batch)
                jax.block_until_ready((self.state, metrics))
            except (jax.errors.JaxRuntimeError, RuntimeError) as error:
                raise WorkFailed(f"{self.trainer.job.name}: step {self.done + 1}: {short(error)}") from None
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
    for one in found:
        check_clocks(one, name)
    return found


def _renamed(one: Execution) -> Execution:
    """An execution with its devices by their place in the whole run, as the program numbers them.

    Traces have JAX's ids on CPUs, which leave gaps between processes (0, 2048, ...), and each process's own count from
    0 elsewhere.
    """
    place = {d.id: i for i, d in enumerate(jax.devices())}
    here = [d.id for d in jax.local_devices()]
    ids = {d: d if jax.default_backend() == "cpu" else here[d] for d in one.devices}
    return Execution(one.run, {place[ids[d]]: events for d, events in one.devices.items()})


def _trace_rows(
    maker: _Rows, executions: Sequence[Execution], index: Program, program: CompiledProgram, name: str
) -> list[Measurement]:
    per_step: list[dict[int, dict[Part, Share]]] = []
    calls: list[Call] = []
    windows: dict[int, list[float]] = defaultdict(list)
    for one in executions:
        check_program(one, index, name)
        per_step.append(shares(one, index))
        calls += collective_calls(one, index)
        for device in one.devices:
            begin, end = one.window_ns(device)
            windows[device].append((end - begin) * 1e-9)
    return [*maker.ops(per_step, program), *maker.windows(windows), *maker.collectives(calls)]


class _Rows:
    """Makes the rows of one job."""

    def __init__(self, job: Job, chip: str, devices: int, part: str) -> None:
        self.job, self.devices = job, devices
        self.start = f"{job.name}{f'#{part}' if part else ''}"
        self.common: dict[str, Any] = {
            "source": "moecast measure", "date": today(), "chip": chip, "software": software(),
            "dtype": job.training.precision, "devices": devices, "job_hash": job.hash,
        }  # fmt: skip

    def _timed(self, name: str, kind: str, seconds: Sequence[float], key: str, **more: Any) -> Measurement:
        low, middle, high = (float(q) for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
        if more.get("statistic") == "mean":
            middle = float(np.mean(seconds))
        return Measurement(
            id=f"{self.start}:{key}", kind=kind, name=name, seconds=middle, p10_s=low, p90_s=high,
            samples=len(seconds), **self.common, **more,
        )  # fmt: skip

    def step(self, seconds: Sequence[float]) -> Measurement:
        """The whole step, without the profiler."""
        return self._timed("step", "step", seconds, "step", note=NOTE)

    def memory(self, program: CompiledProgram) -> list[Measurement]:
        """What the compiler says the step needs on a device, bytes."""
        m = program.memory
        if m is None:
            return []
        found = {"peak": m.peak_bytes, "arguments": m.argument_bytes, "allocated": m.allocated_bytes}
        return [
            Measurement(
                id=f"{self.start}:memory.{name}", kind="memory", name=name, bytes=float(n), statistic="count",
                note=m.peak_source if name == "peak" else "", **self.common,
            )
            for name, n in found.items()
        ]  # fmt: skip

    def ops(self, steps: list[dict[int, dict[Part, Share]]], program: CompiledProgram) -> list[Measurement]:
        """A row per device, scope and pass: seconds in a step; what a scope sends is a row of its own, and says what
        part of it waited for other devices.
        """
        sent: dict[tuple[str, str], float] = defaultdict(float)
        for c in program.collectives:
            sent[c.scopes[0] if c.scopes else "unnamed", c.phase] += c.total_bytes
        out = []
        for device in sorted(steps[0]):
            for part in sorted({key for step in steps for key in step.get(device, {})}):
                scope, phase, sends = part
                found = [step[device][part] for step in steps if part in step.get(device, {})]
                seconds = [s.seconds for s in found]
                if min(seconds) <= 0:
                    continue
                waited = float(np.median([s.waited_s for s in found]))
                out.append(
                    self._timed(
                        scope, "op", seconds, f"{scope}.{phase or 'all'}{'.sent' if sends else ''}@{device}",
                        phase=phase, device=device, calls=float(np.median([s.calls for s in found])),
                        flops=None if sends else float(program.flops.by_scope.get(scope, {}).get(phase, 0)) or None,
                        bytes=sent.get((scope, phase)) if sends else None, level=NETWORK if sends else "",
                        note=f"waited {waited:.9f} s of it for other devices" if sends else "",
                    )
                )  # fmt: skip
        return out

    def windows(self, windows: Mapping[int, Sequence[float]]) -> list[Measurement]:
        """From the first instruction to the last of a traced step, per device."""
        return [
            self._timed("window", "op", w, f"window@{d}", device=d, note="traced: first instruction to last")
            for d, w in sorted(windows.items())
        ]

    def collectives(self, calls: Sequence[Call]) -> list[Measurement]:
        """A row per kind, group size and bytes: seconds of one call since the last of the group arrived.

        The mean, since a step has every call: where devices outnumber cores a few take most of the time. Of how many
        arrays a call was merged is its shape.
        """
        found: dict[tuple[str, int, int, int, str, int], list[float]] = defaultdict(list)
        for call in calls:
            c = call.collective
            arrays = c.operands if c.kind == "all-reduce" else 1
            group = c.groups[0] if c.groups else tuple(range(self.devices))
            stride = group[1] - group[0] if len(group) > 1 else 1
            key = c.kind.replace("-", "_"), len(group), stride, c.bytes, c.dtype, arrays
            found[key].append(call.seconds)
        return [
            self._timed(
                kind, "collective", seconds, f"{kind}.{size}x{stride}.{size_bytes}.{dtype}{f'.of{n}' if n > 1 else ''}",
                bytes=float(size_bytes), group_size=size, stride=max(1, stride), shape=(n,) if n > 1 else (),
                note="in a step, from the arrival of the last", statistic="mean",
            )
            for (kind, size, stride, size_bytes, dtype, n), seconds in sorted(found.items())
            if size > 1
        ]  # fmt: skip
