"""The parts that read a compiled program: shapes, groups, names, products, loops, memory; and texts that are broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.hlo import HloError, Memory, collectives, executed_flops, parse_module, peak_memory, read_text
from trainer.hlo_flops import product_flops
from trainer.hlo_groups import replica_groups
from trainer.hlo_memory import report_total
from trainer.hlo_scopes import paths, phase_of, scope_of, scopes_of
from trainer.hlo_text import Instruction, Shape, parse_shapes

# Shapes and groups


def test_shapes_are_read_with_their_layouts_and_know_their_bytes() -> None:
    assert parse_shapes("(bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, token[], s4[3]{0}, f32[], pred[<=7])") == (
        Shape("bf16", (8, 16), "{1,0:T(8,128)(2,1)S(1)}"), Shape("token", ()), Shape("s4", (3,), "{0}"),
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


# Names

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


# Products and loops


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


def _loop(**said: int | str) -> str:
    """A product in a loop `for (i = first; i DIRECTION last; i += step)`."""
    text = _module(ENTRY, LOOP)
    for name, value in said.items():
        text = text.replace(name.upper(), str(value))
    return text


@pytest.mark.parametrize(
    ("first", "last", "step", "direction", "count"),
    [(0, 7, 1, "LT", 7), (0, 7, 2, "LT", 4), (3, 7, 1, "LE", 5), (7, 0, -1, "GT", 7), (0, 6, 3, "NE", 2),
     (5, 5, 1, "LT", 0)],
)  # fmt: skip
def test_a_loop_whose_bound_is_in_its_state(first: int, last: int, step: int, direction: str, count: int) -> None:
    text = _loop(first=first, last=last, step=step, direction=direction)
    assert executed_flops(parse_module(text)).total == count * 2 * 2 * 2 * 2


def test_a_custom_call_that_may_multiply_is_named() -> None:
    text = _module('  ROOT %k = f32[] custom-call(), custom_call_target="tpu_custom_call"')
    assert executed_flops(parse_module(text)).uncounted == {"tpu_custom_call k": 1}


def test_a_kernel_in_a_loop_is_named_with_how_often_it_runs() -> None:
    kernel = '%y = f32[2,2] custom-call(%x), custom_call_target="tpu_custom_call"'
    dot = "%y = f32[2,2] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    text = _loop(first=0, last=7, step=1, direction="LT")
    assert dot in text
    text = text.replace(dot, kernel)
    assert executed_flops(parse_module(text)).uncounted == {"tpu_custom_call y": 7}


# Memory


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


# Broken texts

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


SAVED = (Path(__file__).parent / "data/hlo/v3_moe_async.txt").read_text(encoding="utf-8")


@given(cut=st.integers(0, len(SAVED)), length=st.integers(0, 300), put=st.text('{}()[]=,%"0 x\n', max_size=3))
def test_a_damaged_text_is_read_or_refused_but_breaks_nothing(cut: int, length: int, put: str) -> None:
    said = ""
    try:
        read_text(SAVED[:cut] + put + SAVED[cut + length :], "tpu")
    except HloError as error:
        said = str(error)
    assert "\n" not in said
