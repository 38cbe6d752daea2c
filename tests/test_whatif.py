"""What if: comparisons that add up, grids equal to single forecasts, elasticities that obey scaling, sizes by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import load_chip, resolve_cluster
from hw_profiles.overrides import quantities
from hw_profiles.yaml_reader import read_yaml
from simulator.analysis.attribution import NOT_BY_OP, attribute
from simulator.analysis.forecast import forecast, forecast_on
from simulator.job.load import load_job
from simulator.planner.largest import largest
from simulator.planner.sensitivity import kind_of, sensitivity
from simulator.planner.sizes import Asked, sweep
from simulator.planner.what_if import Question

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MIXTRAL = ROOT / "examples" / "mixtral-8x7b.yaml"
DEEPSEEK = ROOT / "examples" / "deepseek-v3.yaml"
Call = Callable[..., tuple[int, str, str]]


def question(path: Path) -> Question:
    return Question(read_yaml(path), folder=path.parent, name=path.stem)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_ops_make_up_the_parts_of_a_closed_form_without_a_rest(path: Path) -> None:
    """Op times are added up independently of the formula's parts: nothing may be left that is not by op."""
    job = load_job(path)
    cluster = resolve_cluster(job.cluster)
    answer = forecast_on(job, cluster, "test")
    rows = attribute(job, cluster, answer)
    assert sum(r.seconds for r in rows) == pytest.approx(answer.step_time_s, rel=1e-12)
    left = [r for r in rows if r.name == NOT_BY_OP or r.part == "rest"]
    assert len(left) == 4 and all(abs(r.seconds) < 1e-9 * answer.step_time_s for r in left)


@pytest.mark.parametrize("engine", ["closed-form", "events"])
def test_a_comparison_adds_up_and_turns_round(call: Call, engine: str) -> None:
    change = ["--engine", engine, "--json"]
    one = json.loads(call("compare", DEEPSEEK, "--set-b", "plan.expert=32", *change)[1])
    other = json.loads(call("compare", DEEPSEEK, "--set-a", "plan.expert=32", "--set-b", "plan.expert=64", *change)[1])
    for key in ("parts", "rows"):
        assert sum(r["difference_s"] for r in one[key]) == pytest.approx(one["difference_s"], rel=1e-9)
    assert other["difference_s"] == -one["difference_s"] != 0
    assert one["changed"] == [{"field": "plan.expert", "a": 64, "b": 32}]


def test_cells_are_the_forecasts_of_the_changed_jobs_and_refusals_stay(call: Call, tmp_path: Path) -> None:
    table = tmp_path / "cells.parquet"
    axes = ["--vary", "plan.expert=32,48", "--vary", "cluster.chip.nic_bandwidth=*1,*2"]
    code, out, _ = call("whatif", DEEPSEEK, *axes, "-o", table, "--json")
    cells = json.loads(out)["cells"]
    assert code == 0 and [c["refused"] is None for c in cells] == [True, True, False, False]
    assert "expert = 48" in cells[2]["refused"]
    wanted = load_job(DEEPSEEK, ["plan.expert=32", "cluster.chip.scale_out.nic_gb_per_s=x2"])
    assert cells[1]["step_time_s"] == forecast(wanted, engine="closed-form").step_time_s < cells[0]["step_time_s"]
    import pyarrow.parquet as parquet

    read = parquet.read_table(table).to_pylist()
    assert [r["step_time_s"] for r in read] == [c["step_time_s"] for c in cells]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vary", "plan.exprt=1"], "did you mean 'expert'"),
        (["--vary", "cluster.chip.hbm_bandwith=1"], "did you mean 'hbm_bandwidth'"),
        (["--vary", "plan.expert=*x"], "--vary"),
        (["--vary", f"batch.sequences={','.join(map(str, range(1, 999)))}", "--vary",
          f"model.vocab={','.join(map(str, range(1, 99)))}"], "97,804 cells; at most 10,000"),
        (["--vary", "plan.expert=7"], "no cell of 1 keeps the rules"),
        ([], "say what to vary"),
    ],
)  # fmt: skip
def test_a_bad_grid_is_one_line(call: Call, arguments: list[str], said: str) -> None:
    code, out, error = call("whatif", DEEPSEEK, *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1) and said in error


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_rates_and_latencies_scaled_together_scale_the_step(path: Path) -> None:
    """All rates times s, all latencies over s: exactly 1/s of the step; so elasticities sum to -1 but for kinks."""
    asked = question(path)
    job = asked.job()
    chip = resolve_cluster(job.cluster).chip
    step = asked.forecast().step_time_s
    factor = {"rate": 1.5, "latency": 1 / 1.5}
    numbers = {n: q.value * factor[kind_of(n)] for n, q in quantities(chip) if kind_of(n) in factor and q.value}
    if chip.kind == "gpu" or chip.kind == "tpu":
        # An all-to-all on a torus has 1 us a hop that stands in network/collectives.py and in no profile.
        fixed = resolve_cluster(job.cluster).torus is not None and job.model.moes and job.plan.expert > 1
        miss = 2e-4 if fixed else 1e-9
        assert asked.forecast(numbers=numbers).step_time_s == pytest.approx(step / 1.5, rel=miss)
    found = sensitivity(asked)
    assert found.rates - found.latencies == pytest.approx(-1, abs=3e-3)
    assert all(w.elasticity is not None or w.refused for w in found.weights)
    assert all(w.speed_up is None or w.speed_up >= 1 - 1e-12 for w in found.weights if w.kind in ("rate", "latency"))


