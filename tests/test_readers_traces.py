"""Profiles that others took: sums, classes and overlaps by hand, of Kineto's and of Chrome's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.calibration.readers.intervals import length, shared, union
from simulator.calibration.readers.kernel_classes import kernel_class, scope_of
from simulator.job.scopes import all_scopes
from trace_samples import SAMPLES, read, seconds

# Intervals

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)).map(lambda s: (s[0], s[0] + s[1])), max_size=12)


@given(spans, spans)
def test_unions_cover_what_their_intervals_cover(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    def instants(some: list[tuple[int, int]]) -> set[int]:
        return {t for start, end in some for t in range(start, end)}

    assert length(union(a)) == len(instants(a))
    assert shared(union(a), union(b)) == shared(union(b), union(a)) == len(instants(a) & instants(b))


# Kineto


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


def kernel(name: str, ts: str, dur: str, device: int = 0) -> str:
    args = f'{{"device": {device}, "stream": 7}}'
    start = f'{{"ph": "X", "cat": "kernel", "name": "{name}", "pid": {device}, "tid": 7'
    return f'{start}, "ts": {ts}, "dur": {dur}, "args": {args}}}'


def test_nanoseconds_of_a_clock_since_1970_survive(tmp_path: Path) -> None:
    """A float has a quarter of a microsecond left at this size."""
    work = [kernel(n, f"1740461679471346.{ns:03d}", "0.001") for n, ns in (("gemm_a", 1), ("gemm_b", 2))]
    path = tmp_path / "t.json"
    path.write_text('{"schemaVersion": 1, "traceEvents": [' + ", ".join(work) + "]}")
    found = read(path)
    assert found.profile is not None
    [use] = found.profile["devices"]
    assert round(use["span_s"] * 1e9, 3) == 2 and use["idle_s"] == 0


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
def test_a_kernel_is_classed_by_its_name_operators_and_region(
    name: str, ops: tuple[str, ...], region: str, expected: str
) -> None:
    assert kernel_class(name, ops, region) == expected


def test_scopes_are_those_of_the_simulator() -> None:
    names = ("dispatch", "combine", "attention_forward", "attention_backward", "norm", "cast")
    made = {scope_of(n, p, s) for n in names for p in ("", "forward", "backward") for s in ("decoder", "encoder")}
    assert made - {""} <= all_scopes() and len(made) == 9
    assert scope_of("combine", "", "decoder") == "", "without a pass it could be either way"


# Chrome's format


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
