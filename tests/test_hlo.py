"""The reader of compiled programs: FLOPs, collectives and groups against small programs worked out by hand."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.hlo import (
    CompiledProgram,
    HloError,
    Memory,
    collectives,
    executed_flops,
    parse_module,
    peak_memory,
    read_text,
)
from trainer.hlo_flops import product_flops
from trainer.hlo_groups import replica_groups
from trainer.hlo_memory import report_total
from trainer.hlo_scopes import paths, phase_of, scope_of, scopes_of
from trainer.hlo_text import Instruction, Shape, parse_shapes
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

# On 8 CPU devices.

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


# Texts of XLA:TPU.


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


# Parts.


def test_shapes() -> None:
    assert parse_shapes("(bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, token[], s4[3]{0}, f32[], pred[<=7])") == (
        Shape("bf16", (8, 16), "{1,0:T(8,128)(2,1)S(1)}"), Shape("token", (0,)[1:]), Shape("s4", (3,), "{0}"),
        Shape("f32", ()), Shape("pred", (7,)),
    )  # fmt: skip
    sizes = {"f32": 12, "bf16": 6, "s4": 2, "pred": 3, "f8e4m3fn": 3, "f4e2m1fn": 2, "c64": 24, "token": 0, "u64": 24}
    assert {t: Shape(t, (3,)).bytes for t in sizes} == sizes
    with pytest.raises(HloError, match="element type 'q7' is unknown"):
        _ = Shape("q7", (3,)).bytes


def _collective(groups: str, opcode: str = "all-gather") -> Instruction:
    key = "source_target_pairs" if opcode == "collective-permute" else "replica_groups"
    return Instruction("c", opcode, (), (), "", f", {key}={groups}, x=y", False)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3),)),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_replica_groups(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert replica_groups(_collective(text), 4) == groups


def test_the_groups_of_a_permute_are_its_rings_and_chains() -> None:
    permute = _collective("{{0,1},{1,0},{4,5},{3,4},{6,6}}", "collective-permute")
    assert sorted(replica_groups(permute, 8)) == [(0, 1), (3, 4, 5), (6,)]


@pytest.mark.parametrize("text", ["[3,2]<=[4]", "ring(4)", "mesh['a'=2] {'c'}"])
def test_groups_of_no_known_form_are_an_error(text: str) -> None:
    with pytest.raises(HloError, match="all-gather 'c': "):
        replica_groups(_collective(text), 4)


BODY = "jit(step)/transpose(jvp(decoder))/while/body/closed_call/checkpoint"


@pytest.mark.parametrize(
    ("path", "scope", "phase"),
    [
        ("jit(step)/jvp(decoder.moe.experts.up)/dot_general", "decoder.moe.experts.up", "forward"),
        (f"{BODY}/rematted_computation/moe/combine/mul", "decoder.moe.combine", "recompute"),
        (f"{BODY}/moe.combine_all_to_all/all_to_all", "decoder.moe.combine_all_to_all", "backward"),
        ("jit(step)/experts.parameters.all_gather/all_gather", "experts.parameters.all_gather", "forward"),
        ("jit(step)/decoder.moe.router/cond/branch_1_fun/logits.loss/add", "logits.loss", "forward"),
        ("jit(step)/optimizer/mul", "", "forward"),
        ("", "", "forward"),
    ],
)
def test_a_path_of_names_gives_scope_and_phase(path: str, scope: str, phase: str) -> None:
    assert (scope_of(path), phase_of(path)) == (scope, phase)


def test_merged_names_are_several_paths() -> None:
    name = "jit(g)/(jvp(logits.loss)/sum:transpose(jvp(decoder.ffn.up))/dot_general)/x"
    assert paths(name) == ("jit(g)/jvp(logits.loss)/sum/x", "jit(g)/transpose(jvp(decoder.ffn.up))/dot_general/x")
    assert scopes_of(name) == ("logits.loss", "decoder.ffn.up") and phase_of(name) == "backward"


def _module(entry: str, before: str = "") -> str:
    return f"HloModule m, num_partitions=4\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n{entry}\n}}\n"


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A 3x3 window over 4x4, 2 features in, 5 out, batch 1: (2 + 3 + 3 + 2)^2 places fall on no padding.
        ("f32[1,4,4,5] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
         2 * 2 * 5 * 100),
        # XLA:TPU's batched product over holes: 3 batches, of every window of 3 one place is real.
        ("f32[3,2,5] convolution(%c, %d), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
         2 * 3 * 2 * 4 * 5),
        ('f32[6,5] custom-call(%e, %f), custom_call_target="__onednn$matmul"', 2 * 6 * 4 * 5),
        ('f32[2,3,5] custom-call(%c2, %g), custom_call_target="__onednn$matmul"', 2 * 2 * 3 * 4 * 5),
        ("f32[6,5] ragged-dot(%e, %h), lhs_contracting_dims={1}, rhs_contracting_dims={1}", 2 * 6 * 4 * 5),
        ("f32[6,4] add(%e, %e)", 0),
    ],
)  # fmt: skip
def test_flops_of_one_product(line: str, flops: int) -> None:
    shapes = {"a": "1,4,4,2", "b": "3,3,2,5", "c": "3,2,4", "c2": "2,3,4", "d": "3,4,5", "e": "6,4", "f": "4,5",
              "g": "2,4,5", "h": "3,4,5"}  # fmt: skip
    rows = [f"  %{name} = f32[{dims}]{{0}} parameter({k})" for k, (name, dims) in enumerate(shapes.items())]
    entry = parse_module(_module("\n".join([*rows, f"  ROOT %r = {line}"]))).computation("main")
    assert product_flops(entry, entry.root) == flops


LOOP = """
%cond (s: (s32[], f32[2,2], s32[])) -> pred[] {
  %s = (s32[], f32[2,2], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=DIRECTION
}

%body (s.1: (s32[], f32[2,2], s32[])) -> (s32[], f32[2,2], s32[]) {
  %s.1 = (s32[], f32[2,2], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %step = s32[] constant(STEP)
  %next = s32[] add(%i.1, %step)
  %x = f32[2,2] get-tuple-element(%s.1), index=1
  %y = f32[2,2] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %n.1 = s32[] get-tuple-element(%s.1), index=2
  ROOT %t = (s32[], f32[2,2], s32[]) tuple(%next, %y, %n.1)
}
"""
ENTRY = """
  %p = f32[2,2] parameter(0)
  %first = s32[] constant(FIRST)
  %last = s32[] constant(LAST)
  %made = (s32[], f32[2,2], s32[]) tuple(%first, %p, %last)
  ROOT %w = (s32[], f32[2,2], s32[]) while(%made), condition=%cond, body=%body
"""


@pytest.mark.parametrize(
    ("first", "last", "step", "direction", "count"),
    [(0, 7, 1, "LT", 7), (0, 7, 2, "LT", 4), (3, 7, 1, "LE", 5), (7, 0, -1, "GT", 7), (0, 6, 3, "NE", 2),
     (5, 5, 1, "LT", 0)],
)  # fmt: skip
def test_a_loop_whose_bound_is_in_its_state(first: int, last: int, step: int, direction: str, count: int) -> None:
    text = _module(ENTRY, LOOP).replace("FIRST", str(first)).replace("LAST", str(last))
    text = text.replace("STEP", str(step)).replace("DIRECTION", direction)
    assert executed_flops(parse_module(text)).total == count * 2 * 2 * 2 * 2


GOOD = _module("  ROOT %p = f32[] parameter(0)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line begins with 'HloModule'"),
        ("HloModule m\n", "module m has no ENTRY"),
        (GOOD.replace("}\n", ""), "ends inside computation 'main'"),
        (GOOD.replace("  ROOT", "  what is this\n  ROOT"), "line 5 is no HLO instruction: 'what is this'"),
        (GOOD.replace("parameter(0)", "parameter(0"), "line 5: brackets do not match"),
        (_module("  ROOT %d = f32[2] dot(%a, %b), lhs_contracting_dims={0}"), "dot 'd' reads 'a', which is not there"),
        (_module("  ROOT %c = f32[] call(), to_apply=%gone"), "computation 'gone' is called, but is not in module 'm'"),
        (_module("  ROOT %c = f32[] call(), to_apply=%main"), "computation 'main' calls itself"),
        (_module("  %p = f32[2] parameter(0)\n  ROOT %c = f32[2] all-reduce(%p), replica_groups=nonsense"),
         "all-reduce 'c': replica_groups='nonsense' is of no known form"),
        (_module("  %p = f32[2] parameter(0)\n  ROOT %d = f32[2] dot(%p, %p), lhs_contracting_dims={4}"),
         "dot 'd': its attributes do not fit its shapes"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read_is_an_error_that_says_where(text: str, message: str) -> None:
    with pytest.raises(HloError) as error:
        collectives(parse_module(text)), executed_flops(parse_module(text))
    assert message in str(error.value) and "\n" not in str(error.value)


SAVED = (DATA / "v3_moe_async.txt").read_text(encoding="utf-8")


@given(cut=st.integers(0, len(SAVED)), length=st.integers(0, 300), put=st.text('{}()[]=,%"0 x\n', max_size=3))
def test_a_damaged_text_is_read_or_refused_but_breaks_nothing(cut: int, length: int, put: str) -> None:
    with contextlib.suppress(HloError):
        read_text(SAVED[:cut] + put + SAVED[cut + length :], "tpu")


def test_a_custom_call_that_may_multiply_is_named() -> None:
    text = _module('  ROOT %k = f32[] custom-call(), custom_call_target="tpu_custom_call"')
    assert executed_flops(parse_module(text)).uncounted == {"tpu_custom_call k": 1}


def test_a_kernel_in_a_loop_is_named_with_how_often_it_runs() -> None:
    kernel = '%y = f32[2,2] custom-call(%x), custom_call_target="tpu_custom_call"'
    dot = "%y = f32[2,2] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    text = _module(ENTRY, LOOP).replace(dot, kernel).replace("FIRST", "0").replace("LAST", "7")
    text = text.replace("STEP", "1").replace("DIRECTION", "LT")
    assert executed_flops(parse_module(text)).uncounted == {"tpu_custom_call y": 7}


def test_the_total_of_a_memory_report_is_that_of_the_default_space() -> None:
    spaces = {"hbm (color=3)": 5, "default (color=0)": 70, "vmem (color=1)": 6}
    report = "\n".join(f"Memory Space: {space}\nTotal bytes: {n} ({n}B)\n  cumulative" for space, n in spaces.items())
    assert report_total(report) == 70
    with pytest.raises(HloError, match="no block 'Memory Space: default'"):
        report_total("Memory Space: vmem (color=1)\nTotal bytes: 5 (5B)\n")


def test_peak_memory_of_a_tpu_program_needs_the_report() -> None:
    class Compiled:
        argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 1
        temp_size_in_bytes = generated_code_size_in_bytes = peak_memory_in_bytes = 2

        def memory_analysis(self) -> Any:
            return self

    assert peak_memory(Compiled(), "cpu") == Memory(1, 1, 1, 2, 2, 2, "peak_memory_in_bytes", 1 + 1 - 1 + 2)
    with pytest.raises(HloError, match="memory-usage report"):
        peak_memory(Compiled(), "tpu")
