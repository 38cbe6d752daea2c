"""Units, the HTML page and the terminal, on hand-made forecasts: sparse, dense, 16 stages, without a price."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moecast.terminal import forecast_table, print_comparison, print_forecast
from reports import figures, page, units
from reports.draw import plotly_js
from reports.parts import MEMORY_PARTS, TIME_PARTS, memory_parts, plan_line, time_parts
from simulator.results.forecast import (
    AllToAll,
    Collective,
    Cost,
    Evidence,
    Flops,
    Forecast,
    JobSummary,
    Memory,
    OpRow,
    Parts,
    Routing,
    StageMemory,
)

GIB = 2.0**30
EVIL = "<script>alert(1)</script> & [bold]\x1b[31m'\""


def stage(index: int, scale: float, layers: int, in_flight: int) -> StageMemory:
    return StageMemory(
        stage=index,
        layers=layers,
        microbatches_in_flight=in_flight,
        parameters_bytes=2.1 * scale * GIB,
        gradients_bytes=2.1 * scale * GIB,
        optimizer_bytes=0.35 * scale * GIB,
        activations_bytes=4.4 * scale * GIB,
        dispatch_bytes=0.8 * scale * GIB,
        gathered_weights_bytes=0.0,
        collective_buffers_bytes=0.3 * scale * GIB,
        workspace_bytes=0.2 * scale * GIB,
        reserve_bytes=0.26 * scale * GIB,
    )


def switch() -> Forecast:
    """Switch-Base-128 on 32 TPU v3 cores: fits, priced, one stage."""
    step = 2.345
    ops = (
        ("moe.experts", 0.31, "compute", 11e12),
        ("attention.scores", 0.14, "memory", 1.2e12),
        ("mlp.in", 0.12, "compute", 4.9e12),
        ("moe.dispatch_einsum", 0.11, "memory", 0.8e12),
        ("router.softmax", 0.02, "memory", 0.0),
        ("optimizer.update", 0.05, "memory", 1e11),
    )
    rows = tuple(
        OpRow(f"{side}.{name}", phase, 6.0 * 64, flops * k, 2e11 * k, time_s * k, bound)
        for side in ("encoder", "decoder")
        for phase, k in (("forward", 0.3), ("backward", 0.7))
        for name, time_s, bound, flops in ops
    )
    plan = {"data": 32, "tensor": 1, "expert": 32, "sequence_parallel": False, "shard": "none", "schedule": "1f1b"}
    job = JobSummary(
        name="switch-base-128", hash="3f9a" * 16, model="switch-base-128", total_parameters=7.41e9,
        active_parameters=2.23e8, cluster="tpu-v3-32", chip="tpu-v3", devices=32, chips=16,
        plan=plan | {"microbatch_sequences": 64, "stages": None, "placement": None}, sequences=2048,
        tokens_per_step=1_282_048.0, precision="bf16", optimizer="adafactor", remat="none",
        capacity="factor 1.25 of tokens, groups of 8192", dispatch="slots over collective", stack="t5x",
    )  # fmt: skip
    a2a = Collective("decoder.moe.dispatch_all_to_all", "all-to-all", 32, 36.0, 9.2e9, 0.235, 0.205, "ici")
    evidence = Evidence(
        "tpu-v3 of 2025-01", "data sheet only, not calibrated", "bf16", 61.5e12,
        ("matmul efficiency: compiler's estimated cycles", "links: vendor's data sheet", "interval: held-out rows"),
        ("decoder attention is extrapolated beyond the measured shapes by more than a factor of four",),
    )  # fmt: skip
    return Forecast(
        job=job, engine="closed-form", step_time_s=step, step_time_interval_s=(2.1, 2.75),
        interval_meaning="80 % of held-out residuals", sequences_per_s=2048 / step, tokens_per_s=1_282_048 / step,
        tokens_per_s_per_device=1_282_048 / step / 32, mfu=0.183, hfu=0.247,
        flops=Flops(8.7e14, 3.7e13, 6.8e8, 1.4e11, "attention halved where causal; logits counted", {}),
        memory=Memory(16 * GIB, (stage(0, 1.0, 24, 1),), 4.5 * GIB, "total of XLA's memory-usage report"),
        parts=Parts(1.52, 0.41, 0.12, 0.015, 0.28, 0.0), all_to_all=AllToAll(0.47, 0.41, 18.4e9),
        collectives=(
            a2a,
            replace(a2a, scope="decoder.moe.combine_all_to_all"),
            Collective("gradients.all_reduce", "all-reduce", 32, 1.0, 0.9e9, 0.19, 0.12, "ici"),
        ),
        ops=rows, routing=Routing("chance", 0.0123, 1.31), evidence=evidence,
        cost=Cost(0.0104, 8.13, 2.0, 16, "on-demand", "price sheet", "2025-01-01", 0.0021),
    )  # fmt: skip


def giant() -> Forecast:
    """A 671B model on 2,048 GPUs in 16 stages: does not fit, no price known."""
    base = switch()
    job = replace(
        base.job, name="deepseek-v3 on 2,048 GPUs with expert 64 and pipeline 16", model="deepseek-v3",
        cluster="h800-256n", chip="h800", devices=2048, chips=2048, total_parameters=6.71e11, active_parameters=3.7e10,
        sequences=15360, tokens_per_step=62_914_560.0, precision="fp8-blockwise", optimizer="adamw",
        plan={"data": 128, "pipeline": 16, "expert": 64, "schedule": "dualpipe", "shard": "optimizer",
              "stages": [4, 4, 4, 4], "placement": {"expert": "rail"}, "sequence_parallel": True},
    )  # fmt: skip
    stages = tuple(stage(i, 9.4 - 0.35 * i, 4 if i else 3, 17 - i) for i in range(16))
    return replace(
        base, job=job, engine="events", step_time_s=21.7, step_time_interval_s=(20.1, 24.9),
        sequences_per_s=15360 / 21.7, tokens_per_s=62_914_560 / 21.7, tokens_per_s_per_device=62_914_560 / 21.7 / 2048,
        mfu=0.214, hfu=0.301, memory=Memory(80 * GIB, stages, 40 * GIB, "allocator's peak plus a stated reserve"),
        parts=Parts(15.2, 2.9, 0.7, 0.05, 1.2, 1.65), all_to_all=AllToAll(9.8, 2.9, 611e9),
        cost=Cost(None, None, None, 2048, None, "no public price of this chip", None, None),
        evidence=replace(base.evidence, profile="h800 of 2025-01", peak_flops_per_s=989e12, warnings=()),
    )  # fmt: skip


def dense() -> Forecast:
    """A dense model on one device: no all-to-all, no collectives, no ops listed, microseconds."""
    base = switch()
    return replace(
        base, job=replace(base.job, name="tiny dense", cluster="cpu-host", chip="cpu", devices=1, chips=1, plan={}),
        step_time_s=4.2e-4, step_time_interval_s=(4.2e-4, 4.2e-4), parts=Parts(4.2e-4, 0, 0, 0, 0, 0),
        all_to_all=AllToAll(0.0, 0.0, 0.0), collectives=(), ops=(), routing=Routing("none", 0.0, 1.0),
        memory=Memory(64 * GIB, (stage(0, 0.001, 2, 1),), 0.0, "peak that XLA reports on CPU"),
        cost=Cost(None, None, None, 1, None, "", None, None),
        evidence=replace(base.evidence, rests_on=(), warnings=(), peak_dtype="fp32", peak_flops_per_s=1.2e12),
    )  # fmt: skip


THREE = (switch(), giant(), dense())


def own_html(forecasts: tuple[Forecast, ...], title: str = "Three jobs") -> str:
    """The page without Plotly's own code."""
    return page.render(forecasts, title).replace(plotly_js(), "")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (units.seconds(2.345), "2.35 s"),
        (units.seconds(0.9999), "1.00 s"),
        (units.seconds(4.2e-4), "420 µs"),
        (units.seconds(0), "0 s"),
        (units.seconds(300), "300 s"),
        (units.seconds(7200), "120 min"),
        (units.seconds(86400), "24.0 h"),
        (units.seconds(float("nan")), "n/a"),
        (units.seconds_range(0.98, 1.25), "0.980 to 1.25 s"),
        (units.memory(14.14 * GIB), "14.1 GiB"),
        (units.memory(0), "0 B"),
        (units.memory_of(92 * GIB, 80 * GIB), "92.0 of 80.0 GiB"),
        (units.memory_of(10 * 2**20, 64 * GIB), "10.0 MiB of 64.0 GiB"),
        (units.traffic(18.4e9), "18.4 GB"),
        (units.flops(8.7e14), "870 TFLOP"),
        (units.flops_rate(989e12), "989 TFLOP/s"),
        (units.count(98304), "98,304"),
        (units.count(7.41e9), "7.41 B"),
        (units.count(0.5), "0.500"),
        (units.rate(17085.4, "tokens"), "17,085 tokens/s"),
        (units.rate(546_715_000, "tokens"), "547 M tokens/s"),
        (units.percent(0.183), "18.3 %"),
        (units.percent(0.0005), "0.05 %"),
        (units.percent(1e-6), "< 0.01 %"),
        (units.percent(0), "0 %"),
        (units.dollars(8.13), "$8.13"),
        (units.dollars(0.01234), "$0.0123"),
        (units.dollars(1234.5), "$1,234"),
        (units.dollars(2.35e6), "$2.35 M"),
    ],
)
def test_units(said: str, expected: str) -> None:
    assert said == expected


