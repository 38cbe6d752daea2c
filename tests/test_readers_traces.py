"""Profiles that others took: sums and overlaps by hand, by brute force, and on a published one; and broken traces."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.calibration.readers import json_events, texts
from simulator.calibration.readers.found import Found, Told
from simulator.calibration.readers.intervals import length, shared, union
from simulator.calibration.readers.kernel_classes import kernel_class, scope_of
from simulator.calibration.readers.read import read_file
from simulator.calibration.tables import read_table, write_table
from simulator.job.scopes import all_scopes
from simulator.results.measurement import MeasurementTable

SAMPLES = Path(__file__).with_name("samples")
Trace = dict[str, Any]


def read(path: Path, form: str = "auto", **told: Any) -> Found:
    return read_file(path, Told(chip="h100-sxm", **told), form)


def seconds(found: Found) -> dict[tuple[str, str, int | None], float | None]:
    return {(r.name, r.phase, r.device): r.seconds for r in found.rows if r.kind == "op"}


# Intervals ------------------------------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)).map(lambda s: (s[0], s[0] + s[1])), max_size=12)


@given(spans, spans)
def test_unions_cover_what_their_intervals_cover(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    def instants(some: list[tuple[int, int]]) -> set[int]:
        return {t for start, end in some for t in range(start, end)}

    assert length(union(a)) == len(instants(a))
    assert shared(union(a), union(b)) == shared(union(b), union(a)) == len(instants(a) & instants(b))


# Kineto ---------------------------------------------------------------------------------------------------------------


def test_a_kineto_profile_by_hand() -> None:
    """Two steps: products of 200 and 220 us forward, 150.5 backward, gathers of 200 and 100 us half hidden."""
    found = read(SAMPLES / "kineto.json")
    assert found.format == "kineto"
    us = {k: round(1e6 * (s or 0), 6) for k, s in seconds(found).items()}
    assert us == {
        ("dense_gemm", "", 3): 210.0, ("dense_gemm", "backward", 3): 150.5, ("all_gather", "", 3): 150.0,
        ("optimizer", "", 3): 50.25, ("other", "", 3): 10.0,
    }  # fmt: skip
    [gather] = [r for r in found.rows if r.kind == "collective"]
    assert (gather.name, gather.bytes, gather.group_size, gather.dtype, gather.samples) == (
        "all_gather", 16384.0, 8, "bf16", 2,
    )  # fmt: skip
    [step] = [r for r in found.rows if r.kind == "step"]
    assert step.seconds == pytest.approx(1e-3) and step.samples == 2
    assert step.date == "2025-03-13"
    assert found.profile is not None
    [use] = found.profile["devices"]
    by_hand = {"span": 1850.25, "compute": 781.25, "communication": 300, "hidden": 200, "exposed": 100, "idle": 969}
    assert {k: round(1e6 * use[f"{k}_s"], 6) for k in by_hand} == by_hand
    assert found.profile["classed_share"] == pytest.approx(1 - 10 / (771.25 + 10 + 300))
    assert "kernels launched outside of the profiler steps, left out: 1" in found.notes


def test_nanoseconds_of_a_clock_since_1970_survive(tmp_path: Path) -> None:
    """A float has a quarter of a microsecond left at this size."""
    work = [kernel(n, f"1740461679471346.{ns:03d}", "0.001") for n, ns in (("gemm_a", 1), ("gemm_b", 2))]
    path = tmp_path / "t.json"
    path.write_text('{"schemaVersion": 1, "traceEvents": [' + ", ".join(work) + "]}")
    found = read(path)
    assert found.profile is not None
    [use] = found.profile["devices"]
    assert round(use["span_s"] * 1e9, 3) == 2 and use["idle_s"] == 0


def kernel(name: str, ts: str, dur: str, device: int = 0) -> str:
    args = f'{{"device": {device}, "stream": 7}}'
    start = f'{{"ph": "X", "cat": "kernel", "name": "{name}", "pid": {device}, "tid": 7'
    return f'{start}, "ts": {ts}, "dur": {dur}, "args": {args}}}'


@pytest.mark.parametrize(
    ("name", "ops", "region", "expected"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", ("nccl:all_to_all",), "", "all_to_all"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", (), "", "send_receive"),
        ("ncclKernel_Generic", (), "", "collective"),
        ("void deep_ep::internode::combine<false, 8>(int4*)", (), "", "combine"),
        ("void deep_ep::intranode::notify_dispatch<8>(int const*)", (), "", "exchange_notify"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd>", (), "", "attention_backward"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", (), "", "attention_forward"),
        ("cutlass::device_kernel<cutlass::gemm::kernel::GroupProblemShape<int>>", (), "", "grouped_gemm"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", (), "", "dense_gemm"),
        ("nvjet_hsh_128x256_64x4", ("aten::_grouped_mm",), "", "grouped_gemm"),
        ("fp8_dptp128c_acc::GemmKernel", (), "attn(W)", "dense_gemm"),
        ("fp8_dptp128c_acc::GemmKernel", (), "mlp(W)", "weight_gradient_gemm"),
        ("vectorized_elementwise_kernel<4, CUDAFunctor_add>", ("Optimizer.step#AdamW.step",), "", "optimizer"),
        ("vectorized_elementwise_kernel<4, CUDAFunctor_add>", ("aten::add",), "", "elementwise"),
        ("mystery_kernel(float*, int)", (), "", "other"),
        ("fusion.217", (), "", "other"),
        ("loop_convert_fusion_2", (), "", "elementwise"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL", (), "", "collective"),
    ],
)
def test_classes(name: str, ops: tuple[str, ...], region: str, expected: str) -> None:
    assert kernel_class(name, ops, region) == expected


def test_scopes_are_those_of_the_simulator() -> None:
    names = ("dispatch", "combine", "attention_forward", "attention_backward", "norm", "cast")
    made = {scope_of(n, p, s) for n in names for p in ("", "forward", "backward") for s in ("decoder", "encoder")}
    assert made - {""} <= all_scopes() and len(made) == 9
    assert scope_of("combine", "", "decoder") == "", "without a pass it could be either way"


# Chrome's format ------------------------------------------------------------------------------------------------------


def test_a_trace_of_xla_by_hand() -> None:
    """Modules and the loop hold others and are not counted; the copy is a pair of B and E."""
    found = read(SAMPLES / "chrome.json")
    assert found.format == "perfetto"
    us = {k: round(1e6 * (s or 0), 6) for k, s in seconds(found).items()}
    assert us == {
        ("dense_gemm", "", 0): 170.0, ("all_reduce", "", 0): 90.0, ("elementwise", "", 0): 110.125,
        ("dense_gemm", "", 1): 170.0, ("all_reduce", "", 1): 90.0, ("elementwise", "", 1): 110.125,
        ("memory_copy", "", 0): 5.0,
    }  # fmt: skip
    assert found.profile is not None
    use = found.profile["devices"][1]
    # The all-reduce runs from 80 to 170, compute until 150.125.
    assert round(1e6 * use["hidden_s"], 6) == 70.125 and round(1e6 * use["exposed_s"], 6) == 19.875


def test_only_the_processes_asked_for_are_devices() -> None:
    found = read(SAMPLES / "chrome.json", process="GPU:1")
    assert {r.device for r in found.rows} == {1}
    with pytest.raises(QuestionError, match=r"no process has 'TPU' in its name.*processes: /device:GPU:0"):
        read(SAMPLES / "chrome.json", process="TPU")


def test_a_timeline_of_our_own(tmp_path: Path) -> None:
    """What moecast writes for Perfetto is read back with the timeline's own seconds, stage by stage."""
    from simulator.analysis.forecast import forecast
    from simulator.analysis.perfetto import write_perfetto
    from simulator.job.load import load_job
    from simulator.results.timeline import KINDS

    timeline = forecast(load_job(Path(__file__).parents[1] / "examples/deepseek-v3.yaml")).timeline
    assert timeline is not None
    path = tmp_path / "t.json.gz"
    write_perfetto(timeline, path, "t")
    found = seconds(read(path))
    long = timeline.end_s - timeline.start_s
    moved = [KINDS.index(k) for k in ("parameters", "gradients", "tensor")]
    for stage in range(len(timeline.classes)):
        own = timeline.device == stage
        exchanged = long[own & (timeline.kind == KINDS.index("all-to-all"))].sum()
        assert found["all_to_all", "", stage] == pytest.approx(exchanged, rel=1e-6)
        others = long[own & np.isin(timeline.kind, moved)].sum()
        assert found.get(("collective", "", stage), 0) == pytest.approx(others, rel=1e-6)


