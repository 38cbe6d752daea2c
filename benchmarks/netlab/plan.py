"""Topologies as data: hosts, switches, cables and routes; the commands that build them, and the simulator's graph.

Nothing here runs anything. A host is a network namespace that keeps its address on `lo` whatever it is plugged into, so
that its process and its connections outlive a change of topology. A switch is a namespace with a bridge in it: nothing
of ours is in the machine's own network. A cable is a veth pair, each end shaped by a token bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "mcnetlab-"
HOSTS = 4
# The bridge in a switch; one named `br` would be read as an option by ip.
BRIDGE = "fabric"
# What a token bucket lets through at once. Larger ones let the start of every message pass unshaped.
BURST_BYTES = 16_000
# Of one packet that is cut into frames later: it has to fit in the bucket.
PACKET_BYTES = 12_000
# Deep enough that nothing is lost when three hosts send to one: fabrics of clusters do not drop, and what TCP makes of
# losses would be measured instead of the links.
QUEUE_MS = 2000
BYTES_PER_S = 1e6 / 8

Command = tuple[str, ...]


@dataclass(frozen=True)
class Cable:
    """A cable between two nodes, `mbit` Mbit/s each way; `level` is what the simulator calls links like it."""

    a: str
    b: str
    mbit: float
    level: str = "cable"


@dataclass(frozen=True)
class Plan:
    """One topology: `first_hop[host, other]` is the host that traffic to `other` goes to first, where no switch is."""

    name: str
    switches: tuple[str, ...]
    cables: tuple[Cable, ...]
    hosts: int = HOSTS
    first_hop: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def host_mbit(self) -> float:
        """The rate of an ordinary host's cable: the fastest that a host has."""
        return max(c.mbit for c in self.cables if host_name(0) in (c.a, c.b) or not self.switches)


def host_name(i: int) -> str:
    """The node of host `i`."""
    return f"h{i}"


def address(i: int) -> str:
    """The address of host `i`, on `lo` in its namespace."""
    return f"10.77.0.{i + 1}"


def namespace(node: str) -> str:
    """The network namespace of a host or switch."""
    return PREFIX + node


def one_switch(mbit: float, slow: Mapping[int, float] | None = None) -> Plan:
    """All hosts on one switch; `slow` hosts have cables of another rate."""
    rates = dict.fromkeys(range(HOSTS), mbit) | dict(slow or {})
    name = f"slow host, {mbit:g}" if slow else f"switch, {mbit:g}"
    return Plan(name, ("s0",), tuple(Cable(host_name(i), "s0", rate) for i, rate in rates.items()))


def two_leaves(mbit: float, trunk_mbit: float) -> Plan:
    """Half of the hosts on each of two switches, which one trunk joins."""
    cables = [Cable(host_name(i), f"s{2 * i // HOSTS}", mbit) for i in range(HOSTS)]
    return Plan(f"two leaves, {mbit:g}/{trunk_mbit:g}", ("s0", "s1"), (*cables, Cable("s0", "s1", trunk_mbit, "trunk")))


def ring(mbit: float) -> Plan:
    """Each host joined to the next; they forward for each other along the shorter way.

    Where both ways are equally long even hosts send clockwise and odd ones the other way, so that every cable carries
    the same: what the simulator's even split over equal paths comes to.
    """
    cables = tuple(Cable(host_name(i), host_name((i + 1) % HOSTS), mbit) for i in range(HOSTS))
    first_hop = {}
    for i in range(HOSTS):
        for j in range(HOSTS):
            ahead = (j - i) % HOSTS
            if ahead:
                clockwise = 2 * ahead < HOSTS or (2 * ahead == HOSTS and i % 2 == 0)
                first_hop[i, j] = (i + (1 if clockwise else -1)) % HOSTS
    return Plan(f"ring, {mbit:g}", (), cables, first_hop=first_hop)