def _asked(tokens: float, days: float, budget: float | None = None) -> Asked:
    data = {"model": "mixtral-8x7b", "batch": {"sequences": 256, "length": 4096}}
    return Asked(data, (), ROOT, "mixtral", tokens, days, budget, "on_demand")


def test_the_fewest_chips_in_time_by_hand() -> None:
    points = sweep(_asked(1e11, 10), "h100-sxm", None)
    times = [(p.chips, p.in_time) for p in points]
    first = next(i for i, p in enumerate(points) if p.in_time)
    assert all(not late for _, late in times[:first]) and len(points) == first + 2
    p = points[first]
    assert p.days is not None and p.days <= 10
    steps = 1e11 / (256 * 4096)
    assert p.days == pytest.approx(steps * p.phases[0].step_time_s / 86400)
    price = next(x for x in load_chip("h100-sxm").prices if x.terms == "on_demand")
    assert p.usd["on_demand"] == pytest.approx(price.usd_per_chip_hour * p.chips * p.days * 24)
    # Its plan is a job that `forecast` answers alike.
    job = load_job(
        {"model": "mixtral-8x7b", "batch": {"sequences": 256, "length": 4096},
         "cluster": {"chip": "h100-sxm", "nodes": p.chips // 8}}, p.phases[0].overrides
    )  # fmt: skip
    answer = forecast(job, engine="closed-form")
    assert answer.memory.fits and answer.step_time_s == pytest.approx(p.phases[0].step_time_s, rel=1e-9)


def test_a_budget_without_a_price_says_how_to_give_one(tmp_path: Path, call: Call) -> None:
    with pytest.raises(QuestionError, match=r"no on_demand price for h800; give one with --prices FILE"):
        sweep(_asked(1e11, 10, 1e6), "h800", None)
    code, _, said = call("size", "mixtral-8x7b", "--tokens", "1e30", "--days", "1")
    assert code == 2 and "needs" in said
    bad = tmp_path / "p.yaml"
    bad.write_text("prices: [{chip: h8000, usd_per_chip_hour: 2, date: 2026-01}]")
    code, _, said = call("size", "mixtral-8x7b", "--tokens", "1e11", "--days", "10", "--prices", bad)
    assert code == 2 and "did you mean" in said


@pytest.mark.parametrize(("what", "field", "unit"), [("sequence", "batch.length", 1024), ("microbatch", None, 0)])
def test_one_more_than_the_largest_does_not_fit(what: str, field: str | None, unit: int) -> None:
    number = largest(load_job(MIXTRAL), what)
    if field is not None:
        for n, fits in ((number, True), (number + unit, False)):
            job = load_job(MIXTRAL, [f"{field}={n}"])
            assert forecast(job, engine="closed-form").memory.fits is fits
    else:
        assert forecast(load_job(MIXTRAL, [f"plan.microbatch_sequences={number}"]), engine="closed-form").memory.fits