def test_parts_are_those_of_the_record() -> None:
    f = giant()
    assert sum(v for _, v in time_parts(f)) == pytest.approx(f.step_time_s)
    for s in f.memory.by_stage:
        assert sum(v for _, v in memory_parts(s)) == pytest.approx(s.peak_bytes)
    assert len(figures.MEMORY_COLOURS) == len(MEMORY_PARTS)
    assert len(figures.TIME_COLOURS) == len(TIME_PARTS)


def test_plan_line_says_what_is_on() -> None:
    assert plan_line(switch().job.plan) == "data 32, expert 32, microbatch sequences 64"
    assert plan_line({}) == "no parallelism"


def test_page_has_every_figure_and_table() -> None:
    text = own_html(THREE)
    expected = [f"compare-{n}-figure" for n in ("step", "tokens", "mfu", "memory", "time")]
    for job in ("job1", "job2"):
        expected += [f"{job}-{n}-figure" for n in ("time", "ops", "roofline", "memory", "collectives")]
    expected += ["job3-time-figure", "job3-memory-figure"]
    assert re.findall(r'<div id="([^"]+)" class="plotly-graph-div"', text) == expected
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) == len(re.findall(r'\bid="([^"]+)"', text))
    assert text.count("<table") == 1 + 9 + 9 + 6
    for said in (
        "Where the time goes",
        "What this rests on",
        "2.35 s",
        "2.10 to 2.75 s",
        "DOES NOT FIT",
        "no public price",
        "61.5 TFLOP/s",
    ):
        assert said.lower() in text.lower(), said
    # One job has no comparison.
    assert 'id="compare' not in own_html((switch(),))


