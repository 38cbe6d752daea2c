"""JAX's profiler trace (XPlane) as intervals of single HLO instructions on devices.

An event of an instruction carries `hlo_op`, `hlo_module` and `run_id`, and the device as `device_ordinal` (CPU) or in
the name of its plane (`/device:TPU:0`). Times are nanoseconds on the profiler's clock.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError, WorkFailed

# Beyond this a trace is not read: every event becomes a Python object.
MAX_BYTES = 2_000_000_000
_DEVICE = re.compile(r"/device:[A-Za-z]+:(\d+)")


@dataclass(frozen=True, slots=True)
class Event:
    """One run of one instruction on one device, nanoseconds."""

    op: str
    start_ns: float
    end_ns: float


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution of a program: the events of each device, in order of their start.

    `others` are devices of other processes, of which a trace has nothing: an outline of theirs, on this clock
    (`trainer/clocks.py`). `began_ns` is when the trace began by the host's clock, since 1970; 0 where it does not say.
    """

    run: int
    devices: Mapping[int, tuple[Event, ...]]
    others: Mapping[int, tuple[Event, ...]] = field(default_factory=dict)
    began_ns: int = 0

    @property
    def everywhere(self) -> Mapping[int, tuple[Event, ...]]:
        """What is known of all devices."""
        return {**self.devices, **self.others}

    @property
    def start_ns(self) -> float:
        """When the first device began."""
        return min(events[0].start_ns for events in self.everywhere.values())

    def window_ns(self, device: int) -> tuple[float, float]:
        """From the first event of a device to its last."""
        events = self.devices.get(device) or self.others[device]
        return events[0].start_ns, max(e.end_ns for e in events)


def trace_file(folder: Path) -> Path:
    """The one trace in a folder that `jax.profiler` wrote; QuestionError where there is none, or several."""
    found = sorted(folder.rglob("*.xplane.pb"))
    if len(found) != 1:
        raise QuestionError(f"{folder}: has {len(found)} traces (*.xplane.pb); one is needed")
    return found[0]


def read_trace(path: Path, module: str) -> tuple[Execution, ...]:
    """All executions of the program `module` (`jit__step`) in the trace, in order.

    QuestionError where the file is no trace, is cut off, or holds no such program.
    """
    if not path.is_file():
        raise QuestionError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise QuestionError(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
    import jax

    try:
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    except (RuntimeError, ValueError, OSError) as error:
        raise QuestionError(f"{path}: not an XPlane trace, or cut off: {' '.join(str(error).split()):.80}") from None
    out = executions(_events(planes), module)
    if not out:
        raise QuestionError(f"{path}: holds no run of the program {module}: is it the trace of another job?")
    began_ns = next((int(v) for p in planes for k, v in p.stats if k == "profile_start_time"), 0)
    return tuple(replace(one, began_ns=began_ns) for one in out)


def _events(planes: Iterable[Any]) -> Iterable[tuple[str, int, int, Event]]:
    """(module, run, device, event) of every event that belongs to an instruction."""
    for plane in planes:
        named = _DEVICE.search(plane.name)
        for line in plane.lines:
            for event in line.events:
                if event.name.startswith("end:"):
                    continue
                stats = dict(event.stats)
                if "hlo_op" not in stats:
                    continue
                device = int(str(stats.get("device_ordinal", named[1] if named else 0)))
                start = float(event.start_ns)
                found = Event(str(stats["hlo_op"]), start, start + float(event.duration_ns))
                yield str(stats.get("hlo_module", "")), int(str(stats.get("run_id", 0))), device, found


def executions(events: Iterable[tuple[str, int, int, Event]], module: str) -> tuple[Execution, ...]:
    """The executions of `module`, by their start; programs carry a number after a dot on some platforms."""
    runs: dict[int, dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for name, run, device, event in events:
        if name.partition(".")[0] == module:
            runs[run][device].append(event)
    out = [
        Execution(run, {d: tuple(sorted(es, key=lambda e: (e.start_ns, -e.end_ns))) for d, es in devices.items()})
        for run, devices in runs.items()
    ]
    return tuple(sorted(out, key=lambda e: e.start_ns))


def check_clocks(found: Execution, where: str) -> None:
    """WorkFailed where devices of one execution were never at work together: their clocks are apart.

    Collectives make all devices of a step wait for each other, so that their windows must overlap.
    """
    windows = {d: found.window_ns(d) for d in found.everywhere}
    first = max(windows, key=lambda d: windows[d][0])
    last = min(windows, key=lambda d: windows[d][1])
    apart = windows[first][0] - windows[last][1]
    if apart > 0:
        raise WorkFailed(
            f"{where}: device {first} begins {apart * 1e-6:.3g} ms after device {last} has ended the same step: their"
            " clocks are apart"
        )
