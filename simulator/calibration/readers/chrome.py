"""Traces in Chrome's JSON format that Perfetto opens (XLA's, moecast's own, others'): slices on threads of devices.

A process is a device if its name says so: GPU or TPU and a number, `/device:`, or moecast's `stage`; or if it has the
text that is asked for. Slices round others (modules, steps, loops) are not counted beside what they hold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from hw_profiles.errors import QuestionError
from simulator.calibration.readers.json_events import TraceText, nanoseconds
from simulator.calibration.readers.kernel_classes import OTHER, kernel_class, phase_of
from simulator.calibration.readers.kineto import span_of
from simulator.calibration.readers.profile import Kernel, Profile

_DEVICE = re.compile(r"/device:|\b(?:GPU|TPU)[ :]?\d+|^stage \d+")
_NUMBER = re.compile(r"(\d+)(?!.*\d)")
# Threads that tell of the same time once more: names of steps, modules and source lines above the ops.
_ABOVE = re.compile(
    r"^(?:Steps|XLA Modules|XLA TraceMe|Framework (?:Name Scope|Ops)|Source code|Launch Stats|TraceMe|host)\b"
)
# Where a slice's own name has no class, that of its thread may say that it moves data.
_MOVES = re.compile(r"network|nccl|collective|communication", re.IGNORECASE)
Thread = tuple[Any, Any]


@dataclass(slots=True)
class Slices:
    """What is kept of a trace while it is read: slices by thread, names of processes and threads."""

    slices: dict[Thread, list[tuple[int, int, str]]] = field(default_factory=lambda: defaultdict(list))
    open: dict[Thread, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    processes: dict[Any, str] = field(default_factory=dict)
    threads: dict[Thread, str] = field(default_factory=dict)

    def add(self, number: int, event: dict[str, Any], start: str) -> None:
        """Keep what matters of an event; QuestionError for a bad time, or an end without a beginning."""
        phase, name = event.get("ph"), str(event.get("name", ""))
        thread = (event.get("pid"), event.get("tid"))
        if phase == "M":
            args = event.get("args")
            said = str(args.get("name", args.get("labels", ""))) if isinstance(args, dict) else ""
            if name in ("process_name", "process_labels"):
                self.processes[thread[0]] = f"{self.processes.get(thread[0], '')} {said}".strip()
            elif name == "thread_name":
                self.threads[thread] = said
            return
        where = f"{start}, event {number} ({name[:60]})"
        if phase == "X":
            self.slices[thread].append((*span_of(event, where), name))
        elif phase == "B":
            self.open[thread].append((nanoseconds(event, "ts", where), name))
        elif phase == "E":
            if not self.open[thread]:
                raise QuestionError(f"{where}: ends what has not begun on thread {thread[1]!r:.40}")
            begin, name = self.open[thread].pop()
            end = nanoseconds(event, "ts", where)
            if end < begin:
                raise QuestionError(f"{where}: ends {(begin - end) / 1e3:g} us before it begins")
            self.slices[thread].append((begin, end, name))


def profile_of(kept: Slices, trace: TraceText, process: str = "") -> Profile:
    """The profile of a trace that has been read; QuestionError where no process is a device, or none did anything."""
    devices = {p: name for p, name in kept.processes.items() if (process in name if process else _DEVICE.search(name))}
    if not devices:
        known = ", ".join(sorted(set(kept.processes.values()))[:6]) or "none has a name"
        rule = (
            "no kernels: no process is named as a device" if not process else f"no process has {process!r} in its name"
        )
        raise QuestionError(f"{trace.start}: {rule} (--process TEXT says which are); processes: {known:.200}")
    profile = Profile([], software="trace in Chrome's format")
    numbers = _numbers(devices)
    held = 0
    for thread, slices in kept.slices.items():
        name = kept.threads.get(thread, str(thread[1]))
        if thread[0] not in devices or _ABOVE.search(name):
            continue
        leaves = _leaves(slices)
        held += sum(end > begin for begin, end, _ in slices) - len(leaves)
        for begin, end, what in leaves:
            kind = kernel_class(what)
            kind = "collective" if kind == OTHER and _MOVES.search(name) else kind
            profile.kernels.append(Kernel(what, numbers[thread[0]], name, begin, end, kind, phase_of(what)))
    if not profile.kernels:
        raise QuestionError(f"{trace.start}: no kernels on any of its {len(devices)} devices")
    profile.kernels.sort(key=lambda k: (k.start, k.end))
    profile.notes.append("Chrome's format has no steps: all of the trace is taken as one step")
    if held:
        profile.notes.append(f"{held} slices that hold others are left out: what they hold is counted")
    unended = sum(map(len, kept.open.values()))
    if unended:
        profile.notes.append(f"{unended} slices that never end are left out")
    return profile


def _numbers(devices: dict[Any, str]) -> dict[Any, int]:
    """A number for each process: the last one in its name where these differ, else their order."""
    found = {p: _NUMBER.search(name.partition(" (")[0]) for p, name in devices.items()}
    named = {p: int(m.group(1)) for p, m in found.items() if m}
    if len(set(named.values())) == len(devices):
        return named
    return {p: i for i, p in enumerate(sorted(devices, key=str))}


def _leaves(slices: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The slices of a thread that take time and hold no other."""
    order = sorted((s for s in slices if s[1] > s[0]), key=lambda s: (s[0], -s[1]))
    out = []
    for i, (begin, end, name) in enumerate(order):
        after = order[i + 1] if i + 1 < len(order) else None
        if after is None or after[0] >= end or after[1] > end:
            out.append((begin, end, name))
    return out
