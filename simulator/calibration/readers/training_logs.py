"""Logs of Megatron-LM and MaxText: whole steps, as one row for each batch size, without the steps that warm up.

What warms up, of every run in the log (a run begins where the step number does not grow): its first two lines, and of
those after them all that come before the first one within 1.5 times the median of the run's later half. Compiling,
autotuning and the first allocations are in these. `--warmup N` leaves out exactly the first N of each run instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hw_profiles.errors import QuestionError
from simulator.calibration.readers.found import Found, Told, labelled, numbered, quantile
from simulator.results.measurement import Measurement

FIRST, TIMES_MEDIAN = 2, 1.5
MEGATRON = re.compile(r"\biteration\s+(\d+)/\s*(\d+)\s*\|.*\belapsed time per iteration \(ms\):\s*(\S+)")
_THROUGHPUT = re.compile(r"throughput per GPU \(TFLOP/s/GPU\):\s*(\S+)")
_BATCH = re.compile(r"global batch size:\s*(\d+)")
_WORLD = re.compile(r"\bworld size:\s*(\d+)|\bworld_size\s*\.+\s*(\d+)")
_DATE = re.compile(r"\[(\d{4}-\d\d-\d\d)[ T]\d\d:\d\d:\d\d")
MAXTEXT = re.compile(r"\bcompleted step:\s*(\d+),\s*seconds:\s*([^\s,]+)")
_DEVICE_RATE = re.compile(r"TFLOP/s/device:\s*([^\s,]+)")
_TOKEN_RATE = re.compile(r"Tokens/s/device:\s*([^\s,]+)")
_MESH = re.compile(r"\bNum_devices:\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Step:
    """A line of a log: number, seconds a step, steps that they are the mean of, FLOP/s of a device, batch in words."""

    line: int
    number: int
    seconds: float
    steps: int
    flops_per_s: float | None
    batch: str
    flops_note: str


def read_megatron(text: str, path: Path, told: Told, date: str) -> Found:
    """Steps of a Megatron-LM log; QuestionError naming file and line for what is none."""
    steps: list[Step] = []
    devices, day = told.devices, ""
    for number, line in enumerate(text.splitlines(), 1):
        if (world := _WORLD.search(line)) and told.devices is None:
            devices = int(world.group(1) or world.group(2))
        found = MEGATRON.search(line)
        if found is None:
            continue
        where = f"{path}, line {number}"
        at = int(found.group(1))
        before = steps[-1].number if steps else at
        rate, batch, dated = _THROUGHPUT.search(line), _BATCH.search(line), _DATE.search(line)
        day = day or (dated.group(1) if dated else "")
        steps.append(
            Step(
                number, at, _positive(found.group(3), "elapsed time per iteration (ms)", where) * 1e-3,
                at - before if at > before else 1,
                _positive(rate.group(1), "throughput per GPU (TFLOP/s/GPU)", where) * 1e12 if rate else None,
                f"global batch of {batch.group(1)}" if batch else "", "FLOPs by Megatron-LM's own count",
            )
        )  # fmt: skip
    return _found("megatron", "Megatron-LM", steps, devices, path, told, day or date)


def read_maxtext(text: str, path: Path, told: Told, date: str) -> Found:
    """Steps of a MaxText log; QuestionError naming file and line for what is none."""
    steps: list[Step] = []
    devices = told.devices
    for number, line in enumerate(text.splitlines(), 1):
        if (mesh := _MESH.search(line)) and told.devices is None:
            devices = int(mesh.group(1))
        found = MAXTEXT.search(line)
        if found is None:
            continue
        where = f"{path}, line {number}"
        seconds = _positive(found.group(2), "seconds", where)
        rate, tokens = _DEVICE_RATE.search(line), _TOKEN_RATE.search(line)
        # Printed with three digits after the point, so the product is a whole number of tokens but for rounding.
        batch = (
            f"{seconds * _positive(tokens.group(1), 'Tokens/s/device', where):.4g} tokens a device" if tokens else ""
        )
        flops = _positive(rate.group(1), "TFLOP/s/device", where) * 1e12 if rate else None
        steps.append(Step(number, int(found.group(1)), seconds, 1, flops, batch, "FLOPs by MaxText's own count"))
    return _found("maxtext", "MaxText", steps, devices, path, told, date)


READERS: dict[str, Callable[[str, Path, Told, str], Found]] = {"megatron": read_megatron, "maxtext": read_maxtext}


def settled(steps: Sequence[Step], warmup: int | None) -> list[Step]:
    """The steps of one run that are not warm-up, by the rule above."""
    if warmup is not None:
        return list(steps[warmup:])
    later = [s.seconds for s in steps[len(steps) // 2 :]]
    limit = TIMES_MEDIAN * quantile(later, 0.5)
    rest = list(steps[FIRST:])
    while rest and rest[0].seconds > limit:
        rest.pop(0)
    return rest


def _found(
    form: str, software: str, steps: list[Step], devices: int | None, path: Path, told: Told, date: str
) -> Found:
    if not steps:
        raise QuestionError(f"{path}: no line of a training step: not a log of {software}")
    if devices is None:
        raise QuestionError(f"{path}: does not say how many devices there were: say --devices")
    if devices < 1:
        raise QuestionError(f"{path}: {devices} devices: must be at least 1")
    runs: list[list[Step]] = []
    for step in steps:
        if not runs or step.number <= runs[-1][-1].number:
            runs.append([])
        runs[-1].append(step)
    kept = [s for run in runs for s in settled(run, told.warmup)]
    if not kept:
        rule = "nothing is left of its steps without the warm-up" if told.warmup is None else "all are warm-up"
        raise QuestionError(f"{path}: {len(steps)} steps logged: {rule}; --warmup N says how many of each run are")
    base = labelled(told, path, date, software)
    batches: dict[str, list[Step]] = {}
    for step in kept:
        batches.setdefault(step.batch, []).append(step)
    rows = [_row(base, some, batch, devices) for batch, some in batches.items()]
    notes = [f"{len(steps) - len(kept)} of {len(steps)} lines left out as warm-up, in {len(runs)} run(s)"]
    if any(s.steps > 1 for s in kept):
        notes.append("lines are means over several steps: quantiles are of these means")
    return Found(str(path), form, numbered(rows, path), tuple(notes))


def _row(base: Measurement, steps: list[Step], batch: str, devices: int) -> Measurement:
    times = [s.seconds for s in steps]
    flops = [s.seconds * s.flops_per_s for s in steps if s.flops_per_s is not None]
    several = len(times) > 1
    note = "; ".join(filter(None, (batch, steps[0].flops_note if flops else "")))
    return replace(
        base, kind="step", name="step", seconds=quantile(times, 0.5), samples=len(times), devices=devices,
        p10_s=quantile(times, 0.1) if several else None, p90_s=quantile(times, 0.9) if several else None,
        flops=quantile(flops, 0.5) if flops else None, note=note,
    )  # fmt: skip


def _positive(text: str, name: str, where: str) -> float:
    try:
        value = float(text.rstrip("|,"))
    except ValueError:
        raise QuestionError(f"{where}: {name} = {text!r:.40}: not a number") from None
    if not 0 < value < float("inf"):
        raise QuestionError(f"{where}: {name} = {value:g}: must be a finite number greater than 0")
    return value
