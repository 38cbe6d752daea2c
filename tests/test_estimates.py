"""The compiler's estimates: read from a program's text, worth seconds by a clock, fitted to curves, and refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fit_estimates import as_yaml, fitted
from hw_profiles.cycles import clock_hz, cycles
from hw_profiles.errors import QuestionError
from hw_profiles.estimates import FOLDER, estimate_names, load_estimates, profile_name
from hw_profiles.loader import load_chip, resolve_cluster
from simulator.calibration.fit_estimates import fit_estimates, monotone_points
from simulator.calibration.tables import read_table
from simulator.kernels.roofline import CurveTable, Kernels
from simulator.results.measurement import Measurement
from trainer.hlo_text import HloError, parse_module

CHIPS = ("tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x")
SAVED = Path(__file__).parent / "data/hlo/v5p_estimates.txt"
V5P = "tpu-v5p"


def _read(text: str) -> dict[str, int]:
    pytest.importorskip("jax", reason="JAX is not installed (extra `train`)")
    from trainer.estimates import read_estimates

    return read_estimates(parse_module(text))


def test_cycles_are_read_by_name_from_a_scheduled_program() -> None:
    assert _read(SAVED.read_text()) == {
        "product.bf16.1x256x256x256": 7268, "product.bf16.4x128x64x256": 7414, "stream.65536": 2221,
        "launch.instruction": 6576,
    }  # fmt: skip


def test_a_name_whose_cycles_are_not_all_there_is_left_out() -> None:
    text = SAVED.read_text()
    sentinel = text.replace('"estimated_cycles":"7268"', f'"estimated_cycles":"{2**64 - 1}"')
    assert "product.bf16.1x256x256x256" not in _read(sentinel) and len(_read(sentinel)) == 3
    # A second instruction of the same name: both count, and without an estimate neither does.
    line = next(x for x in text.splitlines() if "multiply_add_fusion = " in x)
    twice = text.replace(line, line + "\n" + line.replace("multiply_add_fusion =", "again ="))
    assert _read(twice)["stream.65536"] == 2 * 2221
    assert "stream.65536" not in _read(twice.replace('"estimated_cycles":"2221"', "", 1).replace(",,", ","))


def test_an_operand_in_fast_memory_or_a_config_of_another_compiler_is_an_error() -> None:
    text = SAVED.read_text()
    with pytest.raises(HloError, match=r"fusion\.2: .* operand of product\.bf16\.1x256x256x256 into VMEM"):
        _read(
            text.replace(
                "%given_0__0_.1 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)}", "%given_0__0_.1 = bf16[1,256,256]{2,1,0:S(1)}"
            )
        )
    with pytest.raises(HloError, match="backend_config is not as XLA:TPU writes it"):
        _read(text.replace('"estimated_cycles":"7268"', '"estimated_cycles":"many"'))


def test_a_cycle_of_a_collective_is_not_passed_over() -> None:
    pytest.importorskip("jax", reason="JAX is not installed (extra `train`)")
    from trainer.estimates import silent_collectives

    text = (
        "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
        "  ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%a\n}\n"
    )
    assert silent_collectives(parse_module(text)) == ["all-reduce"]
    counted = text.replace("to_apply=%a", 'to_apply=%a, backend_config={"window_config":{"estimated_cycles":"9"}}')
    with pytest.raises(HloError, match="r: this compiler states cycles of a collective"):
        silent_collectives(parse_module(counted))


@pytest.mark.parametrize("chip", sorted(cycles()))
def test_the_clock_is_the_published_one_where_there_is_one(chip: str) -> None:
    known = cycles()[chip]
    assert 0.5e9 < clock_hz(load_chip(chip)) < 2.5e9
    if known.published_mhz:
        assert clock_hz(load_chip(chip)) == pytest.approx(known.published_mhz * 1e6, rel=0.005)


def test_a_chip_without_matrix_units_has_no_clock() -> None:
    with pytest.raises(QuestionError, match=r"h100-sxm: nobody says .*; known: tpu-v2"):
        clock_hz(load_chip("h100-sxm"))


@pytest.mark.parametrize("chip", CHIPS)
def test_the_shipped_tables_stay_below_what_the_chip_can_do(chip: str) -> None:
    """With twice or half the clock, products or streams would be outside of these bounds."""
    rows, data = read_table(FOLDER / f"{chip}.csv").rows, load_chip(chip)
    assert {r.kind for r in rows} == {"compiler-estimate"} and {r.chip for r in rows} == {chip}
    peak, memory = data.device_peak_flops_per_s("bf16"), data.device_memory_bytes_per_s
    large = [r for r in rows if r.name == "product" and r.dtype == "bf16" and (r.flops or 0) > 1e11]
    assert len(large) >= 8
    assert all(0.4 < (r.flops or 0) / (r.seconds or 1) / peak < 1.1 for r in large)
    streams = [(r.bytes or 0) / (r.seconds or 1) / memory for r in rows if r.name == "stream"]
    assert 0.5 < max(streams) <= 1


@pytest.mark.parametrize("chip", CHIPS)
def test_the_shipped_tables_give_the_shipped_curves(chip: str) -> None:
    found = fitted(chip)
    assert load_estimates(chip) == found
    assert (FOLDER / f"{chip}.yaml").read_text() == as_yaml(chip, found)
    curve = found.matmul["bf16"]
    assert curve.basis == "compiler" and curve.confidence == "low" and curve.residuals is not None
    fractions = [y for _, y in curve.points]
    assert fractions == sorted(fractions)


def _table(start_s: float, share: float, fraction: float, slow: float) -> list[Measurement]:
    """Rows of a chip on which every product reaches `fraction`; per expert they take `slow` times as long."""
    chip = load_chip(V5P)
    kernels = Kernels(chip)
    common: dict[str, Any] = {
        "source": "by hand", "date": "2026-11-22", "chip": V5P, "software": "none, by hand",
        "kind": "compiler-estimate",
    }  # fmt: skip
    out = [
        Measurement(id="launch", name="launch", seconds=start_s, **common),
        Measurement(
            id="stream",
            name="stream",
            bytes=2.0**29,
            seconds=2.0**29 / (chip.device_memory_bytes_per_s * share),
            **common,
        ),
    ]
    for g, n in [(1, 1024), (1, 1536), (1, 2048), (1, 4096), (1, 8192), (1, 16384), (8, 2048), (4, 4096)]:
        flops, moved = 2.0 * g * n**3, 6.0 * g * n * n
        busy = flops * (slow if g > 1 else 1) / (kernels.peak("bf16") * fraction * float(kernels.fill(n, n, n)))
        name = "product" if g == 1 else "grouped_product"
        out.append(
            Measurement(
                id=f"{g}x{n}",
                name=name,
                seconds=busy + start_s,
                shape=(g, n, n, n),
                dtype="bf16",
                flops=flops,
                bytes=moved,
                **common,
            )
        )
    return out


def test_a_fit_finds_the_numbers_that_the_rows_were_made_of() -> None:
    found = fit_estimates(load_chip(V5P), _table(start_s=2e-6, share=0.75, fraction=0.625, slow=1.25))
    curve = found.matmul["bf16"]
    assert {y for _, y in curve.points} == {0.625} and curve.rows == 6
    assert curve.residuals == {"p10": 1.0, "p50": 1.0, "p90": 1.0}
    assert (found.memory.value, found.kernel_overhead_us.value, found.grouped_slowdown.value) == (0.75, 2.0, 1.25)


def test_points_are_medians_that_never_fall() -> None:
    assert monotone_points([(1e6, 0.1), (1e8, 0.6), (1e8, 0.2), (1e8, 0.3), (1e10, 0.9)]) == (
        (1e6, 0.1), (1e8, 0.3), (1e10, 0.9),
    )  # fmt: skip
    # The second falls below the first: both become their weighted mean.
    assert [y for _, y in monotone_points([(1e6, 0.6), (1e8, 0.3), (1e10, 0.9)])] == [0.45, 0.45, 0.9]


def test_tables_that_cannot_be_fitted_are_named() -> None:
    chip, rows = load_chip(V5P), _table(2e-6, 0.75, 0.625, 1.25)
    with pytest.raises(QuestionError, match=r"launch: a compiler-estimate row of tpu-v5p; .* of tpu-v6e"):
        fit_estimates(load_chip("tpu-v6e"), rows)
    with pytest.raises(QuestionError, match="launch: a kernel row of tpu-v5p"):
        fit_estimates(chip, [replace(rows[0], kind="kernel"), *rows[1:]])
    with pytest.raises(QuestionError, match="5 bf16 products whose arithmetic shows; 6 are needed"):
        fit_estimates(chip, [r for r in rows if r.id != "1x4096"])
    with pytest.raises(QuestionError, match="no row named launch"):
        fit_estimates(chip, rows[1:])
    with pytest.raises(QuestionError, match="no stream of 64 MiB or more"):
        fit_estimates(chip, [rows[0], *rows[2:]])
    with pytest.raises(QuestionError, match=r"streams at 1\.50 of the memory bandwidth: the clock cannot be right"):
        fit_estimates(chip, _table(2e-6, 1.5, 0.625, 1.25))


def test_a_job_chooses_the_curves_of_the_compiler() -> None:
    spec = {"chip": V5P, "slice": "2x2x1"}
    shipped, theirs = resolve_cluster(spec).chip, resolve_cluster({**spec, "curves": "compiler"}).chip
    assert resolve_cluster({**spec, "curves": "shipped"}).chip == shipped
    assert shipped.efficiency.matmul["bf16"].basis != "compiler" == theirs.efficiency.matmul["bf16"].basis
    # Formats that the compiler was not asked about take its bf16 curve, and say so.
    assert theirs.efficiency.matmul["int8"].basis == "borrowed"
    assert theirs.efficiency.matmul["int8"].points == theirs.efficiency.matmul["bf16"].points
    assert theirs.peak_tflops == shipped.peak_tflops
    assert (profile_name(shipped), profile_name(theirs)) == ("tpu-v5p as shipped", "tpu-v5p by its compiler")
    flops = 1e12
    assert CurveTable(theirs.efficiency.matmul["bf16"]).at(flops) != CurveTable(shipped.efficiency.matmul["bf16"]).at(
        flops
    )


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ({"chip": "h100-sxm", "nodes": 1, "curves": "compiler"}, "cluster.curves = compiler: h100-sxm is a GPU"),
        ({"chip": "tpu-v2", "slice": "2x2", "curves": "compiler"}, "was not asked about tpu-v2; known: tpu-v3"),
        ({"chip": V5P, "slice": "2x2x1", "curves": "compilr"}, "cluster.curves = 'compilr'"),
    ],
)  # fmt: skip
def test_curves_that_are_not_there_are_refused(spec: dict[str, Any], rule: str) -> None:
    with pytest.raises(QuestionError) as error:
        resolve_cluster(spec)
    assert rule in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "tpu:v5p:2x2x9"], 2, "target = 'tpu:v5p:2x2x9': tpu-v5p has no such slice"),
        (["--target", "cpu:8"], 2, "--target cpu:8: only the TPU compiler states cycles"),
        (
            ["--target", "tpu:v5p:2x2x1", "--chip", "tpu-v5p"],
            2,
            "nothing runs: leave --devices, --chip, --seconds and --no-collectives out",
        ),
    ],
)
def test_the_command_refuses(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-m", "moecast", "bench", *arguments, "-o", str(tmp_path / "t.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code and message in done.stderr and done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None,
    reason="libtpu, the TPU compiler, is not installed (extra `tpu`)",
)
def test_the_compiler_itself_still_says_what_the_shipped_table_says() -> None:
    """One small program, of the benchmarks' first shapes, as the command compiles them."""
    script = (
        "import json\nfrom trainer.estimates import compiled, programs, read_estimates\n"
        "from trainer.hlo_text import parse_module\nfrom trainer.targets import parse_target\n"
        "device = parse_target('tpu:v5p:2x2x1').jax_devices()[0]\n"
        "print(json.dumps(read_estimates(parse_module(compiled(next(programs()), device)))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    rows = {r.id: r.note for r in read_table(FOLDER / f"{V5P}.csv").rows}
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 7 and all(rows[key].startswith(f"{n} cycles at ") for key, n in found.items())


def test_every_chip_with_a_clock_but_the_oldest_has_curves() -> None:
    assert estimate_names() == tuple(sorted(CHIPS)) == tuple(sorted(set(cycles()) - {"tpu-v2"}))
