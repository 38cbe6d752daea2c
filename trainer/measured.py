"""Rows of the measurement table from what the processes of a measurement have timed and traced.

Each process makes the rows of its own devices and tells process 0 the rest as it saw it; process 0 has all rows.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from simulator.results.measurement import NETWORK, Measurement
from trainer.attribution import Call, Part, Program, Share, check_program, collective_calls, intervals, shares
from trainer.clocks import outline, together
from trainer.hlo import CompiledProgram
from trainer.others import Others
from trainer.telemetry import LayerSeen
from trainer.xplane import Execution, check_clocks

if TYPE_CHECKING:
    from simulator.job.job import Job

NOTE = "batches in place before the clock starts"
# (device, kind, start, end) in seconds of a step's intervals.
Timeline = list[tuple[int, str, float, float]]
# Kind, group size, stride, bytes, dtype, arrays: what makes calls of collectives alike.
Alike = tuple[str, int, int, int, str, int]


def software() -> str:
    """The software that runs a step here, with its versions."""
    return f"jax {jax.__version__}, XLA:{jax.default_backend().upper()} of jaxlib {version('jaxlib')}"


def today() -> str:
    """The date in a row."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@dataclass
class Sample:
    """What a process saw of a job: seconds of timed steps, traced steps of its own devices, what routers did."""

    seconds: list[float] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    routing: list[LayerSeen] = field(default_factory=list)


def rows_of(
    sample: Sample, maker: Rows, index: Program, program: CompiledProgram, others: Others
) -> tuple[list[Measurement], Timeline]:
    """The rows of a sample of all processes, and the last traced step; on process 0, and none elsewhere.

    WorkFailed where a trace is of another program, or clocks of devices are apart.
    """
    where = maker.job.name
    for one in sample.executions:
        check_program(one, index, where)
    told = others.share(f"{where}: outlines of the traces", [outline(one, index) for one in sample.executions])
    seen = []
    for i, one in enumerate(sample.executions):
        seen.append(together(one, [o[i] for p, o in enumerate(told) if p != others.index], index))
        check_clocks(seen[-1], where)
    own = [asdict(r) for r in _of_devices(maker, seen, index, program)] if seen else []
    calls = [
        [step, *alike, seconds]
        for step, one in enumerate(seen)
        for alike, seconds in maker.alike(collective_calls(one, index))
    ]
    mine = {
        "seconds": sample.seconds, "rows": own, "calls": calls, "timeline": intervals(seen[-1], index) if seen else [],
    }  # fmt: skip
    parts = others.gather(f"{where}: rows of its devices", mine)
    if not parts:
        return [], []
    step = [max(times) for times in zip(*(p["seconds"] for p in parts), strict=True)]
    pooled: dict[Alike, list[list[float]]] = defaultdict(lambda: [[] for _ in seen])
    for p in parts:
        for at, *alike, seconds in p["calls"]:
            pooled[tuple(alike)][at] += seconds
    rows = [maker.step(step, others.count), *maker.memory(program)]
    rows += [Measurement(**{**row, "shape": tuple(row["shape"])}) for p in parts for row in p["rows"]]
    timeline = sorted((int(d), str(k), float(a), float(b)) for p in parts for d, k, a, b in p["timeline"])
    return [*rows, *maker.collectives(pooled)], timeline


def _of_devices(
    maker: Rows, executions: Sequence[Execution], index: Program, program: CompiledProgram
) -> list[Measurement]:
    """The rows of this process's devices."""
    per_step = [shares(one, index) for one in executions]
    windows: dict[int, list[float]] = defaultdict(list)
    for one in executions:
        for device in one.devices:
            begin, end = one.window_ns(device)
            windows[device].append((end - begin) * 1e-9)
    return [*maker.ops(per_step, program), *maker.windows(windows)]


class Rows:
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
        return Measurement(
            id=f"{self.start}:{key}", kind=kind, name=name, seconds=middle, p10_s=low, p90_s=high,
            samples=len(seconds), **self.common, **more,
        )  # fmt: skip

    def step(self, seconds: Sequence[float], processes: int) -> Measurement:
        """The whole step, without the profiler."""
        several = f"; {processes} processes, of each step the slowest" if processes > 1 else ""
        return self._timed("step", "step", seconds, "step", note=NOTE + several)

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

    def alike(self, calls: Iterable[Call]) -> list[tuple[Alike, list[float]]]:
        """Seconds of single calls, by what makes them alike.

        Of how many arrays a call was merged is part of it, for all-reduces.
        """
        found: dict[Alike, list[float]] = defaultdict(list)
        for call in calls:
            c = call.collective
            arrays = c.operands if c.kind == "all-reduce" else 1
            group = c.groups[0] if c.groups else tuple(range(self.devices))
            stride = group[1] - group[0] if len(group) > 1 else 1
            found[c.kind.replace("-", "_"), len(group), stride, c.bytes, c.dtype, arrays].append(call.seconds)
        return list(found.items())

    def collectives(self, calls: Mapping[Alike, Sequence[Sequence[float]]]) -> list[Measurement]:
        """A row per kind, group size and bytes: seconds of one call since the last of the group arrived.

        `calls` are those of each step. A step's mean, since it has every call, and where devices outnumber cores a few
        take most of the time; and of the steps the median, as of all else. Of how many arrays a call was merged is its
        shape.
        """
        return [
            replace(
                self._timed(
                    kind, "collective", [s for step in steps for s in step],
                    f"{kind}.{size}x{stride}.{size_bytes}.{dtype}{f'.of{n}' if n > 1 else ''}",
                    bytes=float(size_bytes), group_size=size, stride=max(1, stride), shape=(n,) if n > 1 else (),
                    note="in a step, from the arrival of the last", statistic="median of the steps' means",
                ),
                seconds=float(np.median([np.mean(step) for step in steps if step])),
            )
            for (kind, size, stride, size_bytes, dtype, n), steps in sorted(calls.items())
            if size > 1
        ]  # fmt: skip
