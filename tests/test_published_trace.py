"""The published profile of DeepSeek-V3: its classes, times and overlaps against the file itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from simulator.calibration.readers.found import Found, Told
from simulator.calibration.readers.read import read_file
from simulator.calibration.tables import read_table, write_table
from simulator.results.measurement import MeasurementTable
from trace_samples import Trace


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
