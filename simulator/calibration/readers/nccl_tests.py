"""Output of nccl-tests (and rccl-tests): one row for each size, out of place and in place.

Columns are found by the header's words, since versions differ in them. Sizes are nccl-tests' own: what the table calls
the bytes of a collective. busbw / algbw is a factor of the kind and the number of ranks alone (PERFORMANCE.md of
nccl-tests), so it shows whether both were read rightly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from hw_profiles.errors import QuestionError, nearest
from simulator.calibration.readers.found import Found, Told, labelled, numbered
from simulator.results.measurement import Measurement

MARK = re.compile(r"^\S{0,40}[ \t]*#.*\bout-of-place\b", re.MULTILINE)
# Of the executables; the factor of busbw is passes x (n - 1) / n, or 1.
_KINDS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "broadcast": "broadcast", "reduce": "reduce", "sendrecv": "send_receive",
    "gather": "gather", "scatter": "scatter",
}  # fmt: skip
COLLECTIVES = tuple(_KINDS.values())
_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "gather": 1, "scatter": 1}
# NCCL's words for number formats, in the table's.
_DTYPES = {
    "float": "fp32", "half": "fp16", "bfloat16": "bf16", "double": "fp64", "fp8_e4m3": "fp8", "f8e4m3": "fp8",
    "fp8_e5m2": "fp8", "f8e5m2": "fp8",
}  # fmt: skip
_EXECUTABLE = re.compile(rf"\b({'|'.join(_KINDS)})_perf\b")
_RANK = re.compile(r"^#\s+Rank\s+(\d+)\b.*?\bPid\s+(\d+)\s+on\s+(\S+)\s+device\b")
_THREADS = re.compile(r"nThread\s+(\d+)\s+nGpus\s+(\d+)")
_ITERATIONS = re.compile(r"\biters:\s+(\d+)")
_VERSION = re.compile(r"nccl-tests version\s+(\S+)")
_LIBRARY = re.compile(r"nccl-library=(\d+)|NCCL version\s+(\S+)")
# Bandwidths are printed with two digits: below this one they say too little.
_LEAST_GB_PER_S = 5.0


# What mpirun and srun put before the lines of a rank.
_PREFIX = re.compile(r"^(?:\[\d+,\d+\]<\w+>:|\d+: ?(?=[#\s\d]))")


@dataclass(slots=True)
class _Header:
    """What stands above the rows; `then` is the test that a line has named for the next table."""

    kind: str = ""
    then: str = ""
    ranks: dict[int, str] = field(default_factory=dict)
    hosts: set[str] = field(default_factory=set)
    a_process: int = 0
    iterations: int = 1
    software: str = "nccl-tests"
    columns: list[str] = field(default_factory=list)


def read_nccl_tests(text: str, path: Path, told: Told, date: str) -> Found:
    """The rows of one run or several in a file; QuestionError naming file and line for what does not fit."""
    if told.collective and told.collective not in COLLECTIVES:
        rule = f"known: {', '.join(COLLECTIVES)}{nearest(told.collective, COLLECTIVES)}"
        raise QuestionError(f"--collective {told.collective!r:.40}: {rule}")
    head, rows, notes = _Header(), [], []
    for number, raw in enumerate(text.splitlines(), 1):
        line, where = _PREFIX.sub("", raw), f"{path}, line {number}"
        if named := _EXECUTABLE.search(line):
            if "concluded" not in line:
                head.then = _KINDS[named.group(1)]
        elif line.lstrip().startswith("#"):
            _header(head, line, where)
        elif head.columns and re.match(r"\s*\d", line):
            new, wrong = _row(head, line.split(), where, labelled(told, path, date, head.software), told)
            rows += new
            notes += [f"line {number}: wrong results {place}, left out" for place in wrong]
            if not head.ranks and told.group_size is None:
                notes.append(f"no lines of ranks: {head.a_process}, nThread x nGpus, are taken (--group-size)")
            if len(head.hosts) > 1:
                notes.append(f"{len(head.ranks)} ranks on {len(head.hosts)} hosts")
    if not rows:
        raise QuestionError(f"{path}: not nccl-tests' output: no row of sizes and times under its header")
    return Found(str(path), "nccl-tests", numbered(rows, path), tuple(dict.fromkeys(notes)))


def _header(head: _Header, line: str, where: str) -> None:
    if version := _VERSION.search(line):
        head.software = f"nccl-tests {version.group(1)}"
    if library := _LIBRARY.search(line):
        head.software += f", NCCL {library.group(1) or library.group(2)}"
    if threads := _THREADS.search(line):
        if head.columns:
            # The next test of a log.
            head.columns, head.ranks, head.hosts, head.kind = [], {}, set(), ""
        head.a_process = int(threads.group(1)) * int(threads.group(2))
    if iterations := _ITERATIONS.search(line.partition("warmup iters")[2].partition(" ")[2]):
        head.iterations = max(1, int(iterations.group(1)))
    if rank := _RANK.match(line):
        process = f"{rank.group(2)} on {rank.group(3)}"
        if head.ranks.setdefault(int(rank.group(1)), process) != process:
            rule = "appears twice: built without MPI, each process measured itself alone"
            raise QuestionError(f"{where}: rank {rank.group(1)} {rule}")
        head.hosts.add(rank.group(3))
    words = line.lstrip("# \t").split()
    if words[:2] == ["size", "count"] and "time" in words:
        head.columns = words
        head.kind, head.then = head.then or head.kind, ""


def _columns(head: _Header, words: list[str], where: str) -> list[str]:
    """The header's columns of a row: older versions leave redop or root blank where a test has none."""
    columns = list(head.columns)
    for blank in ("redop", "root"):
        if len(words) < len(columns) and blank in columns:
            columns.remove(blank)
    if len(words) != len(columns):
        raise QuestionError(f"{where}: has {len(words)} fields, the header {len(head.columns)}")
    return columns


