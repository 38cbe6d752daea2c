"""Graphs of clusters: counted by hand, named for people, and read from files that may be hostile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import cluster_names, resolve_cluster
from hw_profiles.slices import all_slices
from simulator.network.graph_file import topology_from_file
from simulator.network.loads import pair_loads
from simulator.network.topology import Topology, topology_of


def built(spec: object, twisted: bool = False) -> Topology:
    return topology_of(resolve_cluster(spec), twisted)  # type: ignore[arg-type]


def links_by_level(t: Topology) -> dict[str, int]:
    return dict(Counter(t.level_names[i] for i in t.level))


def test_every_preset_and_every_shape_of_slice_is_a_connected_graph() -> None:
    specs: list[object] = [*cluster_names(), *(s.name for s in all_slices() if s.chips <= 512)]
    for spec in specs:
        t = built(spec)
        assert nx.is_strongly_connected(t.graph()), spec
        assert (t.bandwidth_bytes_per_s > 0).all()


def test_links_of_tori_by_hand() -> None:
    # 4x4x8 closed: six links a chip. 2x4 of v5e: 4 + 6 edges, both ways. 32x32 of v3: four a chip, two cores each.
    assert links_by_level(built({"chip": "tpu-v5p", "slice": "4x4x8"})) == {"ICI": 6 * 128}
    assert links_by_level(built({"chip": "tpu-v5e", "slice": "2x4"})) == {"ICI": 2 * (4 + 2 * 3)}
    assert links_by_level(built("tpu-v3-2048")) == {"ICI": 4 * 1024, "chip": 2 * 2048}
    # Two slices of 2x2x1 v4 (never closed), a link each way for every device to the data-centre network.
    assert links_by_level(built({"chip": "tpu-v4", "slice": "2x2x1", "slices": 2})) == {"ICI": 16, "DCN": 16}


@pytest.mark.parametrize(
    ("chip", "nodes", "counts"),
    [
        # DGX SuperPODs: nodes -> leaves, spines, cores (facts: topologies, 2.1).
        ("h100-sxm", 128, (32, 16, 0)),
        ("b200", 64, (16, 8, 0)),
        ("b200", 256, (64, 32, 0)),
        ("b200", 512, (128, 128, 64)),
        ("b200", 1024, (256, 256, 128)),
        ("b200", 2048, (512, 512, 256)),
    ],
)
def test_switches_of_super_pods(chip: str, nodes: int, counts: tuple[int, int, int]) -> None:
    kinds = dict(built({"chip": chip, "nodes": nodes}).kinds)
    assert (kinds["leaf"], kinds["spine"], kinds.get("core", 0)) == counts


def test_oversubscription_thins_what_is_above_the_leaves() -> None:
    full, thin = (built({"chip": "h100-sxm", "nodes": 64, "oversubscription": x}) for x in (1, 4))
    for t, factor in ((full, 1), (thin, 4)):
        card = t.bandwidth_bytes_per_s[t.level == t.level_names.index("leaf")]
        up = t.bandwidth_bytes_per_s[t.level == t.level_names.index("spine")]
        assert (card == 50e9).all()
        # All that leads up from leaves and down to them: as much as the cards below, over the factor.
        assert up.sum() / 2 == pytest.approx(512 * 50e9 / factor)


def test_names_for_people() -> None:
    v5p = built({"chip": "tpu-v5p", "slice": "4x4x4"})
    names = [v5p.link_name(i) for i in range(v5p.links)]
    assert len(set(names)) == v5p.links
    assert {"ICI x+ (3,1,0)->(0,1,0)", "ICI x- (0,1,0)->(3,1,0)", "ICI z+ (0,1,2)->(0,1,3)"} <= set(names)
    h100 = built({"chip": "h100-sxm", "nodes": 64})
    names = [h100.link_name(i) for i in range(h100.links)]
    assert len(set(names)) == h100.links
    expected = {
        "NVLink out gpu 5 of node 3",
        "InfiniBand in gpu 0 of node 63",
        "leaf 2 -> spine 5",
        "spine 0 -> leaf 9",
    }
    assert expected <= set(names)
    assert "NVLink in gpu 70 of rack 0" in [built("gb200-nvl72").link_name(i) for i in range(144)]
    assert "xGMI gpu 0 -> gpu 5 of node 7" in {built("mi300x-64").link_name(i) for i in range(built("mi300x-64").links)}
    two = built({"chip": "tpu-v3", "slice": "4x4", "slices": 2})
    names = [two.link_name(i) for i in range(two.links)]
    assert len(set(names)) == two.links
    assert {"DCN out device 5", "core 33 -> chip slice 1 (0,0)", "ICI y- slice 1 (2,1)->(2,0)"} <= set(names)


def test_cube_mesh_has_six_links_a_device() -> None:
    t = built({"chip": "v100", "nodes": 1})
    assert np.bincount(t.source, t.bandwidth_bytes_per_s).tolist() == [150e9] * 8
    assert np.bincount(t.target, t.bandwidth_bytes_per_s).tolist() == [150e9] * 8
    assert nx.diameter(t.graph()) == 2


def test_twisted_torus_keeps_six_links_and_shortens_paths() -> None:
    """4x4x8 and 4x8x8: as many links, every chip alike, a shorter mean path; marked as not verified."""
    for shape in ("4x4x8", "4x8x8"):
        plain, twisted = (built({"chip": "tpu-v5p", "slice": shape}, t) for t in (False, True))
        assert "not verified" in twisted.note and not plain.note
        assert np.bincount(twisted.source).tolist() == np.bincount(twisted.target).tolist() == [6] * plain.devices
        assert len(set(zip(twisted.source.tolist(), twisted.target.tolist(), strict=True))) == twisted.links
        lengths = [nx.average_shortest_path_length(t.graph()) for t in (plain, twisted)]
        assert lengths[1] < lengths[0]
        pairs = np.ones((plain.devices, plain.devices))
        assert pair_loads(twisted, pairs).bytes.max() <= pair_loads(plain, pairs).bytes.max() * (1 + 1e-9)
    for spec in ({"chip": "tpu-v5p", "slice": "4x4x4"}, {"chip": "tpu-v6e", "slice": "16x16"}, "h100-64"):
        with pytest.raises(QuestionError, match="twisted = true"):
            built(spec, True)


def test_a_link_that_carries_nothing_is_named() -> None:
    t = built({"chip": "tpu-v5p", "slice": "4x4x4"})
    for value in (0.0, -1.0, float("nan"), float("inf")):
        rates = t.bandwidth_bytes_per_s.copy()
        rates[5] = value
        with pytest.raises(QuestionError, match=r"bandwidth of ICI x\+ \(0,1,1\)->\(1,1,1\) = "):
            replace(t, bandwidth_bytes_per_s=rates)
    with pytest.raises(QuestionError, match="latency of"):
        replace(t, latency_s=t.latency_s - 1)


def test_devices_that_cannot_talk_are_named() -> None:
    t = built({"chip": "h100-sxm", "nodes": 2})
    kept = [i for i in range(t.links) if t.target[i] != 9]
    arrays = ("source", "target", "bandwidth_bytes_per_s", "latency_s", "level")
    with pytest.raises(QuestionError, match=r"no path from device 0 to device 9$"):
        replace(t, **{name: getattr(t, name)[kept] for name in arrays})


def test_graph_and_file_and_back(tmp_path: Path) -> None:
    t = built({"chip": "h100-sxm", "nodes": 3, "chips_per_node": 2})
    pairs = np.random.default_rng(0).random((6, 6))
    truth = pair_loads(replace(t, layout=None, names=tuple(map(t.node_name, range(t.nodes)))), pairs)
    nx.write_graphml(t.graph(), tmp_path / "net.graphml")
    (tmp_path / "net.json").write_text(json.dumps(nx.node_link_data(t.graph(), edges="links")))
    for name in ("net.graphml", "net.json"):
        again = topology_from_file(tmp_path / name)
        assert (again.devices, again.links, again.level_names) == (6, t.links, t.level_names)
        here = {
            (again.node_name(int(a)), again.node_name(int(b))): i
            for i, (a, b) in enumerate(zip(again.source, again.target, strict=True))
        }
        order = [here[t.node_name(int(a)), t.node_name(int(b))] for a, b in zip(t.source, t.target, strict=True)]
        np.testing.assert_allclose(again.bandwidth_bytes_per_s[order], t.bandwidth_bytes_per_s)
        np.testing.assert_allclose(pair_loads(again, pairs).bytes[order], truth.bytes)


LINK = {"source": "a", "target": "b", "bandwidth_gb_per_s": 50, "latency_us": 1}
NODES = [{"id": "a", "device": 0}, {"id": "b", "device": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "lists `nodes` and `links`"),
        ({"nodes": [3], "links": []}, "nodes[0] = 3"),
        ({"nodes": [{"id": "a"}], "links": []}, "no node has `device`"),
        ({"nodes": [{"id": "a", "device": 1}], "links": []}, "none is device 0"),
        ({"nodes": [*NODES, {"id": "c", "device": 1}], "links": []}, "device 1 is both 'b' and 'c'"),
        ({"nodes": [*NODES, NODES[0]], "links": []}, "node 'a' is there twice"),
        ({"nodes": [{"id": "a", "device": 0.5}], "links": []}, "must be a whole number"),
        ({"nodes": NODES, "links": []}, "no links"),
        ({"nodes": NODES, "links": [LINK]}, "no path from b to a"),
        ({"nodes": NODES, "links": [LINK], "directed": False, "x": [LINK, LINK]}, ""),
        ({"nodes": NODES, "links": [LINK, LINK]}, "there twice"),
        ({"nodes": NODES, "links": [{**LINK, "target": "bb"}]}, "there is no node 'bb'; did you mean 'b'?"),
        ({"nodes": NODES, "links": [{**LINK, "target": "a"}]}, "must join two nodes"),
        ({"nodes": NODES, "links": [{**LINK, "bandwidth_gb_per_s": 0}], "directed": False}, "= 0: must be finite"),
        ({"nodes": NODES, "links": [{**LINK, "bandwidth_gb_per_s": "fast"}]}, "= 'fast': must be a finite number"),
        ({"nodes": NODES, "links": [{**LINK, "bandwidth_gb_per_s": float("nan")}]}, "= nan"),
        ({"nodes": NODES, "links": [{**LINK, "latency_us": -1}], "directed": False}, "latency of"),
        ({"nodes": NODES, "links": [{"source": "a", "target": "b", "bandwith": 5}]}, "there is 'bandwith'"),
    ],
)
def test_bad_json_gets_one_line(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "net.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    if not message:
        assert topology_from_file(path).links == 2
        return
    with pytest.raises(QuestionError) as caught:
        topology_from_file(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


BOMB = '<?xml version="1.0"?><!DOCTYPE g [<!ENTITY a "x"><!ENTITY b "&a;&a;&a;">]><graphml><graph id="&b;"/></graphml>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "document types and entities are not allowed"),
        (BOMB.encode("utf-16"), "document types and entities are not allowed"),
        (b'<!DOCTYPE g SYSTEM "file:///etc/passwd"><graphml/>', "document types"),
        (b"<graphml><graph>", "line 1: not XML"),
        (b"<graphml/>", "0 graphs"),
        (b"<graphml><graph><node/></graph></graphml>", "<node> without id"),
        (b"<graphml><graph/><graph/></graphml>", "a graph within or beside another"),
        (b"<graphml><graph><hyperedge/></graph></graphml>", "<hyperedge> is not supported"),
        (b'<graphml><graph><node id="a"><data key="k">1</data></node></graph></graphml>', "no such key"),
        (b"<a>" * 100, "nested deeper than 16"),
        (b"\x00\xff", "not XML"),
    ],
)
def test_bad_graphml_gets_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "net.graphml"
    path.write_bytes(content)
    with pytest.raises(QuestionError) as caught:
        topology_from_file(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, message in (("no.json", "no such file"), ("x.txt", "must end in"), (".json/", "must end in")):
        with pytest.raises(QuestionError, match=message):
            topology_from_file(tmp_path / path)
    monkeypatch.setattr("simulator.network.graph_file.MAX_BYTES", 10)
    (tmp_path / "big.json").write_text(" " * 11)
    with pytest.raises(QuestionError, match="11 bytes; at most 10"):
        topology_from_file(tmp_path / "big.json")


def test_start_up_needs_neither_networkx_nor_scipy() -> None:
    code = (
        "import sys; from hw_profiles.loader import resolve_cluster; from simulator.network.templates import Templates;"
        "import simulator.network.graph_file;"
        "Templates(resolve_cluster('h800-2048')).collective('all_to_all', 64, 1, 1e6);"
        "print(sorted({'networkx', 'scipy', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
