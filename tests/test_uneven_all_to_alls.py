"""Uneven loads as bytes on links: patterns of ranks, their coflows, there and back, and the hot link in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coflows import GB, coflow, part, story
from hw_profiles.loader import resolve_cluster
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.engine.load_patterns import load_patterns, no_pattern
from simulator.engine.loads import ExpertLoads, expert_loads
from simulator.job.job import Job
from simulator.job.load import job_from_mapping, load_job
from simulator.job.rules import Degrees, resolve
from simulator.network.coflow import Coflow, Part
from simulator.network.fluid import Fluid
from simulator.network.templates import Templates, solo_seconds
from simulator.results.forecast import Forecast

BASE: dict[str, Any] = {
    "model": "mixtral-8x7b",
    "cluster": {"chip": "h100-sxm", "nodes": 4},
    "plan": {"pipeline": 2, "expert": 8, "microbatch_sequences": 1},
    "batch": {"sequences": 256, "length": 4096},
}


def link_bytes(t: Templates, parts: tuple[Part, ...]) -> np.ndarray:
    out = np.zeros(t.topology.links)
    for p in parts:
        out[p.links] += p.bytes
    return out


CLUSTERS: list[Any] = [{"chip": "h100-sxm", "nodes": 4}, {"chip": "mi300x", "nodes": 4}, "v5p-64"]


@pytest.mark.parametrize("spec", CLUSTERS, ids=str)
@pytest.mark.parametrize("fine", [False, True])
def test_an_uneven_all_to_all_is_its_matrix_of_bytes(spec: Any, fine: bool) -> None:
    """Against all pairs one by one, both ways; cut finely or not, the links carry the same bytes."""
    t = Templates(resolve_cluster(spec))
    size, loads = 16, np.random.default_rng(3).uniform(0.2, 3.0, 16)
    members = t.members(size, 1)[[1]]
    for to_experts in (True, False):
        pairs = np.tile(loads / size, (size, 1))
        flows = t.all_to_all_matrix(members, pairs if to_experts else pairs.T)
        parts = t.uneven(size, 1, (1,), loads, to_experts, fine=fine)
        factor = t.start("all_to_all", size, 1, 1.0, float(pairs.sum() / size))[1]
        np.testing.assert_allclose(link_bytes(t, parts) * factor, link_bytes(t, flows.parts), rtol=1e-9)


@pytest.mark.parametrize("transport", ["collective", "deepep"])
def test_even_loads_are_the_even_template(transport: Any) -> None:
    t = Templates(resolve_cluster({"chip": "h800", "nodes": 4}))
    even = t.shape("all_to_all", 16, 1, (0, 1), transport, 0.5)
    for way in (True, False):
        parts = t.uneven(16, 1, (0, 1), np.ones(16), way, transport, 0.5)
        np.testing.assert_allclose(link_bytes(t, parts), link_bytes(t, even.parts), rtol=1e-12)


def test_a_hot_rank_fills_its_own_port() -> None:
    """Eight GPUs on one switch, one with thrice the mean load: the all-to-all alone takes three times as long."""
    t = Templates(resolve_cluster({"chip": "h100-sxm", "nodes": 1}))
    loads = np.array([3.0, *[5 / 7] * 7])
    even = solo_seconds(Coflow("even", "x", t.uneven(8, 1, (0,), np.ones(8), True)), t.topology)
    for way in (True, False):
        hot = solo_seconds(Coflow("hot", "x", t.uneven(8, 1, (0,), loads, way)), t.topology)
        assert hot == pytest.approx(3 * even, rel=1e-12)


def test_phases_follow_each_other_and_the_parts_of_one_run_side_by_side() -> None:
    """2 s and 3 s side by side, then 1 s beside nothing: 4 s; another's last second shares link 0 with the end."""
    links = np.full(2, GB)
    there_and_back = Coflow(
        "both", "x", (part({0: 2e9}), part({1: 3e9}), part({0: 1e9}), part({})), phases=(2, 2)
    )  # fmt: skip
    assert story(Fluid(links), (there_and_back, 0)) == [("both", 4_000_000_000)]
    late = coflow("late", part({0: 1e9}))
    assert story(Fluid(links), (there_and_back, 0), (late, 3_000_000_000)) == [
        ("both", 5_000_000_000),
        ("late", 5_000_000_000),
    ]