def _row(
    head: _Header, words: list[str], where: str, base: Measurement, told: Told
) -> tuple[list[Measurement], list[str]]:
    """The rows of a line, and the places (out of place, in place) whose results were wrong."""
    kind = told.collective or head.kind
    if not kind:
        raise QuestionError(f"{where}: no line names the test (all_reduce_perf ...): say --collective")
    ranks = told.group_size or len(head.ranks) or head.a_process
    if ranks < 1:
        raise QuestionError(f"{where}: neither ranks nor nGpus stand above it: say --group-size")
    columns = _columns(head, words, where)
    first = columns.index("time")
    again = next((i for i in range(first + 1, len(words)) if columns[i] == "time"), len(words))
    size = _number(words[0], "size", where)
    out: list[Measurement] = []
    bad: list[str] = []
    for begin, end, place in ((first, again, "out of place"), (again, len(words), "in place")):
        found = dict(zip(columns[begin:end], words[begin:end], strict=True))
        if not found or found["time"] == "N/A" or size == 0:
            continue
        time_us = _number(found["time"], "time", where)
        if time_us <= 0:
            raise QuestionError(f"{where}: time = {time_us:g}: must be greater than 0")
        _check(kind, ranks, size, time_us, found, f"{where}, {place}")
        if _is_wrong(found, where):
            bad.append(place)
            continue
        note = place + (f", {len(head.hosts)} hosts" if len(head.hosts) > 1 else "")
        said = words[columns.index("type")] if "type" in columns else ""
        dtype = _DTYPES.get(said, said)
        row = replace(
            base, kind="collective", name=kind, bytes=size, seconds=time_us * 1e-6, group_size=ranks, devices=ranks,
            dtype=dtype, statistic="mean", samples=head.iterations, note=note,
        )  # fmt: skip
        out.append(row)
    return out, bad


def _is_wrong(found: dict[str, str], where: str) -> bool:
    """Whether results were wrong: counted, or in older versions a largest difference."""
    name, most = ("#wrong", 0.0) if "#wrong" in found else ("error", 1e-2)
    return found.get(name, "N/A") != "N/A" and _number(found[name], name, where) > most


def _check(kind: str, ranks: int, size: float, time_us: float, found: dict[str, str], where: str) -> None:
    """QuestionError where the bandwidths beside a time are not those of size, kind and ranks."""
    if "algbw" not in found or "busbw" not in found:
        return
    algorithm, bus = _number(found["algbw"], "algbw", where), _number(found["busbw"], "busbw", where)
    if algorithm < _LEAST_GB_PER_S:
        return
    if abs(algorithm * 1e3 * time_us / size - 1) > 0.01:
        raise QuestionError(f"{where}: {size:.0f} bytes in {time_us:g} us are not {algorithm:g} GB/s: not its columns")
    factor = _PASSES[kind] * (ranks - 1) / ranks if kind in _PASSES else 1.0
    if abs(bus / algorithm - factor) > 0.01:
        rule = f"busbw / algbw is {bus / algorithm:.3f}, {kind} over {ranks} has {factor:.3f}"
        raise QuestionError(f"{where}: {rule}: another collective (--collective) or group (--group-size)")


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise QuestionError(f"{where}: {name} = {text!r:.40}: not a number") from None
    if not 0 <= value < float("inf"):
        raise QuestionError(f"{where}: {name} = {text:.40}: must be a finite number, at least 0")
    return value
