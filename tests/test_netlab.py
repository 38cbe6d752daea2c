"""The cluster on one machine: plans as data, tables of several hosts as one, networks fitted by level; and a real lab.

The real one needs root and iproute2, and is skipped, saying so, without them.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.netlab import cases, lab, plan
from benchmarks.netlab.crew import crew
from benchmarks.netlab.tables import joined, pair_seconds, slow_host
from hw_profiles.errors import QuestionError
from hw_profiles.loader import load_chip, resolve_cluster
from hw_profiles.schema import Chip
from simulator.calibration.calibrate import calibrate
from simulator.calibration.fit_network import card_rate
from simulator.calibration.tables import read_table, write_table
from simulator.job.load import load_job
from simulator.network.collectives import collective_rate
from simulator.network.graph_file import topology_from_file
from simulator.network.templates import Templates, solo_seconds
from simulator.results.measurement import Measurement, MeasurementTable

PLANS = (plan.one_switch(100), plan.two_leaves(200, 100), plan.ring(100), plan.one_switch(200, {2: 50}))
KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
PERFECT = {"scale_out.ring_efficiency": 1, "scale_out.all_to_all_efficiency": 1, "scale_out.latency_us": 0}


def value(command: plan.Command, key: str) -> str:
    return command[command.index(key) + 1]


def cables(commands: list[plan.Command]) -> dict[tuple[str, str], tuple[str, str]]:
    """(namespace, port) to the end at the other side of its cable, as the commands join them."""
    out = {}
    for c in commands:
        if "veth" in c:
            peer = c.index("peer")
            one, two = (value(c, "netns"), value(c, "add")), (value(c[peer:], "netns"), value(c[peer:], "name"))
            out |= {one: two, two: one}
    return out


def walk(commands: list[plan.Command], start: int, end: int) -> list[tuple[str, str]]:
    """Ports that a packet leaves by, from the routes alone; a switch hands it to where its host is, by a search."""
    joined_, wanted = cables(commands), plan.namespace(plan.host_name(end))
    routes = {
        (value(c, "-n"), value(c, "add")): c for c in commands if "route" in c
    }  # fmt: skip
    here, out = plan.namespace(plan.host_name(start)), []
    while here != wanted:
        port = (here, value(routes[here, f"{plan.address(end)}/32"], "dev"))
        out.append(port)
        here = joined_[port][0]
        if "-s" in here:
            paths = [[port]]
            while paths:
                path = paths.pop(0)
                at = joined_[path[-1]][0]
                if at == wanted:
                    out, here = [*out[:-1], *path], at
                    break
                assert "-s" in at or len(path) == 1 or at != wanted
                if "-s" in at:
                    paths += [[*path, p] for p in joined_ if p[0] == at and p != joined_[path[-1]]]
        assert len(out) <= 4, "goes in a circle"
    return out


@pytest.mark.parametrize("asked", PLANS, ids=lambda p: p.name)
def test_packets_arrive_as_the_simulator_routes_them(asked: plan.Plan, tmp_path: Path) -> None:
    """Walking the routes loads every port as much as the simulator's all-to-all loads the link of the graph."""
    commands = plan.plug(asked)
    carried: Counter[tuple[str, str]] = Counter()
    for i, j in itertools.permutations(range(asked.hosts), 2):
        carried.update(walk(commands, i, j))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.graph(asked)), encoding="utf-8")
    drawn = topology_from_file(path)
    cluster = resolve_cluster({"chip": "cpu-host", "devices": 4, "nodes": 4}, PERFECT)
    loads: Counter[tuple[str, str]] = Counter()
    for part in Templates(cluster, drawn).collective("all_to_all", 4, 1, 4.0).parts:
        for link, bytes_ in zip(part.links, part.bytes, strict=True):
            a, b = (drawn.node_name(int(end[link])) for end in (drawn.source, drawn.target))
            loads[plan.namespace(a), plan.port(b)] += bytes_
    assert loads == pytest.approx(carried)


@pytest.mark.parametrize("asked", PLANS, ids=lambda p: p.name)
def test_both_ends_of_every_cable_are_shaped_and_all_is_taken_away(asked: plan.Plan) -> None:
    built, removed = plan.plug(asked), plan.unplug(asked)
    ends = cables(built)
    rates = {(value(c, "-n"), value(c, "dev")): value(c, "rate") for c in built if c[0] == "tc"}
    for c in asked.cables:
        for node, other in ((c.a, c.b), (c.b, c.a)):
            assert rates.pop((plan.namespace(node), plan.port(other))) == f"{c.mbit:g}mbit"
    assert not rates and all(int(value(c, "burst")) > plan.PACKET_BYTES for c in built if c[0] == "tc")
    for c in removed:
        if "link" in c:
            end = (value(c, "-n"), value(c, "del"))
            del ends[ends.pop(end)]
    assert not ends
    made = {value(c, "add") for c in built if c[:3] == ("ip", "netns", "add")}
    assert made == {value(c, "del") for c in removed if c[:3] == ("ip", "netns", "del")}
    last_cable = max(i for i, c in enumerate(removed) if "link" in c)
    assert all("link" in c for c in removed[: last_cable + 1]), "cables go before switches"
    assert all(name.startswith(plan.PREFIX) for name in made)