def drawn(routing: dict[str, Any], groups: int = 2) -> tuple[Job, Degrees, ExpertLoads]:
    job = load_job(BASE | {"training": {"routing": routing}})
    degrees = resolve(job, resolve_cluster(job.cluster))
    return job, degrees, expert_loads(job, degrees, groups, 5)


@pytest.mark.parametrize(
    "routing", [{"model": "chance"}, {"model": "zipf", "exponent": 0.5}, {"model": "dirichlet", "concentration": 2.0}]
)
def test_patterns_keep_the_load_and_the_busiest_rank(routing: dict[str, Any]) -> None:
    """Every rank's mean is one, four patterns a stage at most, and the mean excess is that of all microbatches."""
    _, _, loads = drawn(routing)
    pattern, plan = load_patterns(loads), loads.plan
    for g in range(plan.groups):
        for stage in range(plan.stages):
            own = [pattern(g, stage, m) for m in range(plan.microbatches)]
            assert len({id(p) for p in own}) == 4
            assert all(p is not None and p.ranks_R.mean() == pytest.approx(1) for p in own)
            exact = [loads.excess(g, stage, m) for m in range(plan.microbatches)]
            kept = [p.excess for p in own if p is not None]
            assert np.mean(kept) == pytest.approx(np.mean(exact), rel=0.05)
            assert np.corrcoef(kept, exact)[0, 1] > 0.8


def test_even_routing_has_no_pattern_and_capacity_has_none() -> None:
    assert load_patterns(drawn({"model": "even"})[2]) is no_pattern
    job = load_job(BASE | {"training": {"capacity": {"factor": 1.25, "basis": "assignments"}}})
    loads = expert_loads(job, resolve(job, resolve_cluster(job.cluster)), 1, 0)
    assert load_patterns(loads) is no_pattern


def replayed(folder: Path, hot: list[float], **options: Any) -> Forecast:
    """One node, eight ranks of one expert each, recorded loads `hot` over the mean."""
    sent = 64 * 4096 * 2 / 8
    rows = [f"0,{layer},{e},{x * sent}" for layer in range(32) for e, x in enumerate(hot)]
    (folder / "counts.csv").write_text("step,layer,expert,tokens\n" + "\n".join(rows) + "\n")
    data = {
        "model": "mixtral-8x7b",
        "cluster": {"chip": "h100-sxm", "nodes": 1},
        "plan": {"expert": 8, "microbatch_sequences": 8},
        "batch": {"sequences": 64, "length": 4096},
        "training": {"routing": {"model": "replay", "file": "counts.csv"}},
    }
    return forecast(job_from_mapping(data, folder=folder), options=EventOptions(**options), folder=folder)


def test_a_hot_expert_is_a_hot_link(tmp_path: Path) -> None:
    """Thrice the mean on rank 5: its NVLinks carry more than any other's, by what the all-to-alls bring."""
    hot = [5 / 7] * 8
    hot[5] = 3.0
    result = replayed(tmp_path, hot)
    assert result.events is not None
    links = {x.name: x.bytes for x in result.events.links}
    busy = [x.name for x in result.events.links[:2]]
    assert all("gpu 5 of node 0" in name for name in busy), busy
    even = replayed(tmp_path, [1.0] * 8)
    assert even.events is not None
    plain = max(x.bytes for x in even.events.links)
    # In eighths of a buffer: 3 x 7 on the way to the experts, 8 - 3 on the way back from them; evenly 7 and 7.
    sent = even.all_to_all.bytes_per_device
    e = 1 / resolve_cluster({"chip": "h100-sxm", "nodes": 1}).levels[0].all_to_all_efficiency
    assert links[busy[0]] - plain == pytest.approx(sent * e * (3 * 7 + 8 - 3 - 14) / 8 / 2, rel=0.03)


def test_alone_a_step_with_a_hot_rank_takes_what_the_closed_form_says(tmp_path: Path) -> None:
    """In one switched domain the busiest port is the busiest rank's: formula, solo rates and shared links agree."""
    hot = [5 / 7] * 8
    hot[5] = 3.0
    for options in ({"contention": False}, {}):
        result = replayed(tmp_path, hot, **options)
        assert result.events is not None
        assert abs(result.events.difference) < 0.02
        assert result.parts.imbalance_s > 0.3 * result.parts.compute_s
