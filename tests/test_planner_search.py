"""The search: pruned equals exhaustive equals one by one; constraints, spaces, why not, results, and the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hw_profiles.errors import QuestionError
from simulator.job.load import load_job
from simulator.planner.answer import by_events
from simulator.planner.array_form import evaluate
from simulator.planner.constraints import parse_constraint
from simulator.planner.kept import NUMBERS
from simulator.planner.search import Search
from simulator.planner.space import Space, SpaceFile, read_space, space_of
from simulator.planner.table import FIELDS, code, get, overrides, row, with_plan
from tests.planner_draws import JOBS, load, scalar_answers

Call = Callable[..., tuple[int, str, str]]
# A job whose best plans are few and quick to find.
SMALL = {
    "model": "mixtral-8x7b",
    "cluster": {"chip": "h100-sxm", "nodes": 4},
    "batch": {"sequences": 64, "length": 2048},
    "plan": {"expert": 8, "shard": "optimizer"},
}
FEW = {"plan": {"tensor": [1, 2], "pipeline": [1, 2], "virtual_stages": 1, "schedule": "1f1b", "expert_tensor": 1}}


@pytest.fixture
def call(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """In a folder with a job and a space."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(FEW))
    return call


def _small_space(job: Any, devices: int, rng: np.random.Generator) -> Space:
    """Two or three values of some fields, one of the others."""
    experts = max((m.experts for m in job.model.moes), default=1)
    several: dict[str, list[Any]] = {
        "plan.tensor": [1, 2, 4, 8], "plan.pipeline": [1, 2, 4, 8], "plan.context": [1, 2],
        "plan.expert": [d for d in (1, 2, 4, 8) if experts % d == 0], "plan.microbatch_sequences": [1, 2, 4],
        "plan.virtual_stages": [1, 2], "plan.schedule": ["1f1b", "interleaved", "zb-h1", "dualpipe"],
        "plan.shard": ["none", "optimizer", "gradients", "parameters"], "training.remat": ["none", "selective", "full"],
        "plan.sequence_parallel": [False, True], "software.overlap.parameters": [False, True],
    }  # fmt: skip
    values = {}
    for field in FIELDS:
        known = several.get(field, [get(job, field)])
        n = min(len(known), int(rng.integers(1, 4)))
        chosen = [known[i] for i in rng.choice(len(known), n, replace=False)]
        values[field] = tuple(code(field, v) for v in chosen)
    return Space(values)


def _all_plans(space: Space) -> dict[str, Any]:
    grid = np.meshgrid(*(np.array(space.values[f]) for f in FIELDS), indexing="ij")
    return {f: g.reshape(-1) for f, g in zip(FIELDS, grid, strict=True)}


@pytest.mark.parametrize("seed", range(100))
def test_what_is_dropped_early_cannot_change_the_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    job, cluster = load(sorted(JOBS)[seed % len(JOBS)])
    space = _small_space(job, cluster.devices, rng)
    objective = "memory" if seed % 5 == 0 else "step_time"
    how = {"objective": objective, "top": int(rng.integers(1, 6))}
    refused = []
    found = []
    for exhaustive in (True, False):
        try:
            found.append(Search(job, cluster, space, exhaustive=exhaustive, **how).run())
        except QuestionError as error:
            refused.append(str(error))
    assert len(set(refused)) <= 1 and len(found) in (0, 2)
    if refused:
        return
    everything, pruned = found
    assert pruned.evaluated + pruned.pruned == everything.evaluated == everything.valid == pruned.valid
    by = NUMBERS.index("memory_peak_bytes" if objective == "memory" else "step_time_s")
    assert pruned.best.numbers[:, by] == pytest.approx(everything.best.numbers[:, by], rel=1e-12)
    assert pruned.front.numbers[:, :2] == pytest.approx(everything.front.numbers[:, :2], rel=1e-12)
    # And both are what all plans of the space say, one table without a search.
    plain = evaluate(job, cluster, _all_plans(space))
    fit = plain["ok"] & plain["fits"]
    column = plain["memory_peak_bytes" if objective == "memory" else "step_time_s"]
    assert everything.best.numbers[0, by] == pytest.approx(column[fit].min(), rel=1e-12)
    for step, memory in everything.front.numbers[:, :2]:
        assert not np.any(fit & (plain["step_time_s"] < step * (1 - 1e-9)) & (plain["memory_peak_bytes"] <= memory))


