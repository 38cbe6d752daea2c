"""`moecast measure` and `moecast bench` by two real processes of two CPU devices each; their clocks, by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Call
from hw_profiles.cluster_spec import plain_spec
from hw_profiles.errors import QuestionError, WorkFailed
from hw_profiles.loader import load_chip, resolve_cluster
from runs import LIMIT_S, UNOPTIMISED, finish, free_port, write_tiny
from simulator.calibration.calibrate import calibrate
from simulator.calibration.measurement_rows import measurement_questions
from simulator.calibration.questions import Question
from simulator.calibration.tables import read_table
from simulator.results.measurement import NETWORK, Measurement, MeasurementTable
from trainer.attribution import Program, shares
from trainer.bench import count, groups, messages
from trainer.clocks import allowed, outline, together
from trainer.hlo_collectives import collectives
from trainer.hlo_text import parse_module
from trainer.hosts import Hosts
from trainer.others import Others
from trainer.xplane import Event, Execution

ROOT = Path(__file__).parents[1]
FOUR = ("--set", "cluster={chip: cpu-host, devices: 4, nodes: 2}", "--set", "plan.expert=4")
BRIEF = ("--steps", 3, "--traced", 2)
HLO = """HloModule jit__step, num_partitions=2

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %up = f32[8] add(%a, %a), metadata={op_name="jit(step)/jvp()/decoder.moe.experts.up/add"}
  ROOT %x = f32[8] all-to-all(%up), replica_groups={{0,1}}, metadata={op_name="decoder.moe.dispatch_all_to_all/x"}
}
"""
US = 1e3
AS_FIRST = ("--coordinator", ":9000", "--process", "0", "--processes", "2")
AS_SECOND = ("--coordinator", ":9000", "--process", "1", "--processes", "2")


def program() -> Program:
    module = parse_module(HLO)
    return Program(module, collectives(module))


def step(device: int, began_ns: int, *spans: tuple[str, float, float]) -> Execution:
    return Execution(7, {device: tuple(Event(op, a * US, b * US) for op, a, b in spans)}, began_ns=began_ns)


def pair(apart_us: int) -> tuple[Execution, Execution]:
    """Device 1 is 4 us late for an all-to-all that takes 6; its trace began 3 us later, by a clock `apart_us` off."""
    begun = 10**18
    first = step(0, begun, ("up", 0, 10), ("x", 10, 20))
    return first, step(1, begun + (3 + apart_us) * 1000, ("up", -3, 11), ("x", 11, 17))


def test_two_clocks_by_hand() -> None:
    known = program()
    first, late = pair(0)
    whole = together(first, [outline(late, known)], known)
    assert {d: [(e.op, e.start_ns, e.end_ns) for e in events] for d, events in whole.others.items()} == {
        1: [("up", 0, 14 * US), ("x", 14 * US, 20 * US)]
    }
    found = shares(whole, known)
    # Only this process's own device has rows here; 4 us of its all-to-all were waiting for the other one.
    sent = found[0]["decoder.moe.dispatch_all_to_all", "forward", True]
    assert list(found) == [0] and sent.seconds == pytest.approx(10e-6) and sent.waited_s == pytest.approx(4e-6)
    (other,) = shares(together(late, [outline(first, known)], known), known).values()
    assert other["decoder.moe.dispatch_all_to_all", "forward", True].waited_s == 0


def test_another_program_and_a_trace_without_a_start_are_refused() -> None:
    known = program()
    first, late = pair(0)
    with pytest.raises(WorkFailed, match=r"another process's trace: has an instruction 'other'"):
        together(first, [[10**18, [[1, [["other", 0, 1]]]]]], known)
    with pytest.raises(WorkFailed, match="does not say when it began"):
        together(first, [outline(replace(late, began_ns=0), known)], known)


@given(st.integers(-(10**9), 10**9))
def test_clocks_are_set_by_as_little_as_what_was_shared_asks(apart_us: int) -> None:
    """The other all-to-all's end may come no earlier than this start, and its start no later than this end."""
    known = program()
    first, late = pair(apart_us)
    least, most = allowed(first.devices, late.devices, known)
    assert (least, most) == (-7 * US, 9 * US)
    moved = together(first, [outline(late, known)], known).others[1][0].start_ns - late.devices[1][0].start_ns
    assert moved == pytest.approx(min(max((3 + apart_us) * US, least), most))


