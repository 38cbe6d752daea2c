"""Pages of searches and of sizes: what is drawn is what was answered; text is escaped, and nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hw_profiles.loader import resolve_cluster
from reports import plan_page, size_page
from simulator.job.load import load_job
from simulator.planner.answer import answer_of
from simulator.planner.search import Search
from simulator.planner.space import SpaceFile, space_of
from simulator.results.plans import PlanSearch
from simulator.results.sizing import Phase, SizePoint, Sizing

Call = Callable[..., tuple[int, str, str]]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def answer() -> PlanSearch:
    job = load_job(EXAMPLES / "mixtral-8x7b.yaml")
    cluster = resolve_cluster(job.cluster)
    given = SpaceFile.model_validate({"plan": {"tensor": [1, 2, 4], "pipeline": [1, 2], "schedule": ["1f1b"]}})
    search = Search(job, cluster, space_of(job, cluster, given), top=12)
    return answer_of(search, search.run(), engine_top=1)


def test_a_search_is_drawn_as_it_came_out(answer: PlanSearch) -> None:
    front, best, given, *_ = plan_page._front(answer).data
    assert list(front.y) == pytest.approx([p.memory_peak_bytes / 2**30 for p in answer.pareto], rel=1e-5)
    assert list(front.x) == pytest.approx([p.closed_form_step_time_s for p in answer.pareto], rel=1e-5)
    # As fronts are: each plan is slower and smaller than the one before it.
    assert list(front.x) == sorted(front.x) and list(front.y) == sorted(front.y, reverse=True)
    assert len(best.x) == len(answer.best) == 12 and len(given.x) == 1
    lines = plan_page._coordinates(answer).data
    assert len(lines) == 12 and lines[-1].line.color != lines[0].line.color
    steps = [line.y[-1] for line in reversed(lines)]
    order = sorted(range(12), key=lambda i: answer.best[i].step_time_s)
    assert [steps[i] for i in order] == sorted(steps) and min(steps) == 0 and max(steps) == 1
    assert all(0 <= y <= 1 for line in lines for y in line.y)


def test_fields_are_in_their_order() -> None:
    assert plan_page._ordered([16, 2, "x", 4, None, 2]) == ["2", "4", "16", "default", "x"]


def test_a_page_is_safe_and_the_same_each_time(answer: PlanSearch) -> None:
    named = replace(answer, job="<script>alert(1)</script>")
    page = plan_page.render(named)
    assert page == plan_page.render(named) and "<script>alert" not in page
    assert all(r.command.replace("&", "&amp;").replace("'", "&#x27;") in page for r in answer.rejected)
    without = plan_page.render(replace(answer, given=None, given_said="does not fit"))
    assert "does not fit" in without


def a_point(chip: str, chips: int, days: float, usd: float, **more: object) -> SizePoint:
    phase = Phase(1e12, 2048, 4096, days / 10, days, ("plan.expert=8",))
    point = SizePoint(chip, chips, f"{chip}-{chips}", phases=(phase,), days=days, in_time=days <= 60, in_budget=True,
                      mfu=0.4, memory_peak_bytes=1e9, tokens_per_s=1e12 / days / 86400, usd={"on_demand": usd},
                      kwh=1000.0)  # fmt: skip
    return replace(point, **more)  # type: ignore[arg-type]


def test_a_size_is_drawn_as_it_came_out() -> None:
    points = (a_point("a", 32, 100, 1e5), a_point("a", 64, 50, 1e5), a_point("b", 16, 80, 3e5),
              SizePoint("b", 8, "b-8", refused="needs <more> memory"))  # fmt: skip
    weak = (("a", 32, 1e5), ("a", 64, 1.5e5))
    s = Sizing("m", 1e12, 60, 2e5, "on_demand", points, (points[1],), weak, ("experts", 16),
               {"a": (("on_demand", 2.0, "a list", "2026-01"),)}, 5e11, 10.0)  # fmt: skip
    page = size_page.render(s)
    assert page == size_page.render(s)
    assert "needs &lt;more&gt; memory" in page and "too slow" in page and "dashed: the budget" in page
    ran = [p for p in points if p.refused is None]
    first, second = size_page._curves(ran, lambda p: p.days, "days").data
    assert (list(first.x), list(first.y), list(second.y)) == ([32, 64], [100, 50], [80])
    (drawn,) = size_page._weak(s).data
    assert list(drawn.y) == [1.0, 0.75]
    far = size_page.render(replace(s, budget_usd=1e9))
    assert "is far above" in far and "dashed: the budget" not in far
    assert "No count that was tried" in size_page.render(replace(s, smallest=(), points=points[3:], weak=()))


def test_the_commands_write_pages(call: Call, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("plan: {tensor: [1, 2], pipeline: [1], schedule: [1f1b]}\n")
    size = ("size", "mixtral-8x7b", "--tokens", "1e11", "--days", "60")
    for command in (("plan", EXAMPLES / "mixtral-8x7b.yaml", "--search", space), size):
        page = tmp_path / "out.html"
        code, out, _ = call(*command, "--html", page, "--json")
        assert code == 0 and json.loads(out) and page.read_text().startswith("<!doctype html>")
        page.unlink()
        code, out, said = call(*command, "--html", tmp_path / "none" / "out.html")
        assert (code, out) == (4, "") and "no such folder" in said
