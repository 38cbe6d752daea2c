"""The reader of compiled programs: FLOPs, collectives and groups of small programs worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.hlo import CompiledProgram, HloError, executed_flops, parse_module, read_text
from trainer.hlo_memory import report_total
from trainer.targets import check_libtpu, child_environment, parse_target

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "hlo"
# The sizes of tests/compiled_programs.py, which imports JAX and so is only run.
T, D, F, L, G, C = 64, 128, 256, 5, 4, 16
MLP = 2 * D * F  # parameters of a layer
X_F32 = T * D * 4


def _compile(target: str, *names: str) -> dict[str, dict[str, Any]]:
    """What tests/compiled_programs.py prints, run where the target's devices are there."""
    environment = child_environment(parse_target(target), {"PATH": "", "PYTHONPATH": str(ROOT)})
    command = [sys.executable, str(ROOT / "tests" / "compiled_programs.py"), target, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def cpu() -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed (extra `train`)")
    return _compile("cpu:8")


def _saved(name: str) -> CompiledProgram:
    return read_text((DATA / f"{name}.txt").read_text(encoding="utf-8"), "tpu")


def _by_kind(program: CompiledProgram) -> dict[str, tuple[int, int, float, int]]:
    """kind -> (count, bytes, wire bytes, group size), for programs with one of each."""
    assert len({c.kind for c in program.collectives}) == len(program.collectives)
    return {c.kind: (c.count, c.bytes, c.wire_bytes, c.group_size) for c in program.collectives}


# 16384/8 rows, 2048 and 8192/4 wide: two products, three gradients.
SCATTERED = 5 * 2 * 2048**3


# On CPU and TPU the same

ALL_KINDS = {
    "all-to-all": (1, X_F32, X_F32 * 3 / 4, 4),
    "all-gather": (1, X_F32 * 4, X_F32 * 3, 4),
    "reduce-scatter": (1, X_F32, X_F32 / 2, 2),
    "collective-permute": (1, X_F32, X_F32, 4),
    "all-reduce": (1, X_F32, X_F32 * 2 * 7 / 8, 8),
}
GROUPS = {
    "all-to-all": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "all-gather": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "reduce-scatter": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "collective-permute": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "all-reduce": (tuple(range(8)),),
}
SCOPES = {
    "all-to-all": "decoder.moe.dispatch_all_to_all",
    "all-gather": "decoder.parameters.all_gather",
    "reduce-scatter": "gradients.reduce_scatter",
    "collective-permute": "decoder.attention.kv_exchange",
    "all-reduce": "gradients.all_reduce",
}


def _check_all_kinds(program: CompiledProgram) -> None:
    assert _by_kind(program) == ALL_KINDS
    assert {c.kind: c.groups for c in program.collectives} == GROUPS
    assert {c.kind: c.scopes for c in program.collectives} == {kind: (scope,) for kind, scope in SCOPES.items()}


def test_every_kind_of_collective_on_cpu(cpu: dict[str, dict[str, Any]]) -> None:
    _check_all_kinds(read_text(cpu["all_kinds"]["text"], "cpu"))


def test_every_kind_of_collective_on_tpu() -> None:
    _check_all_kinds(_saved("v5p_all_kinds"))


# On 8 CPU devices


def test_merged_sums_are_one_with_both_scopes(cpu: dict[str, dict[str, Any]]) -> None:
    (merged,) = read_text(cpu["merged_sums"]["text"], "cpu").collectives
    assert (merged.bytes, merged.operands) == (T * (D + F) * 4, 2)
    assert merged.scopes == ("decoder.gradients.all_reduce", "logits.gradients.all_reduce")


def test_xla_cpu_carries_bf16_as_four_bytes(cpu: dict[str, dict[str, Any]]) -> None:
    (one,) = read_text(cpu["bf16_all_to_all"]["text"], "cpu").collectives
    assert (one.dtype, one.bytes) == ("f32", T * D * 4)


@pytest.mark.parametrize(
    ("name", "per_token_and_parameter", "recomputed"),
    # Under remat the last product is run again only if something reads its value: `sin` does, the next layer does not.
    [("mlp", 6, 0), ("mlp_remat", 8, 2), ("mlp_remat_linear_end", 7, 1)],
)
def test_flops_of_layers_in_a_scan(
    cpu: dict[str, dict[str, Any]], name: str, per_token_and_parameter: int, recomputed: int
) -> None:
    flops = executed_flops(parse_module(cpu[name]["text"]))
    assert flops.total == per_token_and_parameter * MLP * T * L
    assert flops.of(phase="recompute") == recomputed * MLP * T * L
    assert flops.of(phase="forward") * 2 == flops.of(phase="backward") == 4 * MLP * T * L
    assert flops.of(scope="decoder.ffn.up", phase="backward") == 2 * MLP * T * L
    assert set(flops.by_scope) == {"decoder.ffn.up", "decoder.ffn.down"} and not flops.uncounted
    assert cpu[name]["cost_flops"] < flops.total / 4  # XLA's own count takes each of the five layers for one


def test_scans_in_scans_multiply(cpu: dict[str, dict[str, Any]]) -> None:
    assert executed_flops(parse_module(cpu["nested"]["text"])).total == 3 * 4 * 2 * T * D * D


@pytest.mark.parametrize(("name", "flops"), [("batched", 2 * G * C * D * F), ("two_products", 2 * 2 * T * D * F)])
def test_without_loops_the_count_is_that_of_cost_analysis(
    cpu: dict[str, dict[str, Any]], name: str, flops: int
) -> None:
    assert executed_flops(parse_module(cpu[name]["text"])).total == flops == cpu[name]["cost_flops"]


def test_of_branches_the_heaviest_counts_and_is_named(cpu: dict[str, dict[str, Any]]) -> None:
    flops = executed_flops(parse_module(cpu["branches"]["text"]))
    assert flops.total == 2 * 2 * T * D * D
    assert len(flops.assumptions) == 1 and "branch 0 of 2" in flops.assumptions[0]


def test_a_loop_until_something_is_an_error_only_round_a_product(cpu: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(HloError, match=r"while loop 'while\S*' \(jit\(f\)/while\): how often it runs cannot be read"):
        executed_flops(parse_module(cpu["until"]["text"]))
    assert executed_flops(parse_module(cpu["until_without_products"]["text"])).total == 2 * T * D * D


def test_the_peak_that_xla_cpu_states_leaves_temporaries_out(cpu: dict[str, dict[str, Any]]) -> None:
    """What docs/compile.md says; should a new jaxlib count them, this test and that page are to change."""
    memory = cpu["mlp"]["read"]["memory"]
    held = memory["argument_bytes"] + memory["output_bytes"] - memory["alias_bytes"]
    assert held <= memory["peak_bytes"] < held + 100 < memory["temporary_bytes"] + held == memory["allocated_bytes"]


def test_json_of_a_program(cpu: dict[str, dict[str, Any]]) -> None:
    read = cpu["moe_async"]["read"]
    x_bytes = T * D * 4
    assert read["collective_bytes_by_kind"] == {"all-to-all": 2 * L * x_bytes}
    assert read["executed_flops_per_device"]["by_scope"]["decoder.moe.experts.up"]["forward"] == 2 * T * D * D * L
    assert read["devices"] == 8 and read["memory"]["peak_bytes"] == cpu["moe_async"]["peak_bytes"] > 0
    assert read["memory"]["argument_bytes"] == T * D * 2 + L * D * D * 2


# Texts of XLA:TPU


def test_tpu_asynchronous_in_a_loop_without_a_stated_count() -> None:
    assert "known_trip_count" not in (DATA / "v3_moe_async.txt").read_text(encoding="utf-8")
    program = _saved("v3_moe_async")
    assert [(c.kind, c.count, c.bytes, c.dtype, c.asynchronous) for c in program.collectives] == [
        ("all-to-all", L, T * D * 2, "bf16", True)
    ] * 2
    assert program.flops.total == 2 * T * D * D * L


@pytest.mark.parametrize("name", ["v5p_gathered_chained", "7x_gathered_chained"])
def test_tpu_a_gather_cut_over_fusions_or_given_to_the_sparse_core_counts_once(name: str) -> None:
    program = _saved(name)
    assert [(c.kind, c.count, c.bytes) for c in program.collectives] == [("all-gather", 3, 1024 * 1024 * 2)] * 2
    assert any(c.asynchronous for c in program.collectives)
    assert program.flops.total == 3 * 2 * 2 * 1024**3 and not program.flops.uncounted


def test_tpu_iota_groups_and_a_reduce_scatter_written_as_an_all_reduce() -> None:
    program = _saved("v3_scattered")
    size = 2048 * 2048 * 2
    assert program.bytes_by_kind() == {"all-gather": 2 * size, "all-reduce": size, "reduce-scatter": 2 * size}
    columns = tuple(tuple(range(k, 32, 4)) for k in range(4))
    assert {c.kind: c.groups for c in program.collectives} == {
        "all-gather": columns, "all-reduce": tuple(tuple(range(4 * k, 4 * k + 4)) for k in range(8)),
        "reduce-scatter": columns,
    }  # fmt: skip
    assert {c.phase for c in program.collectives if c.kind == "reduce-scatter"} == {"backward"}


def test_tpu_products_as_windows_count_as_products() -> None:
    assert _saved("v3_scattered").flops.total == SCATTERED


def test_tpu_all_reduces_in_place_of_wide_gathers_and_scatters_say_what_was_asked() -> None:
    program = _saved("v5p_wide")
    both = 2 * 1024 * 1024 * 2
    assert program.bytes_by_kind() == {"all-reduce": 2 * both}
    assert program.bytes_by_kind(asked=True) == {"all-gather": both, "reduce-scatter": both}
    assert {c.asked: (c.scopes, c.scopes_inferred) for c in program.collectives} == {
        "all-gather": ((), True), "reduce-scatter": (("decoder.gradients.reduce_scatter",), True),
    }  # fmt: skip


def test_tpu_an_all_reduce_on_the_sparse_core_in_place_of_a_gather_says_so() -> None:
    program = _saved("7x_wide")
    both = 2 * 1024 * 1024 * 2
    assert program.bytes_by_kind() == {"all-reduce": both, "reduce-scatter": both}
    assert program.bytes_by_kind(asked=True) == {"all-gather": both, "reduce-scatter": both}
    assert all(c.asynchronous for c in program.collectives)


def test_tpu_merged_sums_keep_the_first_name_only() -> None:
    (merged,) = _saved("v5p_merged_sums").collectives
    assert (merged.bytes, merged.operands, merged.scopes) == (T * (D + F) * 4, 2, ("decoder.gradients.all_reduce",))


def test_tpu_ragged_product_is_the_static_row_count() -> None:
    flops = _saved("v5p_ragged").flops
    assert flops.total == flops.of(scope="decoder.moe.experts.up") == 2 * T * D * F
    assert not flops.uncounted


@pytest.mark.parametrize("target", ["tpu:v5p:2x4x4", "tpu:v3:4x4"])
def test_the_tpu_compiler_itself(target: str) -> None:
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed (extra `tpu`)")
    check_libtpu()
    done = _compile(target, "all_kinds", "mlp_remat", "moe_async", "scattered")
    # On v5p the partitioner cuts these products up and passes pieces round a ring, in windows with padding.
    assert executed_flops(parse_module(done["scattered"]["text"])).total == SCATTERED
    _check_all_kinds(read_text(done["all_kinds"]["text"], "tpu"))
    assert executed_flops(parse_module(done["mlp_remat"]["text"])).total == 8 * MLP * T * L
    read = done["moe_async"]["read"]
    assert read["collective_bytes_by_kind"] == {"all-to-all": 2 * L * T * D * 2}
    assert read["memory"]["peak_bytes"] == report_total(done["moe_async"]["report"])
    assert read["memory"]["peak_bytes"] >= read["memory"]["argument_bytes"] == T * D * 2 + L * D * D * 2
