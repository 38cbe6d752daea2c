"""The drawing of a network: what is on it, where, and with which load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hw_profiles.loader import resolve_cluster
from reports.topology import SHADES, network
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job
from simulator.network.drawing import MOST_NODES, draw
from simulator.network.graph_file import topology_from_file
from simulator.network.topology import Topology, topology_of
from simulator.results.links import Drawing


def drawn(t: Topology, *busy: int) -> Drawing:
    use = np.full(t.links, 0.1)
    use[list(busy)] = 0.9
    return draw(t, use)


def names(d: Drawing, busy: float) -> list[str]:
    return [x.name for x in d.links if x.utilisation == busy]


def test_a_torus_is_the_plane_of_its_busiest_link() -> None:
    """4x4x8, all closed, along y at x = 2: rows y of 4, columns z of 8; 4 x 7 + 3 x 8 lines and two stubs a ring."""
    t = topology_of(resolve_cluster({"chip": "tpu-v5p", "slice": "4x4x8"}))
    link = next(i for i in range(t.links) if t.link_name(i) == "ICI y+ (2,1,5)->(2,2,5)")
    d = drawn(t, link)
    assert len(d.nodes) == 32 and "x = 2" in d.note
    assert names(d, 0.9) == ["ICI y+ (2,1,5)->(2,2,5)"]
    assert len(d.links) == 4 * 7 + 3 * 8 + 2 * (4 + 8)
    line = next(x for x in d.links if x.utilisation == 0.9)
    # Neighbours are one apart, downwards, in column 5.
    assert sorted(line.y) == [-2.0, -1.0] and line.x == (5.0, 5.0)


def test_a_large_torus_is_shown_in_part() -> None:
    t = topology_of(resolve_cluster({"chip": "tpu-v5p", "slice": "16x16x24"}))
    d = drawn(t, 3)
    assert len(d.nodes) == 256 and "in part" in d.note
    assert any(x.utilisation == 0.9 for x in d.links)


@pytest.mark.parametrize("spec", [{"chip": "h100-sxm", "nodes": 256}, {"chip": "gb200", "racks": 8}, "v5e-256"])
def test_the_busiest_link_is_always_on_it(spec: Any) -> None:
    t = topology_of(resolve_cluster(spec))
    for link in np.linspace(0, t.links - 1, 23).astype(int).tolist():
        d = drawn(t, link)
        assert any(x.utilisation == 0.9 for x in d.links), t.link_name(link)
        assert len(d.nodes) <= 256 and len(d.links) <= 1000


def test_tiers_of_a_fat_tree() -> None:
    """Four of 64 nodes of 8: devices, their switches below, eight leaves above, spines above these."""
    t = topology_of(resolve_cluster({"chip": "h100-sxm", "nodes": 64}))
    d = drawn(t, 100)
    tiers = {kind: sorted({n.y for n in d.nodes if n.kind == kind}) for kind in {n.kind for n in d.nodes}}
    assert tiers["NVSwitch"] < tiers["device"] < tiers["leaf"] < tiers["spine"]
    assert sum(n.kind == "device" for n in d.nodes) == 32 and "32 of 512 devices" in d.note
    # Every device has a line to its switch and one to its leaf.
    device = next(n for n in d.nodes if n.kind == "device")
    assert sum((device.x, device.y) in zip(x.x, x.y, strict=True) for x in d.links) == 2


def test_a_graph_of_ones_own_is_laid_out_the_same_every_time(tmp_path: Path) -> None:
    count = 100
    nodes: list[dict[str, Any]] = [{"id": f"g{i}", "device": i} for i in range(count)]
    link = {"bandwidth_gb_per_s": 10.0, "latency_us": 2.0, "level": "own"}
    links = [{"source": a, "target": b, **link} for i in range(count) for a, b in ((f"g{i}", "s"), ("s", f"g{i}"))]
    path = tmp_path / "own.json"
    data = {"directed": True, "multigraph": False, "graph": {}, "nodes": [*nodes, {"id": "s"}], "links": links}
    path.write_text(json.dumps(data))
    t = topology_from_file(path)
    d = drawn(t, 7)
    assert len(d.nodes) == MOST_NODES and d == drawn(t, 7)


def test_a_run_draws_its_network_with_the_load_of_folded_links() -> None:
    job = {
        "model": "mixtral-8x7b",
        "cluster": {"chip": "h100-sxm", "nodes": 4},
        "plan": {"expert": 8, "microbatch_sequences": 4},
        "batch": {"sequences": 128, "length": 4096},
        "training": {"routing": {"model": "even"}},
    }
    result = forecast(load_job(job))
    assert result.timeline is not None and result.timeline.network is not None and result.events is not None
    d = result.timeline.network
    inside = [x.utilisation for x in d.links if x.level == "NVLink"]
    # Even loads: every device's port is as busy as the one that stands for all.
    assert len(inside) == 32 and min(inside) == pytest.approx(max(inside))
    assert max(x.utilisation for x in d.links) == pytest.approx(max(x.utilisation for x in result.events.links))
    alone = forecast(load_job(job), options=EventOptions(contention=False))
    assert alone.timeline is not None and alone.timeline.network is None


def test_where_nothing_is_sent_nothing_is_drawn() -> None:
    job = {"model": "mixtral-8x7b", "cluster": {"chip": "h100-sxm", "nodes": 1, "chips_per_node": 1}}
    result = forecast(load_job(job | {"batch": {"sequences": 1, "length": 4096}}))
    assert result.timeline is not None and result.timeline.network is None


def test_links_are_coloured_by_load() -> None:
    t = topology_of(resolve_cluster({"chip": "h100-sxm", "nodes": 2}))
    fig = network(drawn(t, 0))
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert [x.line.color for x in lines] == [SHADES[1], SHADES[-1]]
    assert lines[-1].name == "72 to 90 % busy"
    hover = [text for trace in fig.data if trace.hovertext for text in trace.hovertext]
    assert "NVLink out gpu 0 of node 0: busy 90.0 %" in hover
