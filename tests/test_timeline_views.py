"""Views of a timeline: the critical path against the engine itself, traces for Perfetto, the report, the terminal."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from engine_setups import chunk, run, setup
from reports import timeline as figures
from simulator.analysis.critical_path import HOP, START, critical_path, edges
from simulator.analysis.forecast import forecast
from simulator.analysis.perfetto import write_perfetto
from simulator.engine.run import Setup
from simulator.engine.work import DeviceWork, Transfer
from simulator.job.load import load_job
from simulator.results.forecast import Events, Forecast
from simulator.results.links import LinkUse
from simulator.results.timeline import KINDS, Timeline
from simulator.workload.orders import model_stage
from test_reports import EVIL, dense, giant, own_html, printed

EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("dualpipe", 1)]
HOP_S = 0.05


def timeline_of(made: Setup) -> Timeline:
    result = run(made)
    count = len(result.spent)
    names = tuple(f"stage {i}" for i in range(count))
    return result.recorder.timeline(result.step_s, names, (made.replicas,) * count, result.memory, ())


def uneven(schedule: str, virtual: int, slower: tuple[int, int, float] | None = None, stages: int = 4) -> Setup:
    """Stages of different lengths; `slower` makes one forward (model stage, microbatch) longer by some seconds."""
    random = np.random.default_rng(3)
    devices = []
    for _ in range(stages):
        chunks = []
        for _ in range(2 if schedule == "dualpipe" else virtual):
            one = chunk(*random.uniform(0.5, 1.5, 3).round(3).tolist())
            one.forward.hot_s = 1.0
            chunks.append(one)
        devices.append(DeviceWork(chunks, [], [], 0.1, 1))

    def excess(group: int, stage: int, microbatch: int) -> float:
        return slower[2] if slower and (stage, microbatch) == slower[:2] else 0.0

    return setup(schedule, stages, 8, virtual, devices=devices, hop_s=HOP_S, host_s=0.002, excess=excess)


def forwards(timeline: Timeline, schedule: str, stages: int = 4) -> dict[int, tuple[int, int]]:
    """(model stage, microbatch) of each row with a forward."""
    out = {}
    for i in range(len(timeline)):
        if KINDS[timeline.kind[i]] in ("forward", "forward and backward"):
            p, c, m = int(timeline.device[i]), int(timeline.chunk[i]), int(timeline.microbatch[i])
            out[i] = model_stage(schedule, p, c, stages), 2 * m + c if schedule == "dualpipe" else m
    return out


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_critical_path_sums_to_the_step(schedule: str, virtual: int) -> None:
    timeline = timeline_of(uneven(schedule, virtual))
    path = critical_path(timeline)
    assert path.total_s == pytest.approx(timeline.step_s, abs=1e-9)
    assert sum(path.seconds.values()) == path.total_s
    assert path.seconds["host"] == pytest.approx(0.002, abs=1e-9)
    hops = sum(timeline.device[a] != timeline.device[b] for a, b in zip(path.rows, path.rows[1:], strict=False))
    assert path.seconds[HOP] == pytest.approx(hops * HOP_S, abs=1e-7)
    assert not set(path.seconds) - {*KINDS, HOP}
    assert list(path.seconds.values()) == sorted(path.seconds.values(), reverse=True)


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_what_is_on_the_critical_path_slows_the_step(schedule: str, virtual: int) -> None:
    """Doubling any forward on the path makes the step longer by that forward; none makes it longer by more."""
    timeline = timeline_of(uneven(schedule, virtual))
    path = set(critical_path(timeline).rows)
    for row, (stage, microbatch) in forwards(timeline, schedule).items():
        twice = float(timeline.end_s[row] - timeline.start_s[row])
        grown = run(uneven(schedule, virtual, (stage, microbatch, twice))).step_s - timeline.step_s
        assert grown <= twice + 1e-6
        if row in path:
            assert grown == pytest.approx(twice, abs=1e-6)


def slack_of_forwards(made: Setup) -> dict[tuple[int, int], float]:
    """Slack of each forward under 1F1B by a second way: earliest and latest times over all dependencies."""
    ops = [(p, a.kind, a.microbatch) for p, order in enumerate(made.orders) for a in order]
    took = {}
    needs: dict[Any, list[tuple[Any, float]]] = defaultdict(list)
    for p, order in enumerate(made.orders):
        work = made.devices[p].chunks[0]
        for before, a in zip([None, *order], order, strict=False):
            forward = a.kind == "F"
            took[p, a.kind, a.microbatch] = (
                work.forward.compute_s if forward else work.input.compute_s + work.weight.compute_s
            )
            if before is not None:
                needs[p, a.kind, a.microbatch].append(((p, before.kind, before.microbatch), 0.0))
            neighbour = p - 1 if forward else p + 1
            if 0 <= neighbour < len(made.orders):
                needs[p, a.kind, a.microbatch].append(((neighbour, a.kind, a.microbatch), made.hop_s))
    start = dict.fromkeys(ops, 0.0)
    for _ in ops:
        for op in ops:
            start[op] = max((start[n] + took[n] + lag for n, lag in needs[op]), default=0.0)
    end = max(start[op] + took[op] for op in ops)
    latest = {op: end - took[op] for op in ops}
    for _ in ops:
        for op in ops:
            for n, lag in needs[op]:
                latest[n] = min(latest[n], latest[op] - lag - took[n])
    return {(p, m): latest[p, k, m] - start[p, k, m] for p, k, m in ops if k == "F"}


def test_what_is_off_the_critical_path_may_take_its_slack() -> None:
    made = uneven("1f1b", 1)
    timeline = timeline_of(made)
    path, slack = set(critical_path(timeline).rows), slack_of_forwards(made)
    off = 0
    for row, place in forwards(timeline, "1f1b").items():
        if row in path:
            assert slack[place] == pytest.approx(0.0, abs=1e-6)
        elif slack[place] > 1e-6:
            off += 1
            step = [run(uneven("1f1b", 1, (*place, k * slack[place]))).step_s for k in (0.9, 1.5)]
            assert step[0] == pytest.approx(timeline.step_s, abs=1e-7)
            assert step[1] == pytest.approx(timeline.step_s + 0.5 * slack[place], abs=1e-6)
    assert off > 8


def test_critical_path_goes_through_a_transfer_that_compute_waits_for() -> None:
    def seconds(transfer_s: float, beside: bool) -> dict[str, float]:
        one = Transfer("all-to-all", "all_to_all", 8, 1, transfer_s, overlapped=beside)
        device = DeviceWork([chunk(4.0, 1.0, 0.0, forward=[one])], [], [], 0.0, 1)
        return critical_path(timeline_of(setup("1f1b", 1, 1, devices=[device]))).seconds

    assert seconds(3.0, beside=True) == {"forward": 4.0, "backward": 1.0}
    assert seconds(6.0, beside=True) == {"all-to-all": 6.0, "backward": 1.0}
    assert seconds(3.0, beside=False) == {"forward": 4.0, "all-to-all": 3.0, "backward": 1.0}


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_critical_path_is_the_longest_path_of_networkx(schedule: str, virtual: int) -> None:
    """Row by row, ties too: of stages that differ, and of stages so equal that many paths are as long."""
    for made in (uneven(schedule, virtual), setup(schedule, 4, 8, virtual, hop_s=HOP_S)):
        timeline = timeline_of(made)
        graph = nx.DiGraph()
        graph.add_weighted_edges_from((before, row, took) for row, before, took in zip(*edges(timeline), strict=True))
        path = nx.dag_longest_path(graph, default_weight=0.0, topo_order=sorted(graph))
        assert path == [START, *critical_path(timeline).rows]


def test_critical_path_of_nothing() -> None:
    empty = np.array([])
    whole = empty.astype(np.int64)
    nothing = Timeline((), (), whole, whole, whole, whole, whole, empty, empty, whole, 0.5)
    assert critical_path(nothing).seconds == {"host": 0.5}


# Perfetto ------------------------------------------------------------------------------------------------------------


def crowded() -> Timeline:
    """DualPipe with hops, and two transfers at once beside every forward."""
    made = uneven("dualpipe", 1)
    for device in made.devices:
        for one in device.chunks:
            for name, size in (("all-to-all", 0.7), ("parameters", 0.6)):
                one.forward.transfers.append(Transfer(name, "all_to_all", 8, 1, size, overlapped=True))
    return timeline_of(made)


def test_perfetto_trace_is_sound(tmp_path: Path) -> None:
    timeline, path = crowded(), tmp_path / "trace.json"
    write_perfetto(timeline, path, "a step")
    read = json.loads(path.read_text())
    assert read["displayTimeUnit"] == "ms" and read["otherData"]["title"] == "a step"
    events = [e for e in read["traceEvents"] if e["ph"] != "M"]
    assert events == sorted(events, key=lambda e: e["ts"])
    assert all(e["ts"] >= 0 and {"name", "ph", "pid", "tid"} <= set(e) for e in events)
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == len(timeline)
    assert sum(e["dur"] for e in slices) == pytest.approx(1e6 * (timeline.end_s - timeline.start_s).sum(), rel=1e-6)
    lanes: dict[tuple[int, int], float] = defaultdict(float)
    for e in slices:
        # Microseconds with three digits: a nanosecond is the grain.
        assert e["dur"] >= 0 and round(1000 * e["ts"]) >= round(1000 * lanes[e["pid"], e["tid"]])
        lanes[e["pid"], e["tid"]] = e["ts"] + e["dur"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in read["traceEvents"] if e["name"] == "thread_name"}
    assert set(lanes) == set(names)
    assert {names[0, 1], names[0, 2], names[0, 5]} == {"compute", "network", "network 2"}
    counters = [e for e in events if e["ph"] == "C"]
    assert len(counters) == sum(len(times) for times, _ in timeline.memory)
    arrows = {ph: {e["id"]: e for e in events if e["ph"] == ph} for ph in "sf"}
    assert set(arrows["s"]) == set(arrows["f"]) and arrows["s"]
    for i, leaves in arrows["s"].items():
        assert leaves["ts"] <= arrows["f"][i]["ts"] and leaves["pid"] != arrows["f"][i]["pid"]


def test_perfetto_writes_the_same_bytes_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = crowded()
    plain, packed = tmp_path / "a.json", tmp_path / "b.json.gz"
    write_perfetto(timeline, plain, "x")
    write_perfetto(timeline, packed, "x")
    first = packed.read_bytes()
    assert gzip.decompress(first) == plain.read_bytes()
    write_perfetto(crowded(), packed, "x")
    assert packed.read_bytes() == first

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_perfetto(timeline, plain, "y")
    assert '"x"' in plain.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json.gz"]


# Report and terminal -------------------------------------------------------------------------------------------------


def told(f: Forecast, timeline: Timeline | None) -> Forecast:
    """A forecast with everything that events can tell."""
    uses = tuple(LinkUse(f"leaf {i} to spine", "leaf" if i % 2 else "pod", 1e11, 5e10, 0.9 - i / 50) for i in range(20))
    events = Events(
        f.step_time_s / 1.031, 0.031, ("bubble +3.1 % of the step: waiting in the pipeline",), 7, True,
        {"p50": 21.6, "p95": 22.9, "p99": 24.0}, 0.035,
        {"forward and backward": 14.2, "input gradient": 4.0, "all-to-all": 2.1, HOP: 1.3, "host": 0.1}, uses,
    )  # fmt: skip
    return replace(f, events=events, timeline=timeline)


@pytest.fixture(scope="module")
def deepseek() -> Forecast:
    f = forecast(load_job(EXAMPLES / "deepseek-v3.yaml"))
    assert f.timeline is not None
    return told(f, f.timeline)


def test_page_shows_the_timeline(deepseek: Forecast) -> None:
    text = own_html((deepseek, dense()))
    for name in ("timeline", "utilisation", "curve", "network", "links", "path", "formula"):
        assert text.count(f'<div id="job1-{name}-figure" class="plotly-graph-div"') == 1, name
        assert f'id="job2-{name}-figure"' not in text
    for said in ("Memory over time", "Links by the share of the step", "Critical path", "What the formula missed"):
        assert said in text
    for said in ("those of the first and last", "8 fullest of 16", "3.5 % of the draws", "+3.1 %", "leaf 0 to spine"):
        assert said in text, said
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) == len(re.findall(r'\bid="([^"]+)"', text))
    # A heat map would be a data: picture, which the page's policy forbids.
    assert "heatmap" not in text and "http" not in text.replace("http-equiv", "")
    assert own_html((deepseek, dense())) == text
    assert len(text) < 600_000


def test_page_escapes_what_links_and_classes_are_called(deepseek: Forecast) -> None:
    t, e = deepseek.timeline, deepseek.events
    assert t is not None and e is not None
    evil = replace(
        deepseek,
        timeline=replace(t, classes=(EVIL,) * len(t.classes), notes=(EVIL,)),
        events=replace(e, links=(LinkUse(EVIL, EVIL, 1.0, 1.0, 0.5),), missed=(EVIL,), critical_path_s={EVIL: 1.0}),
    )
    assert "<script>alert" not in own_html((evil,))


def test_long_timelines_show_their_ends(deepseek: Forecast) -> None:
    t = deepseek.timeline
    assert t is not None and len(t) > figures.MOST_BARS
    (low, early), (late, high) = figures.windows(t)
    assert (low, high) == (0.0, t.step_s)
    assert 0 < early <= figures.ENDS * t.step_s and high - late == pytest.approx(early)
    fig = figures.gantt(t)
    bars = sum(len(trace.x) for trace in fig.data)
    assert 1000 < bars <= figures.MOST_BARS
    # Nothing sticks out of the windows.
    ends = [(b, b + x) for trace in fig.data for b, x in zip(trace.base, trace.x, strict=True)]
    assert all(e <= early * 1.001 or b >= late * 0.999 for b, e in ends)
    assert figures.windows(crowded()) == ((0.0, crowded().step_s),)


def test_many_classes_show_some() -> None:
    t = crowded()
    many = replace(t, classes=tuple(f"stage {i}" for i in range(500)), replicas=(1,) * 500)
    shown = figures.shown_classes(many)
    assert len(shown) == figures.MOST_CLASSES and shown[0] == 0 and shown[-1] == 499
    assert len(figures.utilisation(many).layout.yaxis.ticktext) == figures.MOST_CLASSES


def test_long_memory_curves_keep_their_peak() -> None:
    times = np.linspace(0.0, 10.0, 5001)
    values = 50e9 + 1e9 * np.sin(7 * times)
    values[3333] = 90e9
    t = replace(crowded(), memory=((times, values),), classes=("stage 0",), step_s=11.0)
    fig = figures.memory_over_time(t, 80 * 2.0**30)
    assert fig is not None
    (line,) = fig.data
    assert len(line.x) <= figures.MOST_POINTS + 1
    assert max(line.y) == pytest.approx(90e9 / 2**30, rel=1e-5)
    assert line.x[-1] == 11.0
    assert fig.layout.yaxis.range[1] > max(line.y)


def test_terminal_tells_the_events() -> None:
    lines = printed((told(giant(), None),)).splitlines()
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    for part in (
        "closed form 21.0 s, events +3.1 %",
        "missed: bubble +3.1 % of the step",
        "forward and backward 65 %, input gradient 18 %, all-to-all 10 %, waiting for hop 6 %",
        "p50 21.6 s, p95 22.9 s, p99 24.0 s; out of memory in 3.5 %",
        "leaf 0 to spine (pod): 90.0 % busy, 100 GB",
    ):
        assert part in said, part
    assert "closed form" not in "".join(printed((giant(),)))
    assert max(map(len, printed((told(giant(), None),), 60).splitlines())) <= 60