def test_groups_tell_a_process_from_its_neighbours() -> None:
    levels = resolve_cluster(plain_spec(load_chip("cpu-host"), 4, 2)).levels
    hosts = Hosts(4, 1, 2, levels, 2, "by wire")
    named = {g: hosts.level(*g) for g in groups(hosts)}
    assert named == {(4, 1): "Ethernet", (2, 1): "host memory", (2, 2): "Ethernet"}
    assert groups(Hosts(6, 3, 3, ())) == [(6, 1), (3, 1), (3, 2), (2, 1)]
    # Enough sizes for a fit of the links, where a group tells about them alone.
    assert [len(messages(hosts, *g, large=False)) for g in named] == [4, 4, 7]
    assert count(hosts, ("fp32",), large=False) == 16 + 6 + 1 + 5 * (4 + 4 + 7)
    assert count(hosts, ("fp32",), large=False, collectives=False) == 16 + 6 + 1
    assert (hosts.note("collective"), hosts.note("kernel")) == ("2 processes: by wire", "2 processes")


def test_a_rows_hosts_are_its_cluster() -> None:
    """A collective across two hosts is asked, and fitted, as one over their cards; within one it is not."""
    row = Measurement("a", "by hand", "2026-11-22", "cpu-host", "none", "collective", "all_to_all", 1e-3, bytes=1e6,
                      group_size=2, devices=4, nodes=2)  # fmt: skip
    cards, memory = (measurement_questions(MeasurementTable((replace(row, stride=s),)))[0] for s in (2, 1))
    assert isinstance(cards, Question) and isinstance(memory, Question)
    # Half of a megabyte over half of a card of 1.25 GB/s, which reaches 0.8 of its rate.
    assert cards.ask(None, "closed-form").forecast == pytest.approx(1e-4 + 0.5e6 / (0.625e9 * 0.8), rel=0.2)
    assert memory.ask(None, "closed-form").forecast < cards.ask(None, "closed-form").forecast
    rows = [replace(row, id=str(i), stride=2, bytes=2.0**i, seconds=2e-4 + 2.0**i / 0.5e9) for i in range(12, 20)]
    notes = calibrate([MeasurementTable(tuple(rows), name="t")], load_chip("cpu-host")).notes
    assert len(notes) == 4 and notes[-1].startswith("between hosts, all_to_all: start")
    with pytest.raises(QuestionError, match="no whole nodes of 2"):
        plain_spec(load_chip("h100-sxm"), 5, 2)


class Store:
    """The key-value store of JAX's runtime, as far as it is used; what is not there times out."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        self.held[key] = value

    def blocking_key_value_get_bytes(self, key: str, timeout_ms: int) -> bytes:
        if key not in self.held:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
        return self.held[key]

    def key_value_delete(self, folder: str) -> None:
        self.held = {k: v for k, v in self.held.items() if not k.startswith(f"{folder}/")}


def test_what_is_gathered_comes_in_pieces_and_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes' values come whole and in order; one too large, or one that does not come, is named."""
    store, found = Store(), []
    monkeypatch.setattr("trainer.others.PIECE_BYTES", 7)
    monkeypatch.setattr(Others, "_next", lambda _: "here")
    for index in (0, 1, 2):
        one = Others()
        one.index, one.count, one.lead, one._client = index, 3, index == 0, store
        found.append(one)
    values = [{"seconds": [0.1 * i, 1 / 3, 1e-9], "name": "x" * i} for i in range(3)]
    assert [found[i].gather("rows", values[i]) for i in (2, 1)] == [[], []]
    assert len(store.held) > 6 and found[0].gather("rows", values[0]) == values and not store.held
    found[2].gather("rows", values[2])
    with pytest.raises(WorkFailed, match=r"rows: waited 0 s \(of at most 900\) for process 1: DEADLINE_EXCEEDED"):
        found[0].gather("rows", values[0])
    monkeypatch.setattr("trainer.others.MOST_BYTES", 10)
    with pytest.raises(WorkFailed, match=r"rows: process 1 has \d+ bytes to send; at most 10 are gathered"):
        found[1].gather("rows", values[1])