@pytest.mark.parametrize(
    ("asked", "kind", "seconds"),
    [
        # Of 1 MB each host sends 750 kB at 12.5 MB/s.
        (plan.one_switch(100), "all_to_all", 0.06),
        # Two hosts send half of their megabyte to the other leaf: 1 MB over the trunk each way.
        (plan.two_leaves(200, 100), "all_to_all", 0.08),
        (plan.two_leaves(200, 400), "all_to_all", 0.03),
        # Each cable and way: one pair of neighbours and one pair across, 250 kB each.
        (plan.ring(100), "all_to_all", 0.04),
        # Host 2 sends its 750 kB at 6.25 MB/s.
        (plan.one_switch(200, {2: 50}), "all_to_all", 0.12),
        # Rings one way round: 750 kB on every cable, over the trunk once each way.
        (plan.ring(100), "all_gather", 0.06),
        (plan.two_leaves(200, 100), "all_gather", 0.06),
        (plan.two_leaves(200, 100), "all_reduce", 0.12),
    ],
)
def test_fluid_times_by_hand(asked: plan.Plan, kind: str, seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.graph(asked)), encoding="utf-8")
    drawn = topology_from_file(path)
    cluster = resolve_cluster({"chip": "cpu-host", "devices": 4, "nodes": 4}, PERFECT)
    coflow = Templates(cluster, drawn).collective(kind, 4, 1, 1e6)
    assert solo_seconds(coflow, drawn) == pytest.approx(seconds)


def known() -> Chip:
    """A host whose library takes 200 us and 100 us a step, 0.8 of the card in rings, 0.5 in all-to-alls."""
    chip = load_chip("cpu-host")
    assert chip.scale_out is not None
    out = chip.scale_out
    from hw_profiles.schema import Regime, Regimes

    def fit(passes: float = 1.0) -> Regimes:
        return Regimes(protocols=(Regime(start=2.0, step=1.0),), passes=passes, source="", date="", confidence="high")

    families = {"ring": fit(), "reduce_scatter": fit(2.0), "all_reduce": fit(), "all_to_all": fit()}
    half = out.all_to_all_efficiency.model_copy(update={"value": 0.5})
    changed = out.model_copy(update={"collectives": families, "all_to_all_efficiency": half})
    return chip.model_copy(update={"scale_out": changed})


def world(mbits: tuple[float, ...]) -> MeasurementTable:
    """Collectives of hosts on cables of several rates, as `known` would take."""
    rows, jobs, chip = [], {}, known()
    for mbit in mbits:
        job = load_job(cases.job(cases.MODELS[0], mbit))
        jobs[job.hash] = job.model_dump(mode="json")
        cluster = resolve_cluster(job.cluster, chip=chip)
        for kind, size, bytes_ in itertools.product(KINDS, (2, 4), (2.0**14, 2.0**18, 2.0**21)):
            seconds = float(collective_rate(cluster, kind, size, 1).seconds(bytes_))
            rows.append(
                Measurement(
                    f"bench:{mbit}.{kind}.{size}.{bytes_}", "a world", "2026-11-22", "cpu-host", "none", "collective",
                    kind, seconds, bytes=bytes_, group_size=size, level="Ethernet", devices=4, job_hash=job.hash,
                )
            )  # fmt: skip
    return MeasurementTable(tuple(rows), jobs, {}, "world.parquet")


def test_a_network_is_learnt_from_links_of_several_rates(tmp_path: Path) -> None:
    """Rows at 100 and 400 Mbit/s give what the world has; collectives at 200 Mbit/s, on a drawn ring too, follow."""
    found = calibrate([world((100, 400))], load_chip("cpu-host")).chip
    assert found.scale_out is not None and found.scale_up == load_chip("cpu-host").scale_up
    assert found.scale_out.ring_efficiency.value == pytest.approx(0.8, rel=1e-3)
    assert found.scale_out.all_to_all_efficiency.value == pytest.approx(0.5, rel=1e-3)
    assert found.scale_out.collectives["reduce_scatter"].passes == pytest.approx(2.0, rel=1e-3)
    path = tmp_path / "ring.json"
    path.write_text(json.dumps(plan.graph(plan.ring(200))), encoding="utf-8")
    drawn = topology_from_file(path)
    spec = cases.job(cases.MODELS[0], 200)["cluster"]
    for kind in KINDS:
        times = []
        for chip in (known(), found):
            cluster = resolve_cluster(spec, chip=chip)
            times.append(float(collective_rate(cluster, kind, 4, 1).seconds(1e6)))
            times.append(solo_seconds(Templates(cluster, drawn).collective(kind, 4, 1, 1e6), drawn))
        assert times[:2] == pytest.approx(times[2:], rel=2e-3)


def test_a_row_whose_job_is_not_there_is_refused() -> None:
    table = world((100,))
    with pytest.raises(QuestionError, match=r"world.parquet: bench:.*: the table does not carry its job"):
        calibrate([replace(table, jobs={})], load_chip("cpu-host"))


