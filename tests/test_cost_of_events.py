"""What makes events cheap changes nothing: networks cut out, patterns made together, coflows run ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coflows import GB, coflow, part, story
from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job
from simulator.network import template_parts
from simulator.network.coflow import Coflow, Part
from simulator.network.fluid import Fluid
from simulator.network.geometry import joined_links
from simulator.network.templates import Templates

EXAMPLE = Path(__file__).parents[1] / "examples" / "deepseek-v3.yaml"
# Nodes in units of leaves, racks, links between pairs, an oversubscribed tree, and a torus.
CLUSTERS: list[Any] = [
    {"chip": "h800", "nodes": 128},
    {"chip": "gb200", "racks": 4},
    {"chip": "mi300x", "nodes": 32},
    "v5p-64",
]


def same(left: tuple[Part, ...], right: tuple[Part, ...], exact: bool = True) -> None:
    assert [p.level for p in left] == [p.level for p in right]
    for a, b in zip(left, right, strict=True):
        assert a.links.tolist() == b.links.tolist()
        np.testing.assert_allclose(a.bytes, b.bytes, rtol=0 if exact else 1e-13)
        np.testing.assert_allclose(a.flows, b.flows, rtol=0 if exact else 1e-13)
        assert a.largest_flow_bytes == pytest.approx(b.largest_flow_bytes, rel=0 if exact else 1e-13)


@pytest.mark.parametrize("spec", CLUSTERS, ids=str)
@pytest.mark.parametrize("transport", ["collective", "deepep"])
def test_the_network_around_a_group_says_the_same_as_the_whole(
    spec: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = resolve_cluster(spec)
    size, loads = 16, np.random.default_rng(5).uniform(0.2, 3.0, 16)
    groups = (0, cluster.devices // size - 1)

    def parts() -> list[tuple[Part, ...]]:
        t = Templates(cluster)
        ways = [t.uneven(size, 1, groups, loads, way, transport, 0.5, fine) for way in (True, False) for fine in (0, 1)]
        return [*ways, *(t.shape(k, size, 1, groups).parts for k in ("all_reduce", "all_gather", "all_to_all"))]

    small = parts()
    monkeypatch.setattr(template_parts, "near", lambda layout, members: None)
    for a, b in zip(small, parts(), strict=True):
        same(a, b)


@pytest.mark.parametrize("spec", CLUSTERS, ids=str)
@pytest.mark.parametrize("transport", ["collective", "deepep"])
def test_several_patterns_are_each_routed_by_itself(spec: Any, transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of what each member's load puts on links, against every pattern routed anew; members without load too."""
    cluster, loads = resolve_cluster(spec), np.random.default_rng(7).uniform(0.2, 3.0, (5, 16))

    def routed(fine: bool) -> list[tuple[Part, ...]]:
        t, out = Templates(cluster), []
        for drawn in (loads, np.where(loads < 0.5, 0.0, loads)):
            for way in (True, False):
                out += [t.uneven(16, 1, (0, 1), one, way, transport, 0.5, fine) for one in drawn]
                if not fine:
                    several = t.uneven_several(16, 1, (0, 1), drawn, way, transport, 0.5)
                    for one, parts in zip(out[-5:], several, strict=True):
                        same(one, parts, exact=False)
        return out

    summed = [routed(fine) for fine in (False, True)]
    monkeypatch.setattr(template_parts, "MOST_IN_RESPONSE", 0)
    for fine, found in zip((False, True), summed, strict=True):
        for a, b in zip(found, routed(fine), strict=True):
            same(a, b, exact=False)


@pytest.mark.parametrize("seed", range(30))
def test_regions_and_running_ahead_change_no_story(seed: int) -> None:
    """Two regions of links; coflows of several phases that meet or do not, begun at any time."""
    rng = np.random.default_rng(seed)
    bandwidth = rng.uniform(1, 10, 8) * GB
    starts: list[tuple[Coflow, int]] = []
    for k in range(14):
        first = 4 * int(rng.integers(2))
        loads = [
            part({first + int(i): float(rng.integers(1, 30)) * 1e8 for i in rng.permutation(4)[: rng.integers(1, 4)]})
            for _ in range(int(rng.integers(1, 4)))
        ]
        one = coflow(str(k), *loads, latency_s=float(rng.integers(0, 3)) * 1e-2, chained=bool(rng.integers(2)))
        starts.append((one, int(rng.integers(0, 4 * 10**9))))
    starts.sort(key=lambda start: start[1])
    plain = Fluid(bandwidth, remember=False)
    apart = Fluid(bandwidth, regions=joined_links([c for c, _ in starts], 8))
    apart.prepare([c for c, _ in starts])
    assert story(plain, *starts) == story(apart, *starts)
    np.testing.assert_allclose(apart.link_bytes(), plain.link_bytes(), rtol=1e-12)


def test_a_coflow_in_two_regions_is_an_error() -> None:
    fluid = Fluid(np.full(2, GB), regions=np.array([0, 1]))
    with pytest.raises(ValueError, match="regions"):
        fluid.start(coflow("across", part({0: 1.0, 1: 1.0})), 0)


def test_every_microbatch_may_have_its_own_loads() -> None:
    """Four vectors stand for 120 well enough that the step is the same to a per mille."""
    job = load_job(EXAMPLE, [])
    four = forecast(job, options=EventOptions(fold=False))
    every = forecast(job, options=EventOptions(fold=False, load_vectors=None))
    assert every.step_time_s == pytest.approx(four.step_time_s, rel=1e-3)
    assert every.timeline is not None and four.timeline is not None

    # 30 microbatches share a vector: the lengths of their all-to-alls repeat; with loads of their own hardly any do.
    def lengths(t: Any) -> int:
        rows = t.kind == 4
        return len(set(np.round((t.end_s - t.start_s)[rows] * 1e9).tolist()))

    assert len(every.timeline) == len(four.timeline)
    assert lengths(every.timeline) > 3 * lengths(four.timeline)
    with pytest.raises(QuestionError, match="load_vectors = 0"):
        forecast(job, options=EventOptions(load_vectors=0))
