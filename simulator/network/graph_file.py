"""A user's own fabric from a file: GraphML, or JSON in networkx's node-link form. Bounded in size; no entities.

Nodes with `device = i` are the JAX devices 0, 1, ...; all others are switches. Links have `bandwidth_gb_per_s` and
`latency_us` per direction, and a `level` if they like; an undirected edge stands for a link each way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hw_profiles.errors import QuestionError, nearest
from simulator.network.graphml import read_graphml
from simulator.network.topology import Topology

MAX_BYTES = 64_000_000
MAX_NODES = 100_000
MAX_LINKS = 1_000_000
MAX_LEVELS = 16
LINK_KEYS = ("source", "target", "bandwidth_gb_per_s", "latency_us", "level")


@dataclass(slots=True)
class Drawn:
    """Nodes and edges as the file has them, attributes unread."""

    directed: bool = True
    nodes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    edges: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)


def topology_from_file(path: str | Path) -> Topology:
    """The network in `path`: GraphML (.graphml, .xml) or JSON (.json); loads on it take the general way.

    Raises QuestionError, one line, for a file that is missing, too large or not of these forms, for a device index that
    is missing or there twice, and for links without bandwidth or between unknown nodes.
    """
    path = Path(path)
    where = str(path)
    kind = path.suffix.lower()
    if kind not in (".graphml", ".xml", ".json"):
        raise QuestionError(f"{where}: must end in .graphml, .xml or .json")
    data = _read(path, where)
    drawn = _from_json(data, where) if kind == ".json" else _from_graphml(data, where)
    return _topology(drawn, path.stem, where)


def _read(path: Path, where: str) -> bytes:
    try:
        if not path.is_file():
            raise QuestionError(f"{where}: not a file" if path.exists() else f"{where}: no such file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > MAX_BYTES else file.read(MAX_BYTES + 1)
    except OSError as error:
        raise QuestionError(f"{where}: {str(error.strerror).lower()}") from None
    if max(size, len(data)) > MAX_BYTES:
        raise QuestionError(f"{where}: {size:,} bytes; at most {MAX_BYTES:,} are read")
    return data


def _from_graphml(data: bytes, where: str) -> Drawn:
    directed, nodes, edges = read_graphml(data, where)
    return Drawn(directed, nodes, edges)


def _from_json(data: bytes, where: str) -> Drawn:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise QuestionError(f"{where}: not JSON: {' '.join(str(error).split()):.100}") from None
    links = raw.get("links", raw.get("edges")) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(raw.get("nodes"), list) or not isinstance(links, list):
        raise QuestionError(f"{where}: a mapping with lists `nodes` and `links` is needed (networkx node-link form)")
    out = Drawn(raw.get("directed", True) is not False)
    for i, node in enumerate(raw["nodes"]):
        if not isinstance(node, dict) or "id" not in node:
            raise QuestionError(f"{where}: nodes[{i}] = {_short(node)}: must be a mapping with an `id`")
        out.nodes.append((_label(node["id"], f"{where}: nodes[{i}].id"), node))
    for i, link in enumerate(links):
        if not isinstance(link, dict) or "source" not in link or "target" not in link:
            raise QuestionError(f"{where}: links[{i}] = {_short(link)}: must be a mapping with `source` and `target`")
        ends = (_label(link[end], f"{where}: links[{i}].{end}") for end in ("source", "target"))
        out.edges.append((*ends, link))  # type: ignore[arg-type]
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise QuestionError(f"{where} = {_short(value)}: must be text or a whole number")
    return str(value)


def _topology(drawn: Drawn, name: str, where: str) -> Topology:
    if len(drawn.nodes) > MAX_NODES or len(drawn.edges) > MAX_LINKS:
        count = f"{len(drawn.nodes):,} nodes and {len(drawn.edges):,} links"
        raise QuestionError(f"{where}: {count}; at most {MAX_NODES:,} and {MAX_LINKS:,} are read")
    names, devices = _ordered(drawn.nodes, where)
    number = {label: i for i, label in enumerate(names)}
    rows: list[tuple[int, int, float, float, str]] = []
    seen: set[tuple[int, int]] = set()
    for source, target, attributes in drawn.edges:
        link = f"{where}: link {_short(source)} -> {_short(target)}"
        for end in (source, target):
            if end not in number:
                raise QuestionError(f"{link}: there is no node {_short(end)}{nearest(end, names[:1000])}")
        a, b = number[source], number[target]
        if a == b:
            raise QuestionError(f"{link}: a link must join two nodes")
        rate = _number(attributes, "bandwidth_gb_per_s", link) * 1e9
        latency = _number(attributes, "latency_us", link) * 1e-6
        level = str(attributes.get("level", "network"))
        for ends in ((a, b), (b, a)) if not drawn.directed else ((a, b),):
            if ends in seen:
                raise QuestionError(f"{link}: there twice; give one link with the bandwidth of both")
            seen.add(ends)
            rows.append((*ends, rate, latency, level))
    if not rows and devices > 1:
        raise QuestionError(f"{where}: no links")
    levels = _levels(rows, devices, where)
    return Topology(
        name=name,
        devices=devices,
        kinds=(("device", devices), ("switch", len(names) - devices)),
        source=np.array([r[0] for r in rows], dtype=np.int64),
        target=np.array([r[1] for r in rows], dtype=np.int64),
        bandwidth_bytes_per_s=np.array([r[2] for r in rows], dtype=np.float64),
        latency_s=np.array([r[3] for r in rows], dtype=np.float64),
        level=np.array([levels.index(r[4]) for r in rows], dtype=np.int64),
        level_names=levels,
        names=tuple(names),
        note=f"Read from {Path(where).name}; traffic takes shortest paths in hops, evenly over equal ones.",
    )


def _ordered(nodes: Iterable[tuple[str, Mapping[str, Any]]], where: str) -> tuple[list[str], int]:
    """Names of all nodes, devices first in their order, and how many devices there are."""
    devices: dict[int, str] = {}
    others: list[str] = []
    known: set[str] = set()
    for label, attributes in nodes:
        if label in known:
            raise QuestionError(f"{where}: node {_short(label)} is there twice")
        known.add(label)
        if "device" not in attributes:
            others.append(label)
            continue
        value = _number(attributes, "device", f"{where}: node {_short(label)}")
        if value != int(value) or value < 0:
            raise QuestionError(f"{where}: node {_short(label)}: device = {value:g}: must be a whole number from 0")
        if int(value) in devices:
            raise QuestionError(f"{where}: device {value:g} is both {_short(devices[int(value)])} and {_short(label)}")
        devices[int(value)] = label
    if not devices:
        raise QuestionError(f"{where}: no node has `device`, the index of the JAX device that it is")
    for i in range(len(devices)):
        if i not in devices:
            raise QuestionError(f"{where}: {len(devices)} devices, but none is device {i}; they must be 0, 1, ...")
    return [devices[i] for i in range(len(devices))] + others, len(devices)


def _number(attributes: Mapping[str, Any], key: str, where: str) -> float:
    if key not in attributes:
        given = [str(k) for k in attributes if k not in LINK_KEYS and k != "id"]
        hint = nearest(key, given)
        raise QuestionError(f"{where}: {key}: required, and missing" + hint.replace("did you mean", "there is"))
    value = attributes[key]
    try:
        number = float(value) if not isinstance(value, bool) else np.nan
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if not np.isfinite(number):
        raise QuestionError(f"{where}: {key} = {_short(value)}: must be a finite number")
    return float(number)


def _levels(rows: list[tuple[int, int, float, float, str]], devices: int, where: str) -> tuple[str, ...]:
    """Names of the levels, lowest first: those next to devices before those behind switches, then the fastest."""
    around: dict[int, list[int]] = {}
    for a, b, *_ in rows:
        around.setdefault(a, []).append(b)
        around.setdefault(b, []).append(a)
    away = dict.fromkeys(range(devices), 0)
    edge = list(away)
    while edge:
        following = []
        for node in edge:
            for other in around.get(node, ()):
                if other not in away:
                    away[other] = away[node] + 1
                    following.append(other)
        edge = following
    rank: dict[str, tuple[int, float]] = {}
    for a, b, rate, _, level in rows:
        # A node that nothing joins to a device is found out when the topology is made.
        here = (min(away.get(a, 0), away.get(b, 0)), -rate)
        rank[level] = min(rank.get(level, here), here)
    if len(rank) > MAX_LEVELS:
        raise QuestionError(f"{where}: {len(rank)} levels of links; at most {MAX_LEVELS}")
    return tuple(sorted(rank, key=lambda name: rank[name])) or ("network",)
