"""Where the time of a traced step went: by hand on small traces, and on a real step of the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError, WorkFailed
from simulator.analysis.forecast import forecast
from simulator.calibration.observations import observed
from simulator.calibration.tables import read_table
from simulator.job.load import load_job
from simulator.job.scopes import all_scopes
from simulator.results.measurement import NETWORK
from trainer.attribution import Program, check_program, collective_calls, intervals, partition, shares
from trainer.hlo_collectives import collectives
from trainer.hlo_text import parse_module
from trainer.xplane import Event, check_clocks, executions, read_trace

TINY = Path(__file__).parents[1] / "examples" / "tiny-moe.yaml"
# Two devices: an up-projection, a loop that only encloses, an all-to-all, and an instruction without a name.
HLO = """HloModule jit__step, num_partitions=2

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %m = f32[8] multiply(%p, %p), metadata={op_name="jit(step)/transpose(jvp())/decoder.moe.router/mul"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %up = f32[8] add(%a, %a), metadata={op_name="jit(step)/jvp()/decoder.moe.experts.up/add"}
  %call.1 = f32[8] call(%up), to_apply=%inner
  %fused = f32[8] fusion(%up), kind=kLoop, calls=%inner
  %x = f32[8] all-to-all(%fused), replica_groups={{0,1}}, metadata={op_name="jit(s)/decoder.moe.dispatch_all_to_all/x"}
  ROOT %z = f32[8] copy(%x)
}
"""


def program() -> Program:
    module = parse_module(HLO)
    return Program(module, collectives(module))


def at(op: str, start_us: float, end_us: float) -> Event:
    return Event(op, start_us * 1e3, end_us * 1e3)


def traced(*devices: tuple[Event, ...]) -> object:
    events = [("jit__step", 7, d, e) for d, own in enumerate(devices) for e in own]
    (found,) = executions(events, "jit__step")
    return found


def test_a_step_by_hand() -> None:
    """Device 1 is 4 us late at the all-to-all; a fusion without a name is what it holds; a call only encloses."""
    first = (at("up", 0, 10), at("call.1", 10, 16), at("fused", 11, 16), at("x", 16, 26), at("z", 27, 28))
    late = (at("up", 0, 14), at("fused", 14, 20), at("x", 20, 26), at("z", 26, 28))
    found, known = traced(first, late), program()
    mine = {
        key: (round(s.seconds * 1e6, 6), s.calls, round(s.waited_s * 1e6, 6))
        for key, s in shares(found, known)[0].items()
    }  # type: ignore[arg-type]
    assert mine == {
        ("decoder.moe.experts.up", "forward", False): (10, 1, 0),
        ("decoder.moe.router", "backward", False): (5, 1, 0),
        ("decoder.moe.dispatch_all_to_all", "forward", True): (10, 1, 4),
        ("unnamed", "forward", False): (1, 1, 0),
        ("gaps", "", False): (2, 4, 0),
    }
    assert sorted(round(c.seconds * 1e6, 6) for c in collective_calls(found, known)) == [6, 6]  # type: ignore[arg-type]
    kinds = [(d, k, round(b * 1e6, 6)) for d, k, _, b in intervals(found, known)]  # type: ignore[arg-type]
    assert (0, "imbalance", 20) in kinds and (0, "all-to-all", 26) in kinds and (1, "all-to-all", 26) in kinds
    check_clocks(found, "here")  # type: ignore[arg-type]


def test_traces_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match="here: has an instruction 'other' that the job's program has not"):
        check_program(traced((at("other", 0, 1),)), program(), "here")  # type: ignore[arg-type]
    apart = traced((at("up", 0, 10),), (at("up", 50_000, 50_010),))
    with pytest.raises(WorkFailed, match=r"device 1 begins 50 ms after device 0 has ended .* clocks are apart"):
        check_clocks(apart, "here")  # type: ignore[arg-type]
    broken = tmp_path / "t.xplane.pb"
    broken.write_bytes(b"\x0a\xff\xff\xff\x7fnothing")
    with pytest.raises(QuestionError, match=r"not an XPlane trace|holds no run"):
        read_trace(broken, "jit__step")
    with pytest.raises(QuestionError, match="no such file"):
        read_trace(tmp_path / "none", "jit__step")


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 500)), max_size=12))
def test_shares_add_up_to_the_union(spans: list[tuple[int, int]]) -> None:
    events = [at("up", a, a + n) for a, n in spans]
    own = partition(events)
    union = len({t for a, n in spans for t in range(a, a + n)})
    assert sum(own) == pytest.approx(union * 1e-6)
    assert all(0 <= s <= n * 1.000001e-6 for s, (_, n) in zip(own, spans, strict=True))


def test_a_real_step_is_measured_to_the_last_gap(tmp_path: Path) -> None:
    table_file = tmp_path / "m.parquet"
    done = subprocess.run(
        [sys.executable, "-m", "moecast", "measure", str(TINY), "--set", "cluster.devices=2", "--steps", "3",
         "--traced", "2", "--rounds", "2", "-o", str(table_file), "--json"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    table = read_table(table_file)
    assert told["rows"] == len(table.rows) and len(told["steps"]) == 2
    parts: dict[tuple[str, int | None], float] = defaultdict(float)
    windows = {}
    for row in table.rows:
        if row.kind == "op":
            key = row.id.partition(":")[0], row.device
            if row.name == "window":
                windows[key] = row.seconds
            else:
                parts[key] += row.seconds or 0.0
                assert row.name in all_scopes() | {"gaps", "unnamed"}
    # Medians over two steps add up as their means do.
    assert len(windows) == 4 and all(parts[k] == pytest.approx(w, rel=0.02) for k, w in windows.items())
    job = load_job(dict(next(iter(table.jobs.values()))))
    sent = [r for r in table.rows if r.level == NETWORK and r.device == 0 and "all_to_all" in r.name]
    counted = sum(c.count for c in forecast(job, engine="closed-form").collectives if c.kind == "all_to_all")
    assert sum(r.calls for r in sent) / 2 == counted
    first = observed([table], {})[0]
    assert sum(first.compute_s.values()) + first.sent_s == pytest.approx(first.step_s)
    assert first.memory["peak"] == pytest.approx(forecast(job, engine="closed-form").memory.argument_bytes, rel=0.03)
    # What the routers did is replayed as it is.
    key, file = next(iter(table.routing.items()))
    again = job.model_copy(update={"training": job.training.model_copy(update={
        "routing": job.training.routing.model_copy(update={"model": "replay", "file": file})})})  # fmt: skip
    assert key == job.hash and forecast(again, folder=tmp_path).routing.model == "replay"