# Broken traces --------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, data: bytes, name: str = "t.json", **told: Any) -> str:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(QuestionError) as error:
        read(path, **told)
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said
    return said.removeprefix(f"{path}")


def changed(change: Callable[[list[Trace]], None]) -> bytes:
    trace = json.loads((SAMPLES / "kineto.json").read_text())
    change(trace["traceEvents"])
    return json.dumps(trace).encode()


def kernels(events: list[Trace]) -> list[Trace]:
    return [e for e in events if e.get("cat") == "kernel"]


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


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.read_text, "__defaults__", (100_000,))
    bomb = gzip.compress(b"[" + b" " * 5_000_000)
    assert len(bomb) < 100_000
    assert "more than 100,000 bytes when unpacked" in broken(tmp_path, bomb)
    assert "at most 100,000 are read" in broken(tmp_path, b" " * 100_001)
    monkeypatch.setattr(json_events, "MAX_EVENTS", 10)
    assert "more than 10 events" in broken(tmp_path, (SAMPLES / "kineto.json").read_bytes())


def test_bad_events(tmp_path: Path) -> None:
    assert "(nvjet_hsh" in broken(tmp_path, changed(lambda e: kernels(e)[1].update(dur=-3)))
    assert "dur = -3: a duration is at least 0" in broken(tmp_path, changed(lambda e: kernels(e)[1].update(dur=-3)))
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
    text = (SAMPLES / "megatron.log").read_bytes()
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(QuestionError, match="not JSON, but megatron: not a trace"):
        read(tmp_path / "x", "kineto")
    with pytest.raises(QuestionError, match="JSON: not nccl-tests"):
        read(SAMPLES / "kineto.json", "nccl-tests")
    with pytest.raises(QuestionError, match=r"--format 'kinetto': known:.*did you mean 'kineto'"):
        read(SAMPLES / "kineto.json", "kinetto")
    end = b'[{"ph": "E", "pid": 1, "tid": 2, "ts": 4}]'
    assert "ends what has not begun on thread 2" in broken(tmp_path, end)