def test_the_best_is_what_the_scalar_forecast_says() -> None:
    job, cluster = load("gpt3")
    found = Search(job, cluster, space_of(job, cluster), top=3).run()
    columns = dict(zip(FIELDS, found.best.codes.T, strict=True))
    for i in range(3):
        one = scalar_answers(job, cluster, columns, i)
        assert isinstance(one, dict) and one["fits"]
        assert found.best.column("step_time_s")[i] == pytest.approx(one["step_time_s"], rel=1e-9)


def test_a_plan_set_by_its_overrides_is_the_same_plan() -> None:
    job, cluster = load("mixtral-gpu")
    found = Search(job, cluster, space_of(job, cluster), top=5).run()
    for i in range(5):
        plan = row(dict(zip(FIELDS, found.best.codes.T, strict=True)), i)
        again = load_job(JOBS["mixtral-gpu"], overrides(job, plan))
        assert again.hash == with_plan(job, plan).hash


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_peak_bytes<=70e9", None),
        ("plan.tensor <= 8", None),
        ("plan.schedule == 1f1b", None),
        ("plan.sequence_parallel=true", None),
        ("memory<=1", "unknown name 'memory'"),
        ("plan.tensr<=8", "did you mean 'plan.tensor'?"),
        ("step_time_s<=fast", "'fast' is not a finite number"),
        ("step_time_s<=nan", "is not a finite number"),
        ("plan.schedule<=2", "compare it with == or !="),
        ("plan.schedule==1f1c", "did you mean '1f1b'?"),
        ("__import__('os')", "write it as NAME<=NUMBER"),
        ("", "write it as NAME<=NUMBER"),
    ],
)
def test_constraints_are_parsed_or_say_what_is_wrong(text: str, said: str | None) -> None:
    if said is None:
        assert parse_constraint(text).name in text
    else:
        with pytest.raises(QuestionError) as error:
            parse_constraint(text)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_constraints_hold_for_all_that_is_found() -> None:
    job, cluster = load("mixtral-gpu")
    texts = ("memory_peak_bytes<=6e10", "plan.tensor<=2", "plan.shard!=none", "mfu>=0.1")
    found = Search(job, cluster, space_of(job, cluster), constraints=[parse_constraint(t) for t in texts]).run()
    columns = dict(zip(FIELDS, found.best.codes.T, strict=True))
    assert found.best.column("memory_peak_bytes").max() <= 6e10 and found.best.column("mfu").min() >= 0.1
    assert columns["plan.tensor"].max() <= 2 and columns["plan.shard"].min() > 0


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ("step_time_s<=0.001", "--constraint 'step_time_s<=0.001': no plan holds it; the nearest has"),
        ("memory_peak_bytes<=1e9", "--constraint 'memory_peak_bytes<=1e9': none of"),
        ("plan.tensor>=64", "--constraint 'plan.tensor>=64': no plan of the space holds it; nearest is 8"),
    ],
)
def test_a_constraint_that_nothing_holds_says_by_how_much(constraint: str, said: str) -> None:
    job, cluster = load("mixtral-gpu")
    with pytest.raises(QuestionError) as error:
        Search(job, cluster, space_of(job, cluster), constraints=[parse_constraint(constraint)]).run()
    assert said in str(error.value)


def test_an_objective_without_a_price_says_how_to_give_one() -> None:
    job, cluster = load("deepseek-v3")
    with pytest.raises(QuestionError, match=r"no price for h800 .* --profile"):
        Search(job, cluster, space_of(job, cluster), objective="tokens_per_usd")