def set_up_hosts(hosts: int = HOSTS) -> list[Command]:
    """Namespaces of the hosts, each with its address; they may forward for others."""
    out: list[Command] = []
    for i in range(hosts):
        own = namespace(host_name(i))
        out += [
            ("ip", "netns", "add", own),
            ("ip", "-n", own, "link", "set", "lo", "up"),
            ("ip", "-n", own, "addr", "add", f"{address(i)}/32", "dev", "lo"),
            (
                "ip", "netns", "exec", own, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0",
                "net.ipv4.conf.default.rp_filter=0", "net.ipv4.conf.all.send_redirects=0",
                "net.ipv4.conf.default.send_redirects=0", "net.ipv4.tcp_congestion_control=reno",
            ),
        ]  # fmt: skip
    return out


def hosts_file(i: int, machine: str) -> str:
    """The hosts file of host `i`: gloo takes the address of the machine's name for its own."""
    return f"127.0.0.1 localhost\n{address(i)} {machine} {host_name(i)}\n"


def plug(plan: Plan) -> list[Command]:
    """Switches, cables with their shaping, then routes."""
    out: list[Command] = []
    for switch in plan.switches:
        own = namespace(switch)
        out += [
            ("ip", "netns", "add", own),
            ("ip", "-n", own, "link", "add", "name", BRIDGE, "type", "bridge"),
            ("ip", "-n", own, "link", "set", BRIDGE, "up"),
        ]
    for c in plan.cables:
        out.append(
            ("ip", "link", "add", port(c.b), "netns", namespace(c.a), "type", "veth",
             "peer", "name", port(c.a), "netns", namespace(c.b))
        )  # fmt: skip
        for node, other in ((c.a, c.b), (c.b, c.a)):
            own, end = namespace(node), port(other)
            out.append(("ip", "-n", own, "link", "set", end, "gso_max_size", str(PACKET_BYTES)))
            out.append(("tc", "-n", own, "qdisc", "add", "dev", end, "root", *_bucket(c.mbit)))
            if node in plan.switches:
                out.append(("ip", "-n", own, "link", "set", end, "master", BRIDGE))
            out.append(("ip", "-n", own, "link", "set", end, "up"))
    return out + _routes(plan)


def unplug(plan: Plan) -> list[Command]:
    """Cables first, by the end of their first node, then switches; hosts stay, their routes go with the cables."""
    cables: list[Command] = [("ip", "-n", namespace(c.a), "link", "del", port(c.b)) for c in plan.cables]
    return cables + [("ip", "netns", "del", namespace(s)) for s in plan.switches]


def port(other: str) -> str:
    """The end of a cable that leads to `other`."""
    return f"to-{other}"


def _bucket(mbit: float) -> Command:
    return ("tbf", "rate", f"{mbit:g}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")


def _routes(plan: Plan) -> list[Command]:
    out: list[Command] = []
    for i in range(plan.hosts):
        ends = [c.b if c.a == host_name(i) else c.a for c in plan.cables if host_name(i) in (c.a, c.b)]
        for j in range(plan.hosts):
            if i == j:
                continue
            hop = plan.first_hop.get((i, j))
            via = () if hop is None or hop == j else ("via", address(hop))
            end = ends[0] if hop is None else host_name(hop)
            onlink = ("onlink",) if via else ()
            out.append(
                ("ip", "-n", namespace(host_name(i)), "route", "add", f"{address(j)}/32", *via, "dev", port(end),
                 *onlink, "src", address(i))
            )  # fmt: skip
    return out


def graph(plan: Plan) -> dict[str, Any]:
    """The same network as the simulator reads it (`moecast forecast --topology`), cables both ways, without latency."""
    nodes = [{"id": host_name(i), "device": i} for i in range(plan.hosts)] + [{"id": s} for s in plan.switches]
    links = [
        {"source": c.a, "target": c.b, "bandwidth_gb_per_s": c.mbit * BYTES_PER_S * 1e-9, "latency_us": 0.0,
         "level": c.level}
        for c in plan.cables
    ]  # fmt: skip
    return {"directed": False, "nodes": nodes, "links": links}