def two_devices(late_us: float) -> bytes:
    """The sample's kernels, and the same again on device 1, later by `late_us`; no ranks, no steps."""
    trace = json.loads((SAMPLES / "kineto.json").read_text())
    del trace["distributedInfo"]
    own = kernels(trace["traceEvents"])
    other = [{**k, "ts": k["ts"] + late_us, "pid": 1, "args": {**k["args"], "device": 1}} for k in own]
    trace["traceEvents"] = own + other
    return json.dumps(trace).encode()


def test_clocks_apart(tmp_path: Path) -> None:
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


# The published profile ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared: Path) -> tuple[Found, list[Trace]]:
    path = shared / "measured/traces/deepseek_v3_train_h800.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return read_file(path, Told(chip="h800")), [
        e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def test_the_published_profile_is_classed(published: tuple[Found, list[Trace]], tmp_path: Path) -> None:
    found, raw = published
    assert found.profile is not None
    assert found.profile["classed_share"] >= 0.95
    total = sum(e["dur"] for e in raw)
    assert total == 244_069, "microseconds, added up by hand from the file"
    assert round(1e6 * sum(c["seconds"] for c in found.profile["classes"])) == total
    assert round(1e6 * sum(r.seconds or 0 for r in found.rows if r.kind == "op")) == total
    assert sum(c["kernels"] for c in found.profile["classes"]) == len(raw) == 983
    assert [round(1e6 * r.seconds) for r in found.rows if r.kind == "step" and r.seconds] == [112_202]
    assert {r.date for r in found.rows} == {"2025-02-25"}
    table = tmp_path / "t.parquet"
    write_table(MeasurementTable(found.rows), table)
    assert read_table(table).rows == found.rows


