"""Traces that are cut, damaged, too large, ill-timed or nonsense: read or refused in a line that says where."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.calibration.readers import json_events, texts
from simulator.calibration.tables import read_table, write_table
from simulator.results.measurement import MeasurementTable
from trace_samples import SAMPLES, Trace, kernels, read, seconds


def broken(tmp_path: Path, data: bytes, name: str = "t.json", **told: Any) -> str:
    """What is said of a file with this content, after its name."""
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(QuestionError) as error:
        read(path, **told)
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said
    return said.removeprefix(f"{path}")


def changed(change: Callable[[list[Trace]], None]) -> bytes:
    """The sample of Kineto after a change of its events."""
    trace = json.loads((SAMPLES / "kineto.json").read_text())
    change(trace["traceEvents"])
    return json.dumps(trace).encode()


# Files


def test_cut_and_damaged_files(tmp_path: Path) -> None:
    whole = (SAMPLES / "kineto.json").read_bytes()
    packed = gzip.compress(whole)
    path = tmp_path / "t.json.gz"
    path.write_bytes(packed + gzip.compress(b"\n"))
    assert read(path).profile == read(SAMPLES / "kineto.json").profile
    assert "truncated gzip" in broken(tmp_path, packed[: len(packed) // 2])
    assert "truncated gzip" in broken(tmp_path, packed[:-4])
    assert "damaged gzip" in broken(tmp_path, packed[:-8] + b"\0" * 8)
    # Wherever JSON is cut, it is refused.
    for at in range(1, len(whole) - 3, 97):
        said = broken(tmp_path, whole[:at])
        assert "truncated JSON" in said or "character" in said
    # An event a line, from the second line on.
    cut = whole[:3500]
    number = cut.count(b"\n") - 1
    assert f"event {number}: truncated JSON" in broken(tmp_path, cut)
    assert "is empty" in broken(tmp_path, b"")
    assert "not text (UTF-8)" in broken(tmp_path, b"\x0a\xff\xfe\x00trace")
    assert "without traceEvents" in broken(tmp_path, b'{"cat": "kernel", "events": []}')
    assert "nested too deeply" in broken(tmp_path, b'{"a": ' + b"[" * 200_000)
    assert "event 0: NaN is no number" in broken(tmp_path, b'[{"ph": "X", "ts": NaN}]')


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.read_text, "__defaults__", (100_000,))
    bomb = gzip.compress(b"[" + b" " * 5_000_000)
    assert len(bomb) < 100_000
    assert "more than 100,000 bytes when unpacked" in broken(tmp_path, bomb)
    assert "at most 100,000 are read" in broken(tmp_path, b" " * 100_001)
    monkeypatch.setattr(json_events, "MAX_EVENTS", 10)
    assert "more than 10 events" in broken(tmp_path, (SAMPLES / "kineto.json").read_bytes())


NAMES = sorted(p.name for p in SAMPLES.iterdir() if p.suffix != ".md")
WORDS = [
    b"0", b"-7", b"1e999", b"null", b"NaN", b'"', b"{", b"]", b",", b"#", b"\n", b"\xff", b"x" * 50, b"9" * 400, b"",
]  # fmt: skip


@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(WORDS)), min_size=1, max_size=4),
)
def test_whatever_happens_to_a_file_it_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[float, int, bytes]]
) -> None:
    data = (SAMPLES / name).read_bytes()
    for where, length_, new in changes:
        at = int(where * len(data))
        data = data[:at] + new + data[at + length_ :]
    folder = tmp_path_factory.mktemp("changed")
    (folder / name).write_bytes(data)
    told = {"kind": "kernel", "columns": {"seconds": "time_us", "name": "what"}} if name.endswith(".csv") else {}
    try:
        found = read(folder / name, collective="all_to_all" if "alltoall" in name else "", **told)
    except QuestionError as error:
        refused = str(error)
    else:
        refused = ""
    assert "\n" not in refused
    if refused:
        return
    write_table(MeasurementTable(found.rows), folder / "t.csv")
    assert len(read_table(folder / "t.csv").rows) == len(found.rows)


# Events


def test_an_event_that_cannot_be_is_refused_by_field_and_value(tmp_path: Path) -> None:
    negative = broken(tmp_path, changed(lambda e: kernels(e)[1].update(dur=-3)))
    assert "(nvjet_hsh" in negative and "dur = -3: a duration is at least 0" in negative
    assert "has no ts" in broken(tmp_path, changed(lambda e: kernels(e)[1].pop("ts")))
    assert "ts = '12': not a number" in broken(tmp_path, changed(lambda e: kernels(e)[1].update(ts="12")))
    huge = json.dumps({"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 0, "dur": 1}]})
    assert "dur: not a time in microseconds" in broken(
        tmp_path, huge.replace('"dur": 1', '"dur": 1e999999999').encode()
    )
    none = changed(lambda e: [k.update(cat="cpu_op") for k in kernels(e)] and None)
    assert "no kernels on any device" in broken(tmp_path, none)
    outside = changed(
        lambda e: [k.update(ts=k["ts"] + 1e6) for k in e if str(k.get("name")).startswith("Profiler")] and None
    )
    assert "no kernels inside of its 2 profiler steps" in broken(tmp_path, outside)
    end = b'[{"ph": "E", "pid": 1, "tid": 2, "ts": 4}]'
    assert "ends what has not begun on thread 2" in broken(tmp_path, end)


def test_a_file_of_another_format_than_was_said_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((SAMPLES / "megatron.log").read_bytes())
    with pytest.raises(QuestionError, match="not JSON, but megatron: not a trace"):
        read(tmp_path / "x", "kineto")
    with pytest.raises(QuestionError, match="JSON: not nccl-tests"):
        read(SAMPLES / "kineto.json", "nccl-tests")
    with pytest.raises(QuestionError, match=r"--format 'kinetto': known:.*did you mean 'kineto'"):
        read(SAMPLES / "kineto.json", "kinetto")


def two_devices(late_us: float) -> bytes:
    """The sample's kernels, and the same again on device 1, later by `late_us`; no ranks, no steps."""
    trace = json.loads((SAMPLES / "kineto.json").read_text())
    del trace["distributedInfo"]
    own = kernels(trace["traceEvents"])
    other = [{**k, "ts": k["ts"] + late_us, "pid": 1, "args": {**k["args"], "device": 1}} for k in own]
    trace["traceEvents"] = own + other
    return json.dumps(trace).encode()


def test_devices_whose_clocks_are_apart_are_refused_unless_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(two_devices(60))
    assert {r.device for r in read(path).rows} == {0, 1}
    # The second gather takes 100 us: 150 us later, device 1 begins it 50 us after device 0 has done with it.
    said = broken(tmp_path, two_devices(150))
    assert (
        "all_gather of dp, call 1, ends on device 0 50 us before it starts on device 1: their clocks are apart" in said
    )
    assert "device 0 ends 97,650 us before device 1 begins: their clocks are apart" in broken(
        tmp_path, two_devices(1e5)
    )
    apart = read(path, clocks_apart=True)
    path.write_bytes(two_devices(60))
    assert seconds(apart) == seconds(read(path)), "what a device sums up is no matter of clocks"
