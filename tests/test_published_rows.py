"""Published tables as they stand: every row has a forecast or a reason; rows by hand; what shipped fits have seen."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fitted_rows
from hw_profiles import QuestionError, load_chip
from hw_profiles.fitted_rows import FILE
from reports.validation_page import render
from simulator.analysis.forecast import forecast
from simulator.calibration.gpt_rows import gpt_job
from simulator.calibration.kernel_rows import kernel_question, rank_load
from simulator.calibration.published import KINDS, read_rows
from simulator.calibration.questions import Answer
from simulator.calibration.step_rows import step_job
from simulator.calibration.validate import Options, validate
from simulator.job.load import load_job
from simulator.results.validation import ValidationResult

TABLES = ("train_steps", "gpt_a100_steps", "collectives", "kernels", "maxtext_compiled")
# Of the rows of each table at least so many have a forecast; the rest is named.
FORECAST = {"train_steps": 230, "gpt_a100_steps": 408, "collectives": 2400, "kernels": 2600, "maxtext_compiled": 60}


def score_all(path: Path) -> ValidationResult:
    return validate([read_rows(path)], Options(allow_fitted=True))


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_forecast_or_a_reason(shared: Path, name: str) -> None:
    path = shared / "measured" / f"{name}.csv"
    found = score_all(path)
    assert found.tables[0].kind == name
    assert found.rows == len(found.scored) + len(found.skipped) and len(found.scored) >= FORECAST[name]
    with path.open(newline="") as file:
        ids = {row["id"] for row in csv.DictReader(file)}
    if name != "maxtext_compiled":
        assert ids == {r.id for r in (*found.scored, *found.skipped)} and found.rows == len(ids)
    assert all(len(reason) > 10 for reason in found.reasons)
    assert found.baseline is not None and all(math.isfinite(r.error) for r in found.scored)
    text = render(found, "x")
    assert text == render(found, "x") and "http:" not in text[text.index("<main>") :]


def test_forecasts_beat_one_constant_where_tables_say_so(shared: Path) -> None:
    """Kernels, collectives, GPT steps and step ranks: a constant is further off; the median of steps is not better."""
    for name in ("gpt_a100_steps", "collectives", "kernels"):
        found = validate([read_rows(shared / "measured" / f"{name}.csv")])
        ours, constant = found.scores, found.baseline
        assert constant is not None and ours.median_abs_error is not None and constant.median_abs_error is not None
        assert ours.median_abs_error < constant.median_abs_error, name
    steps = validate([read_rows(shared / "measured" / "train_steps.csv", [("spec_level", "full")], "dup_group")])
    assert steps.baseline is not None and steps.scores.spearman is not None and steps.baseline.spearman is not None
    assert steps.scores.spearman > steps.baseline.spearman
    assert steps.scores.flops_spearman is not None and steps.baseline.flops_spearman is not None
    assert steps.scores.flops_spearman > steps.baseline.flops_spearman
    # Their interval was read from them: that is said, and not called coverage.
    assert steps.scores.coverage is None and steps.scores.intervals_in_sample == len(steps.scored)


def test_the_list_of_used_rows_is_what_the_fits_use(shared: Path) -> None:
    assert FILE.read_text(encoding="utf-8") == fitted_rows.text(shared / "measured")


def test_used_rows_are_refused_in_a_shuffled_part_of_a_table(shared: Path, tmp_path: Path) -> None:
    with (shared / "measured" / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole = validate([read_rows(shared / "measured" / "kernels.csv")])
    refused = {s.id for s in whole.skipped if "rests on it" in s.reason}
    part = [row | {"id": f"n{row['id']}"} for row in reversed(rows) if int(row["id"]) % 3 == 0]
    copy = tmp_path / "part.csv"
    with copy.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(part)
    found = validate([read_rows(copy)])
    assert {s.id for s in found.skipped if "rests on it" in s.reason} == {f"n{i}" for i in refused if int(i) % 3 == 0}
    assert len(refused) > 900


STEP = {
    "id": "BR-1", "kind": "moe", "source": "x", "model": "DeepSeek-V3", "hardware": "B200", "num_devices": "256",
    "topology": "8-GPU NVLink nodes", "precision": "mxfp8", "seq_len": "4096", "global_batch": "2048",
    "micro_batch": "1", "TP": "1", "PP": "8", "VPP": "2", "CP": "1", "EP": "8", "ETP": "",
    "FSDP_DP": "FSDP=0", "sharding_notes": "",
    "recompute": "recompute_modules=None", "dispatcher": "flex:hybridep", "overlap_flags": "",
    "model_TFLOPs_per_device": "", "tokens_per_s_per_device": "",
}  # fmt: skip
TPU = {
    "hardware": "TPU7x (Ironwood)", "num_devices": "256", "topology": "4x8x8 3D torus", "precision": "bf16", "EP": "1",
    "PP": "1", "VPP": "", "recompute": "remat_policy=full", "dispatcher": "megablox", "model": "gpt-oss-120b",
}  # fmt: skip


def plan(**change: str) -> dict[str, Any]:
    out: dict[str, Any] = step_job(STEP | change)["plan"]
    return out


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"overlap_flags": "a=b; pp_layout=Et*4|(t*4|)*14tmL"}, "stages", "Et*4|(t*4|)*14tmL"),
        # 126 + 2 layers on 64 chunks: two each, the first and last one fewer.
        ({"model": "Llama3.1-405B", "VPP": "8"}, "stages", (1, *[2] * 62, 1)),
        ({"PP": "1", "VPP": ""}, "stages", None),
        ({"FSDP_DP": "DP=128; EDP=32; FSDP=On"}, "shard", "parameters"),
        ({"FSDP_DP": "FSDP=64"}, "shard", "parameters"),
        ({"FSDP_DP": "FSDP=0"}, "shard", "optimizer"),
        ({"TP": "2"}, "sequence_parallel", True),
        ({"TP": "2", "overlap_flags": "TP comm all-reduce, no SP; no DP"}, "sequence_parallel", False),
        (TPU | {"FSDP_DP": "ici_fsdp_parallelism=64; ici_fsdp_transpose_parallelism=2; ici_data_parallelism=4"},
         "shard_degree", 128),
        (TPU | {"FSDP_DP": "ici_fsdp_parallelism=-1; ici_fsdp_transpose_parallelism=2"}, "shard_degree", None),
    ],
)  # fmt: skip
def test_a_step_row_by_its_description(change: dict[str, str], name: str, value: Any) -> None:
    assert plan(**change).get(name) == value


def test_deepseek_has_its_mtp_module_where_its_flops_say_so() -> None:
    def model(flops: float) -> Any:
        return step_job(
            STEP | {"model_TFLOPs_per_device": str(flops * 4000 / 1e12), "tokens_per_s_per_device": "4000"}
        )["model"]

    assert model(2.606e11) == {"preset": "deepseek-v3", "mtp_layers": 1} and model(2.504e11) == "deepseek-v3"
    given = load_job(step_job(STEP | {"overlap_flags": "pp_layout=Et*4|(t*4|)*14tmL"}))
    assert given.model.mtp_layers == 1 and forecast(given, engine="closed-form").step_time_s > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"global_batch": ""}, "global_batch is not stated"),
        ({"micro_batch": ""}, "micro_batch is not stated"),
        ({"num_devices": ""}, "num_devices is not stated"),
        ({"kind": "moe-hybrid"}, "hybrid"),
        ({"precision": "fp8 (not stated)"}, "precision"),
        ({"model": "GPT3-175B", "hardware": "TPU v5p"}, "not to use it"),
    ],
)
def test_a_step_row_that_is_refused(change: dict[str, str], reason: str) -> None:
    with pytest.raises(QuestionError, match=reason):
        step_job(STEP | change)


GPT = {
    "id": "VT-1", "source": "x", "software": "Megatron-DeepSpeed, fp16, full recompute, 1F1B, unfused attention",
    "hardware": "A100-80 SXM", "num_devices": "8", "hidden": "2048", "heads": "16", "layers": "20", "seq_len": "1024",
    "vocab": "51200", "global_batch": "8", "micro_batch": "2", "TP": "4", "DP": "1", "PP": "2", "step_time_s": "0.16",
}  # fmt: skip


def test_a_gpt_row_by_hand() -> None:
    job = load_job(gpt_job(GPT))
    found = forecast(job, engine="closed-form")
    # 12 L D^2 and the table of words and positions, biases and norms a little more.
    assert found.job.total_parameters == pytest.approx(12 * 20 * 2048**2 + 52224 * 2048, rel=2e-3)
    assert found.job.plan["microbatches"] == 4 and found.job.plan["shard"] == "none" and found.job.remat == "full"
    fused = job.model_copy(update={"software": job.software.model_copy(update={"attention": None})})
    assert forecast(fused, engine="closed-form").step_time_s < found.step_time_s
    assert fused.hash != job.hash
    for change, reason in (
        ({"DP": "2"}, "TP x DP x PP = 16"),
        ({"heads": "7"}, "no multiple"),
        ({"hardware": "T4"}, "T4"),
    ):
        with pytest.raises(QuestionError, match=reason):
            gpt_job(GPT | change)
    with pytest.raises(QuestionError, match="has one kernel of its own"):
        load_job(gpt_job(GPT) | {"software": {"stack": "maxtext", "attention": "unfused"}})


KERNEL = dict.fromkeys(next(k.needs for k in KINDS if k.name == "kernels"), "")


def asked(**row: str) -> Answer:
    return kernel_question(KERNEL | {"id": "1", "chip": "H100 SXM"} | row).ask(None, "closed-form")


def test_kernel_rows_by_hand() -> None:
    chip = load_chip("h100-sxm")
    extra, memory = chip.kernel_overhead_us.value * 1e-6, chip.device_memory_bytes_per_s * chip.efficiency.memory.value
    assert asked(kind="hbm_copy", gbps="2900").forecast == pytest.approx(2**30 / memory + extra)
    gemm = {"kind": "gemm_dense", "m": "8192", "n": "8192", "k": "8192", "groups": "1", "time_us": "1", "library": "x"}
    share = chip.efficiency.matmul["bf16"].points[-1][1]
    found = asked(dtype="bf16", **gemm)
    assert found.forecast == pytest.approx(2 * 8192**3 / (989e12 * share) + extra, rel=0.02)
    assert found.basis == pytest.approx(2 * 8192**3 / chip.device_peak_flops_per_s("bf16"))
    spread = chip.efficiency.matmul["bf16"].residuals
    assert spread and found.interval == (found.forecast * spread["p10"], found.forecast * spread["p90"])
    # 16 rows are none of those that the curve was fitted on.
    assert asked(dtype="bf16", **(gemm | {"m": "16"})).interval is None
    # TensorRT-LLM casts the input: 2 bytes in and 1 out of each of m x k, by a kernel more.
    plain, cast = asked(dtype="fp8", **gemm), asked(dtype="fp8", **(gemm | {"library": "TensorRT-LLM"}))
    assert cast.forecast - plain.forecast == pytest.approx(3 * 8192**2 / memory + extra)


@given(
    tokens=st.sampled_from((1, 16, 128, 1024, 16384)), experts=st.sampled_from((8, 128, 256)),
    ranks=st.sampled_from((1, 2, 4, 8)), top_k=st.sampled_from((1, 2, 8)),
)  # fmt: skip
def test_a_skewed_rank_has_no_less_than_its_share(tokens: int, experts: int, ranks: int, top_k: int) -> None:
    even, skewed = (
        rank_load("balanced", tokens, experts, top_k, ranks),
        rank_load("power_law_1.2", tokens, experts, top_k, ranks),
    )
    assert even[0] == max(1, tokens * top_k / ranks) and even[1] <= experts / ranks
    # Loads are rounded to whole tokens, as the source does: each of a rank's experts can lose half of one.
    assert skewed[0] >= min(even[0], tokens * top_k / ranks) - experts / ranks / 2
    assert 1 <= skewed[1] <= experts / ranks
    assert rank_load.__wrapped__("power_law_1.2", tokens, experts, top_k, ranks) == skewed