@pytest.mark.parametrize(
    ("part", "count", "total_us", "rows"),
    [
        ("ep::internode::combine<", 8, 49448, {"decoder.moe.combine_all_to_all": ["forward"],
                                             "decoder.moe.dispatch_all_to_all_backward": ["backward"]}),
        ("m_grouped_fp8_ptp128c::", 16, 22926, {"grouped_gemm": ["forward", "backward"]}),
        ("ep::internode::dispatch<false, 8, false, 8>", 4, 17383, {"decoder.moe.dispatch_all_to_all": ["forward"]}),
        ("flash::compute_attn_ws<", 4, 4948, {"decoder.attention.core": ["forward"]}),
        ("rotary_kernel", 24, 1512, {"rotary": ["forward", "backward"]}),
    ],
)  # fmt: skip
def test_five_kernels_of_the_published_profile_by_hand(
    published: tuple[Found, list[Trace]], part: str, count: int, total_us: int, rows: dict[str, list[str]]
) -> None:
    """Counts and microseconds were read off the file; each of these kernels is all of its class."""
    found, raw = published
    own = [e for e in raw if part in e["name"]]
    assert (len(own), sum(e["dur"] for e in own)) == (count, total_us)
    made = [r for r in found.rows if r.kind == "op" and r.phase in rows.get(r.name, [])]
    assert round(1e6 * sum(r.seconds or 0 for r in made)) == total_us
    assert sum(r.calls for r in made) == count


def test_overlap_of_the_published_profile_by_brute_force(published: tuple[Found, list[Trace]]) -> None:
    """Its times are whole microseconds: one flag for each, set by each kernel, without unions."""
    found, raw = published
    begin = min(e["ts"] for e in raw)
    busy = np.zeros((2, max(e["ts"] + e["dur"] for e in raw) - begin), bool)
    for e in raw:
        at = e["ts"] - begin
        busy[int("::ep::internode::" in e["name"]), at : at + e["dur"]] = True
    compute, moved = busy
    assert found.profile is not None
    [use] = found.profile["devices"]
    counted = {
        "span": busy.shape[1], "compute": compute.sum(), "communication": moved.sum(),
        "hidden": (compute & moved).sum(), "exposed": (moved & ~compute).sum(), "idle": (~moved & ~compute).sum(),
    }  # fmt: skip
    assert {k: round(1e6 * use[f"{k}_s"]) for k in counted} == counted


def test_the_pair_beside_the_forecast_counts_everything_once(shared: Path) -> None:
    """Both sides' lines add up to all there is: the profile's kernels, and the forecast's compute of four layers."""
    from benchmarks.deepseek_trace import JOB, LAYERS, _layer, compare
    from simulator.job.load import load_job

    parts = compare(shared / "measured/traces/deepseek_v3_train_h800.json.gz")
    kernels_s = sum(x.trace_s or 0 for some in ("compute", "communication") for x in parts[some])
    assert kernels_s == pytest.approx(0.244069)
    layer = _layer(load_job(JOB))
    compute_s = sum(x.forecast_s or 0 for x in parts["compute"])
    assert compute_s == pytest.approx(LAYERS * float(layer.compute_s))
    whole = {x.name: x for x in parts["pair"]}
    pair = whole["pair, first kernel to last"]
    assert pair.forecast_s is not None and pair.forecast_s >= compute_s
    assert (pair.trace_s, whole["pair, the host's profiler step"].trace_s) == (
        pytest.approx(0.129012), pytest.approx(0.112202),
    )  # fmt: skip


# Anything -------------------------------------------------------------------------------------------------------------

NAMES = sorted(p.name for p in SAMPLES.iterdir() if p.suffix != ".md")
WORDS = [
    b"0",
    b"-7",
    b"1e999",
    b"null",
    b"NaN",
    b'"',
    b"{",
    b"]",
    b",",
    b"#",
    b"\n",
    b"\xff",
    b"x" * 50,
    b"9" * 400,
    b"",
]


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
