"""Profiles of PyTorch (Kineto): kernels on GPU streams, what launched them, and the profiler's steps.

A kernel's launch is found by its correlation id; the ops and annotations round that launch say what it is for, where
its name does not. A kernel belongs to the step in which it was launched: the device runs behind the host.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hw_profiles.errors import QuestionError
from simulator.calibration.readers.intervals import Span
from simulator.calibration.readers.json_events import TraceText, nanoseconds
from simulator.calibration.readers.kernel_classes import kernel_class, phase_of
from simulator.calibration.readers.profile import Kernel, Profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime")
_KEPT = (*ON_DEVICE, *_LAUNCHES, "cpu_op", "user_annotation", "gpu_user_annotation")
_STEP = re.compile(r"ProfilerStep#\d+$")
# 2001: traces without a wall clock count from the machine's start.
_FIRST_DATE_NS = 10**18
# Bytes of an element, and the table's word for it.
_DTYPES = {
    "Byte": (1, "uint8"), "Char": (1, "int8"), "Bool": (1, "bool"), "Float8_e4m3fn": (1, "fp8"),
    "Float8_e5m2": (1, "fp8"), "Half": (2, "fp16"), "BFloat16": (2, "bf16"), "Short": (2, "int16"),
    "Int": (4, "int32"), "Float": (4, "fp32"), "Long": (8, "int64"), "Double": (8, "fp64"),
}  # fmt: skip
# PyTorch's words for collectives; the base forms take one tensor for all ranks.
_COLLECTIVES = {
    "allreduce": "all_reduce", "allgather": "all_gather", "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather", "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all": "all_to_all", "all_to_allv": "all_to_all", "all_to_all_single": "all_to_all",
    "broadcast": "broadcast", "send": "send_receive", "recv": "send_receive",
}  # fmt: skip
Thread = tuple[Any, Any]


@dataclass(slots=True)
class Kept:
    """What is kept of a trace while it is read: work of devices, launches by correlation, ops and annotations."""

    work: list[tuple[int, dict[str, Any], int, int]] = field(default_factory=list)
    launches: dict[int, tuple[Thread, int]] = field(default_factory=dict)
    ops: dict[Thread, list[tuple[int, int, str]]] = field(default_factory=lambda: defaultdict(list))
    regions: dict[Thread, list[tuple[int, int, str]]] = field(default_factory=lambda: defaultdict(list))
    steps: list[Span] = field(default_factory=list)

    def add(self, number: int, event: dict[str, Any], start: str) -> None:
        """Keep what matters of an event; QuestionError where it has no time, or a negative duration."""
        kind = event.get("cat")
        if event.get("ph") != "X" or not isinstance(kind, str) or kind.lower() not in _KEPT:
            return
        kind, name = kind.lower(), str(event.get("name", ""))
        begin, end = span_of(event, f"{start}, event {number} ({name[:60]})")
        thread = (event.get("pid"), event.get("tid"))
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        if kind in ON_DEVICE:
            self.work.append((number, {"name": name, "thread": thread, "args": args}, begin, end))
        elif kind in _LAUNCHES:
            if isinstance(args.get("correlation"), int):
                self.launches[args["correlation"]] = (thread, begin)
        elif _STEP.match(name):
            if kind == "user_annotation":
                self.steps.append((begin, end))
        elif kind == "cpu_op":
            self.ops[thread].append((begin, end, name))
        elif kind == "user_annotation":
            self.regions[thread].append((begin, end, name))


def span_of(event: dict[str, Any], where: str) -> Span:
    """Start and end of a complete event, nanoseconds; QuestionError for a duration that is missing or negative."""
    begin, duration = nanoseconds(event, "ts", where), nanoseconds(event, "dur", where)
    if duration < 0:
        raise QuestionError(f"{where}: dur = {event['dur']}: a duration is at least 0")
    return begin, begin + duration


class _Launches:
    """Where each piece of work was launched from: when, within which ops (outermost first), in which annotation."""

    def __init__(self, kept: Kept) -> None:
        points = list(kept.launches.values())
        self._launches = kept.launches
        self._ops, self._own = _around(kept.ops, points), _around(kept.regions, points)
        # A backward pass runs on a thread of its own, while the thread that has the annotation waits for it.
        every: Thread = ("", "")
        regions = {every: [r for some in kept.regions.values() for r in some]}
        self._any = {at: names for (_, at), names in _around(regions, [(every, at) for _, at in points]).items()}

    def of(self, args: dict[str, Any]) -> tuple[int | None, tuple[str, ...], str]:
        """Launch time (None: not in the trace), ops and annotation of work with these `args`."""
        number = args.get("correlation")
        launch = self._launches.get(number) if isinstance(number, int) else None
        if launch is None:
            return None, (), ""
        regions = self._own.get(launch) or self._any.get(launch[1], ())
        return launch[1], self._ops.get(launch, ()), regions[-1] if regions else ""


def profile_of(kept: Kept, trace: TraceText) -> Profile:
    """The profile of a trace that has been read; QuestionError where it has no kernels."""
    if not kept.work:
        rule = "no kernels on any device: a profile of the CPU alone, or taken without ProfilerActivity.CUDA"
        raise QuestionError(f"{trace.start}: {rule}")
    # One process, one device: its rank says which; several devices keep their own numbers.
    several = len({str(e["args"].get("device", e["thread"][0])) for _, e, _, _ in kept.work}) > 1
    rank = None if several else _rank(trace.beside)
    launches, steps = _Launches(kept), sorted(kept.steps)
    profile = Profile([], steps, "PyTorch profiler", _date(kept.work[0][2], trace.beside), _chips(trace.beside))
    outside = unlaunched = 0
    for number, event, begin, end in kept.work:
        name, args, (process, thread) = event["name"], event["args"], event["thread"]
        at, ops, region = launches.of(args)
        unlaunched += at is None
        step = _step(steps, begin if at is None else at)
        if step is None:
            outside += 1
            continue
        device = args.get("device", process) if rank is None else rank
        if not isinstance(device, int) or isinstance(device, bool) or device < 0:
            raise QuestionError(f"{trace.start}, event {number}: device = {device!r:.40}: a device is a number from 0")
        kind, phase = kernel_class(name, ops, region), phase_of(name, ops, region)
        kernel = Kernel(name, device, str(args.get("stream", thread)), begin, end, kind, phase, region, step)
        _collective(kernel, args)
        profile.kernels.append(kernel)
    if not profile.kernels:
        raise QuestionError(f"{trace.start}: no kernels inside of its {len(steps)} profiler steps")
    profile.kernels.sort(key=lambda k: (k.start, k.end))
    if not steps:
        profile.notes.append("no profiler steps: all of the trace is taken as one step")
    if outside:
        profile.notes.append(f"kernels launched outside of the profiler steps, left out: {outside}")
    if unlaunched:
        profile.notes.append(f"kernels whose launch is not in the trace, classed by their names alone: {unlaunched}")
    return profile


def _around(
    intervals: dict[Thread, list[tuple[int, int, str]]], points: list[tuple[Thread, int]]
) -> dict[tuple[Thread, int], tuple[str, ...]]:
    """The names of the nested intervals round each point of a thread, outermost first."""
    wanted: dict[Thread, list[int]] = defaultdict(list)
    for thread, at in points:
        wanted[thread].append(at)
    out: dict[tuple[Thread, int], tuple[str, ...]] = {}
    for thread, times in wanted.items():
        rest = sorted(intervals.get(thread, ()), key=lambda i: (-i[0], i[1]))
        open_: list[tuple[int, int, str]] = []
        for at in sorted(set(times)):
            while rest and rest[-1][0] <= at:
                new = rest.pop()
                open_ = [i for i in open_ if i[1] > new[0]]
                open_.append(new)
            open_ = [i for i in open_ if i[1] > at]
            if open_:
                out[thread, at] = tuple(name for _, _, name in open_)
    return out


def _step(steps: list[Span], at: int) -> int | None:
    """The number of the step that `at` lies in; 0 where there are none, None outside of them."""
    if not steps:
        return 0
    return next((i for i, (begin, end) in enumerate(steps) if begin <= at < end), None)


def _collective(kernel: Kernel, args: dict[str, Any]) -> None:
    """What Kineto notes of a collective: its kind, group and size (nccl-tests': of all ranks' data)."""
    said = args.get("Collective name")
    if (
        not isinstance(said, str)
        or said not in _COLLECTIVES
        or kernel.kind not in (*_COLLECTIVES.values(), "collective")
    ):
        return
    kernel.kind = _COLLECTIVES[said]
    kernel.matched = f"{kernel.kind} of {args.get('Process Group Name', '?')}"
    size, dtype = args.get("Group size"), args.get("dtype")
    sent, got = args.get("In msg nelems"), args.get("Out msg nelems")
    if isinstance(size, int) and size > 1 and isinstance(sent, int) and isinstance(got, int) and dtype in _DTYPES:
        each, kernel.dtype = _DTYPES[str(dtype)]
        kernel.group_size, kernel.bytes = size, max(sent, got) * each


def _rank(beside: dict[str, Any]) -> int | None:
    found = beside.get("distributedInfo")
    rank = found.get("rank") if isinstance(found, dict) else None
    return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 else None


def _chips(beside: dict[str, Any]) -> tuple[str, ...]:
    found = beside.get("deviceProperties")
    names = {str(d.get("name", "")) for d in found if isinstance(d, dict)} if isinstance(found, list) else set()
    return tuple(sorted(n for n in names if n))


def _date(first: int, beside: dict[str, Any]) -> str:
    base = beside.get("baseTimeNanoseconds", 0)
    at = first + (base if isinstance(base, int) else 0)
    if not _FIRST_DATE_NS <= at < 4 * _FIRST_DATE_NS:
        return ""
    return datetime.fromtimestamp(at // 10**9, UTC).date().isoformat()