def start(
    arguments: tuple[object, ...], port: int, process: int, cache: Path, program: tuple[str, ...] = ("-m", "moecast")
) -> subprocess.Popen[str]:
    meeting = ("--coordinator", f"127.0.0.1:{port}", "--process", process, "--processes", 2)
    environment = os.environ | {"XLA_FLAGS": UNOPTIMISED, "PYTHONPATH": str(ROOT), "TMPDIR": str(cache)}
    command = [sys.executable, *program, *map(str, (*arguments, *meeting))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_measure_one_job(tmp_path: Path) -> None:
    job, table_file, port = write_tiny(tmp_path), tmp_path / "m.parquet", free_port()
    asked = ("measure", job, *FOUR, *BRIEF, "--json")
    both = [start((*asked, *more), port, i, tmp_path) for i, more in enumerate((("-o", table_file), ()))]
    (code, printed, error), (code_1, printed_1, error_1) = [finish(p) for p in both]
    assert (code, code_1) == (0, 0), error + error_1
    assert (printed_1, error_1) == ("", "process 1 of 2: done; process 0 has the table\n")
    table = read_table(table_file)
    told = json.loads(printed)
    assert told["rows"] == len(table.rows) and told["steps"][0]["samples"] == 3
    [key] = table.jobs
    assert (tmp_path / table.routing[key]).is_file() and {part[0] for part in table.timelines[key]} == {0, 1, 2, 3}
    whole = next(r for r in table.rows if r.kind == "step")
    assert whole.note.endswith("2 processes, of each step the slowest") and whole.devices == 4
    for device in range(4):
        ops = [r for r in table.rows if r.kind == "op" and r.device == device]
        [window] = [r.seconds for r in ops if r.name == "window"]
        assert sum(r.seconds or 0 for r in ops if r.name != "window") == pytest.approx(window, rel=0.02)
        sent = [r for r in ops if r.level == NETWORK]
        assert any("all_to_all" in r.name for r in sent) and all(0 <= r.waited_s <= (r.seconds or 0) for r in sent)
    # Every call of the collective over all devices is in it: 2 traced steps, 4 devices.
    calls = [r for r in table.rows if r.kind == "collective" and r.name == "all_to_all"]
    assert {r.group_size for r in calls} == {4} and all(r.samples <= 2 * 4 * 8 for r in calls)
    # As a question the table is like any other.
    asked_of = [q for q in measurement_questions(table) if isinstance(q, Question)]
    assert {q.kind for q in asked_of} == {"step", "op", "collective", "memory"}
    assert not list(tmp_path.glob("moecast-*"))


def test_two_processes_are_benchmarked_together(tmp_path: Path) -> None:
    """One size of everything: rows say on how many hosts, over which network, and that all were at work."""
    port, table_file = free_port(), tmp_path / "b.csv"
    asked, program = (
        ("bench", "--devices", 4, "--seconds", 0.01, "-o", table_file),
        (str(ROOT / "tests/bench_pair.py"),),
    )
    both = [start(asked, port, i, tmp_path, program) for i in range(2)]
    found = [finish(p) for p in both]
    assert [code for code, _, _ in found] == [0, 0], found
    rows = {r.id: r for r in read_table(table_file).rows}
    assert {r.devices for r in rows.values()} == {4}
    assert {key.removeprefix("bench:4:"): (r.nodes, r.level) for key, r in rows.items()} == {
        "product.fp32.1x64x64x64": (1, ""), "stream.16384": (1, ""), "launch.program": (1, ""),
        "launch.instruction": (1, ""), "all_to_all.4x1.16384": (2, "Ethernet"),
        "all_to_all.2x1.16384": (2, "host memory"), "all_to_all.2x2.16384": (2, "Ethernet"),
        "all_to_all.2x2.65536": (2, "Ethernet"),
    }  # fmt: skip
    assert "loopback" in rows["bench:4:all_to_all.2x2.16384"].note


def test_collectives_may_be_left_out(tmp_path: Path) -> None:
    table_file = tmp_path / "b.csv"
    asked = ("bench", "--devices", "2", "--seconds", "0.01", "--no-collectives", "-o", str(table_file))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/bench_pair.py"), *asked], capture_output=True, text=True, timeout=300,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {r.name for r in read_table(table_file).rows}
    assert names == {"product", "stream", "program_launch", "launch"}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["measure", "JOB", "--process", "1"], "--coordinator, --process and --processes: go together"),
        (["bench", "-o", "t.csv", "--processes", "2"], "--coordinator, --process and --processes: go together"),
        (["measure", "JOB", "-o", "t.csv", *AS_SECOND], "process 0 writes the table; process 1 has no --output"),
        (["bench", "-o", "t.csv", *AS_SECOND], "process 0 writes the table; process 1 has no --output"),
        (["measure", "JOB", *AS_FIRST], "--output: missing"),
        (["measure", "JOB", "-o", "t.csv", *AS_FIRST], "--processes 2: must divide the 1 devices"),
        (["bench", "--devices", "3", "-o", "t.csv", *AS_FIRST], "--processes 2: must divide the 3 devices"),
        (["measure", "FOUR", "EIGHT", "-o", "t.csv", *AS_FIRST], "several processes measure jobs of equal devices"),
        (["bench", "--target", "tpu:v5p:2x2x1", "-o", "t.csv", *AS_FIRST], "leave --coordinator, --process and"),
        (["bench", "--target", "tpu:v5p:2x2x1", "-o", "t.csv", "--no-collectives"], "nothing runs: leave --devices,"),
        (["bench", "-o", "t.csv", "--coordinator", "here", *AS_FIRST[2:]], "write it as HOST:PORT"),
        (["bench", "-o", "t.csv", *AS_FIRST[:2], "--process", "2", "--processes", "2"], "--process 2: must be from 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], rule: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {"JOB": write_tiny(tmp_path)}
    for name, devices in (("FOUR", 4), ("EIGHT", 8)):
        text = jobs["JOB"].read_text(encoding="utf-8").replace("devices: 1", f"devices: {devices}")
        jobs[name] = tmp_path / f"{name}.yaml"
        jobs[name].write_text(text.replace("name: tiny", f"name: {name}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, out, error = call(*(jobs.get(a, a) for a in arguments))
    assert code == 2 and not out and error.count("\n") == 1 and rule in error
    assert not (tmp_path / "t.csv").exists()


def test_a_process_that_dies_ends_the_other_without_a_table(tmp_path: Path) -> None:
    table_file, port = tmp_path / "b.parquet", free_port()
    both = []
    for i, more in enumerate((("-o", table_file), ())):
        (tmp_path / str(i)).mkdir()
        both.append(start(("bench", "--devices", 4, "--seconds", 60, *more), port, i, tmp_path / str(i)))
    until = time.monotonic() + LIMIT_S
    # Those of gloo come to those of the coordinator with the first collective.
    while min(_sockets(p.pid) for p in both) < 4:
        assert both[0].poll() is None and both[1].poll() is None, [finish(p) for p in both]
        assert time.monotonic() < until
        time.sleep(0.05)
    both[1].kill()
    code, printed, error = finish(both[0])
    finish(both[1])
    said = [line for line in error.splitlines() if line.startswith("moecast: ")]
    assert (code, printed) == (4, "") and re.search(r"another process|waited \d+ s", said[-1]), error
    assert not table_file.exists() and not list((tmp_path / "0").glob("moecast-*"))


def _sockets(parent: int) -> int:
    """Sockets that the child of a process has open."""
    try:
        [child] = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return sum(os.readlink(f).startswith("socket:") for f in Path(f"/proc/{child}/fd").iterdir())
    except (OSError, ValueError):
        return 0