def test_page_escapes_what_users_write() -> None:
    evil = switch()
    evil = replace(
        evil,
        job=replace(evil.job, name=EVIL, plan={EVIL: [EVIL]}),
        ops=tuple(replace(op, scope=EVIL, phase=EVIL, bound=EVIL) for op in evil.ops),
        collectives=tuple(replace(c, scope=EVIL) for c in evil.collectives),
        evidence=replace(evil.evidence, warnings=(EVIL,), rests_on=(EVIL,), peak_dtype=EVIL),
        cost=replace(evil.cost, terms=EVIL),
    )
    text = own_html((evil, evil), title=EVIL)
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    for label in figures.compare_mfu([evil, evil]).layout.yaxis.ticktext:
        assert "<" not in label


def test_page_is_the_same_every_time_and_small(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page.write_html(THREE, path, "Three jobs")
    first = path.read_bytes()
    code = (
        f"from tests.test_reports import THREE, page, Path\npage.write_html(THREE, Path({str(path)!r}), 'Three jobs')"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."},
    )
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
    assert len(first) < 5_000_000


def test_page_asks_nothing_of_the_network() -> None:
    text = own_html(THREE)
    assert not re.search(r"""(src|href|action|data|poster)\s*=\s*["']?\s*(https?:|//|[^#"'>]*\.(js|css))""", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        page.write_html((dense(),), path, "x")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_page_needs_a_forecast(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one forecast"):
        page.write_html((), tmp_path / "page.html", "x")


def test_long_tails_are_summed_up() -> None:
    f = switch()
    f = replace(
        f,
        ops=tuple(replace(f.ops[0], scope=f"decoder.layer{i}.mlp") for i in range(300)),
        collectives=f.collectives * 30,
    )
    text = own_html((f,))
    assert "260 more" in text
    assert "50 more" in text
    assert len(text) < 80_000


def test_memory_figure_shows_all_stages_and_the_capacity() -> None:
    figure = figures.memory_by_stage(giant())
    assert list(figure.layout.yaxis.ticktext) == [f"stage {i}" for i in range(16)]
    assert figure.layout.shapes[0].x0 == 80
    assert figure.layout.xaxis.range[1] > giant().memory.peak_bytes / GIB
    assert figures.memory_by_stage(dense()).layout.xaxis.title.text == "memory per device (GiB)"


def test_every_axis_of_values_names_its_unit() -> None:
    made = [
        figures.time_breakdown(THREE),
        figures.top_ops(switch()),
        figures.collectives(switch()),
        figures.compare_step_time(THREE),
    ]
    for figure in made:
        assert figure is not None
        assert re.search(r"\((s|ms|µs)\b", figure.layout.xaxis.title.text)
    assert figures.top_ops(dense()) is None
    assert figures.roofline(dense()) is None
    assert figures.collectives(dense()) is None


def printed(forecasts: tuple[Forecast, ...], width: int = 80, encoding: str = "utf-8") -> str:
    """What a terminal of that width shows; several forecasts as a comparison."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=out, width=width, color_system=None)
    if len(forecasts) == 1:
        print_forecast(forecasts[0], console)
    else:
        print_comparison(forecasts, console)
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("forecast", THREE, ids=["switch", "giant", "dense"])
def test_terminal_lines_stay_within_the_width(forecast: Forecast, width: int) -> None:
    lines = printed((forecast,), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 45


def test_terminal_says_first_what_does_not_fit() -> None:
    assert printed((giant(),)).splitlines()[0].startswith("DOES NOT FIT: stage 0 needs 98.8 of 80.0 GiB (123.5 %)")
    assert printed((switch(),)).splitlines()[0] == "switch-base-128"
    assert printed(THREE).splitlines()[0].startswith("1 of 3 DO NOT FIT: deepseek-v3")
    coloured = io.StringIO()
    console = Console(file=coloured, width=80, force_terminal=True, color_system="standard")
    console.print(forecast_table(giant(), 80))
    assert coloured.getvalue().startswith("\x1b[1;31mDOES NOT FIT")


def test_terminal_says_what_matters() -> None:
    text = printed((switch(),))
    numbers = ["2.35 s", "2.10 to 2.75 s", "873 sequences/s", "17,085 tokens/s", "18.3 %", "24.7 %", "410 ms exposed"]
    numbers += ["61.5 TFLOP/s bf16", "18.4 GB per device", "1.2 % dropped", "1.31 x the mean", "$8.13"]
    for said in (*numbers, "tpu-v3 of 2025-01", "beware", "activations"):
        assert said in " ".join(text.split()), said
    text = printed((giant(),))
    assert "no price known" in text
    assert "no public price of this chip" in text
    assert re.search(r"all-to-all\s+none", printed((dense(),)))


def test_comparison_shows_every_number_at_80_columns() -> None:
    text = printed(THREE)
    assert max(map(len, text.splitlines())) <= 80
    for said in ("2,048", "21.7 s", "420 µs", "1,416", "21.4 %", "123.5 %", "NO", "2.90 s", "none", "8.13", "unknown"):
        assert said in text, said


def test_terminal_reads_names_as_text() -> None:
    f = switch()
    evil = replace(f, job=replace(f.job, name=EVIL))
    for text in (printed((evil,)), printed((evil, evil))):
        assert "\x1b" not in text
    assert "[bold]" in printed((evil,))


def test_terminal_without_unicode() -> None:
    for forecasts in ((switch(),), (dense(),), THREE):
        assert "#" in printed(forecasts, encoding="ascii") or len(forecasts) > 1


def test_start_up_leaves_rich_and_plotly_alone() -> None:
    code = "import sys, moecast.terminal; print(sorted({'rich', 'plotly', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": "."},
    )
    assert done.stdout.strip() == "[]"