def test_where_a_group_goes_over_cards() -> None:
    """Two devices a host share its card; a group that is both within and between hosts is told apart."""
    cluster = resolve_cluster({"chip": {"name": "cpu-host", "scale_out.nic_gb_per_s": 0.1}, "devices": 8, "nodes": 4})
    assert card_rate(cluster, 4, 2) == pytest.approx(0.5e8)
    assert card_rate(cluster, 2, 1) == 0
    assert card_rate(cluster, 8, 1) is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_switch_is_the_cluster_itself(kind: str, tmp_path: Path) -> None:
    """The plan's graph, the cluster's own topology and the closed form say the same of a collective."""
    spec = {"chip": {"name": "cpu-host", "scale_out.nic_gb_per_s": 0.0125}, "devices": 4, "nodes": 4}
    cluster = resolve_cluster(spec, chip=known())
    path = tmp_path / "switch.json"
    path.write_text(json.dumps(plan.graph(plan.one_switch(100))), encoding="utf-8")
    drawn, own = topology_from_file(path), Templates(cluster)
    expected = float(collective_rate(cluster, kind, 4, 1).seconds(1e6))
    assert solo_seconds(own.collective(kind, 4, 1, 1e6), own.topology) == pytest.approx(expected)
    assert solo_seconds(Templates(cluster, drawn).collective(kind, 4, 1, 1e6), drawn) == pytest.approx(expected)


def host_row(host: int, kind: str, seconds: float, **more: object) -> Measurement:
    row = Measurement(
        f"j#case:{kind}@{host}", "by hand", "2026-11-22", "cpu-host", "none", kind, kind, seconds, device=host,
        devices=4, job_hash="h",
    )  # fmt: skip
    return replace(row, **more)  # type: ignore[arg-type]


def test_tables_of_hosts_as_one(tmp_path: Path) -> None:
    """A collective alone is one row, that of the median host."""
    paths = []
    for host, alone in enumerate((0.3, 0.4, 0.2)):
        row = host_row(host, "collective", alone, name="all_to_all", bytes=1e6, group_size=4, level="Ethernet")
        paths.append(tmp_path / f"{host}.parquet")
        write_table(MeasurementTable((row,), {"h": {"model": "x"}}), paths[-1])
    [whole] = joined(paths, "whole").rows
    assert (whole.id, whole.seconds, whole.device) == ("j#case:collective", 0.3, None)


def test_the_slow_host_is_the_one_slow_with_everybody(tmp_path: Path) -> None:
    """Host 2 slows each of its partners once; alone it is slow with both. Nobody is named where all are alike."""
    paths = []
    for host, seconds in enumerate([(1.0, 4.0), (1.0, 1.0), (4.0, 4.0), (4.0, 1.0)]):
        rows = tuple(
            host_row(
                host, "collective", s, id=f"b#c:{i}@{host}", name="all_to_all", bytes=1.0, group_size=2, stride=i + 1
            )
            for i, s in enumerate(seconds)
        )
        paths.append(tmp_path / f"{host}.parquet")
        write_table(MeasurementTable(rows, {"h": {"model": "x"}}), paths[-1])
    assert slow_host(pair_seconds(paths)) == (2, 4.0)
    assert slow_host({0: 1.0, 1: 1.1, 2: 1.2, 3: 1.0})[0] is None


def test_without_tools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.netlab.lab.shutil.which", lambda tool: None if tool == "tc" else "/sbin/" + tool)
    with pytest.raises(QuestionError, match=r"netlab: tc: not found"), lab.lab():
        pass


def test_two_real_hosts(tmp_path: Path) -> None:
    """An all-to-all of two hosts takes its fluid time at least; nothing is left, old leftovers included."""
    why = lab.missing()
    if why:
        pytest.skip(f"no netlab here: {why}")
    left = plan.namespace("left")
    lab.run(("ip", "netns", "add", left))
    sleeper = subprocess.Popen(["ip", "netns", "exec", left, "sleep", "600"])
    ends = tuple(plan.Cable(plan.host_name(i), "s0", 40) for i in range(2))
    pair = plan.Plan("pair", ("s0",), ends, hosts=2)
    spec = {"chip": {"name": "cpu-host", "scale_out.nic_gb_per_s": 0.005}, "devices": 2, "nodes": 2}
    job = {**cases.job(cases.MODELS[0], 40), "cluster": spec, "plan": {"expert": 2}}
    request = {"do": "collectives", "case": "pair", "job": job, "list": [("all_to_all", 2, 1, 2**18, 2)], "samples": 2}
    with lab.lab(2) as network:
        assert sleeper.wait(timeout=10) < 0
        network.plug(pair)
        with crew(2, tmp_path) as hosts:
            tables = [read_table(path) for path in hosts.ask(request, 240)]
    assert lab.namespaces() == [] and not list(lab.FILES.glob(f"{plan.PREFIX}*"))
    for host, table in enumerate(tables):
        [row] = table.rows
        assert row.device == host and row.level == "Ethernet"
        # Half of it leaves; the bucket lets one burst pass at once.
        assert (row.seconds or 0) > 0.9 * 2**17 / 5e6