def test_a_space_too_large_or_empty_says_so() -> None:
    job, cluster = load("gpt3")
    many = SpaceFile.model_validate(
        {"plan": {name: tuple(range(1, 1001)) for name in ("tensor", "pipeline", "context")}}
    )
    with pytest.raises(QuestionError, match=r"space: [\d,]{15,} plans; at most 1,000,000,000 .* plan.tensor \(1000"):
        space_of(job, cluster, many)
    with pytest.raises(QuestionError, match=r"plan\.tensor: an empty list leaves no plan"):
        space_of(job, cluster, SpaceFile.model_validate({"plan": {"tensor": ()}}))
    between = SpaceFile.model_validate({"plan": {"placement": [{"order": ["tensor", "context", "pipeline", "data"]}]}})
    assert space_of(job, cluster, between).count
    with pytest.raises(QuestionError, match="put pipeline first or last"):
        space_of(*load("mixtral-gpu"), between)
    odd = space_of(job, cluster, SpaceFile.model_validate({"plan": {"tensor": (5, 7)}}))
    with pytest.raises(QuestionError, match="no plan of the space keeps the rules; plan refused most"):
        Search(job, cluster, odd).run()


def test_a_space_file_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    for text, said in (
        ("plan: {tensors: [1]}", "plan.tensors: unknown key; did you mean 'tensor'?"),
        ("plan: {tensor: [0]}", "plan.tensor.0 = 0: must be greater than 0"),
        ("[1]", "a mapping of keys is needed"),
    ):
        path.write_text(text)
        with pytest.raises(QuestionError) as error:
            read_space(path)
        assert said in str(error.value) and str(path) in str(error.value)
    path.write_text("plan: {schedule: 1f1c}")
    job, cluster = load("gpt3")
    with pytest.raises(QuestionError, match="did you mean '1f1b'"):
        space_of(job, cluster, read_space(path))


def test_every_rejection_is_reproduced_by_its_command(call: Call) -> None:
    status, text, _ = call("plan", "job.yaml", "--search", "space.yaml", "--json", "--constraint", "step_time_s<=2.2")
    assert status == 0
    answer = json.loads(text)
    best = answer["best"][0]
    kinds = set()
    for r in answer["rejected"]:
        status, text, error = call(*shlex.split(r["command"])[1:], "--json")
        kinds.add(r["kind"])
        if r["kind"] == "rule":
            assert status == 2 and r["said"] in error
            continue
        assert status == 0
        one = json.loads(text)
        if r["kind"] == "memory":
            over = one["memory"]["peak_bytes"] - one["memory"]["capacity_bytes"]
            assert over > 0 and over == pytest.approx(r["by"])
        else:
            assert one["memory"]["fits"]
            more = one["step_time_s"] - best["closed_form_step_time_s"]
            if r["kind"] == "constraint":
                assert one["step_time_s"] - 2.2 == pytest.approx(r["by"])
            else:
                assert more == pytest.approx(r["by"], abs=1e-9) and more >= -1e-9
    assert {"rule", "memory", "cost"} <= kinds


def test_the_answer_has_what_its_readers_expect(call: Call) -> None:
    status, text, _ = call("plan", "job.yaml", "--search", "space.yaml", "--json", "--engine-top", "2", "--top", "4")
    assert status == 0
    answer = json.loads(text)
    assert {"searched", "feasible", "seconds", "best", "pareto", "rejected", "version", "pruned"} <= set(answer)
    assert [p["engine"] for p in answer["best"]] == ["events", "events", "closed-form", "closed-form"]
    assert {"plan", "step_time_s", "memory_peak_bytes", "usd_per_1b_tokens"} <= set(answer["best"][0])
    steps = [p["step_time_s"] for p in answer["pareto"]]
    memory = [p["memory_peak_bytes"] for p in answer["pareto"]]
    assert steps == sorted(steps) and memory == sorted(memory, reverse=True)


def test_ranking_by_events_keeps_every_plan() -> None:
    job, cluster = load("mixtral-gpu")
    found = Search(job, cluster, space_of(job, cluster), top=3)
    from simulator.planner.answer import answer_of

    answer = answer_of(found, found.run())
    again = by_events(job, cluster, list(answer.best), 2, "step_time")
    assert {p.overrides for p in again} == {p.overrides for p in answer.best}
    assert again[0].step_time_s <= again[1].step_time_s and again[2] == answer.best[2]


def test_the_page_fits_80_columns(call: Call) -> None:
    status, text, error = call("plan", "job.yaml", "--search", "space.yaml")
    assert status == 0 and error == ""
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "as given" in text and "Why not" in text
