"""A network as a drawing with the load of its links: a plane of a torus, tiers of a fat tree, or a laid-out graph.

What is too large is shown in part: the part round the busiest link. Coordinates are of the page, x to the right and y
upwards, in units of the distance between neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from simulator.network.layouts import AXES, SwitchedLayout, TorusLayout
from simulator.network.topology import Topology
from simulator.results.links import Drawing, DrawnLink, DrawnNode

Array = NDArray[np.float64]
Place = tuple[float, float]

# What still reads as a drawing on a page.
MOST_SIDE = 16
MOST_DEVICES = 32
MOST_SPINES, MOST_CORES = 8, 4
MOST_NODES = 60


def draw(t: Topology, utilisation: Array) -> Drawing:
    """The drawing of `t` whose links are busy for the share `utilisation` (L) of the step."""
    busiest = int(np.argmax(utilisation)) if utilisation.size else 0
    if isinstance(t.layout, TorusLayout):
        return _plane(t, t.layout, utilisation, busiest)
    if isinstance(t.layout, SwitchedLayout):
        return _tiers(t, t.layout, utilisation, busiest)
    return _free(t, utilisation, busiest)


def _kinds(t: Topology) -> list[str]:
    """The kind of every node (N)."""
    return [kind for kind, count in t.kinds for _ in range(count)] or ["node"] * t.nodes


def _drawing(
    t: Topology, places: dict[int, Place], utilisation: Array, note: str, stubs: Iterable[tuple[int, int]] = ()
) -> Drawing:
    """Nodes at their places and the links between them; those in `stubs` leave the drawing and come back."""
    kinds = _kinds(t)
    nodes = tuple(DrawnNode(t.node_name(n), kinds[n], x, y) for n, (x, y) in places.items())
    shown = np.zeros(t.nodes, dtype=np.bool_)
    shown[list(places)] = True
    around = {tuple(sorted(pair)) for pair in stubs}
    best: dict[tuple[int, int], int] = {}
    for i in np.flatnonzero(shown[t.source] & shown[t.target]).tolist():
        a, b = int(t.source[i]), int(t.target[i])
        pair = (min(a, b), max(a, b))
        if pair not in best or utilisation[i] > utilisation[best[pair]]:
            best[pair] = i
    links = []
    for (a, b), i in best.items():
        (x0, y0), (x1, y1) = places[a], places[b]
        lines = [((x0, x1), (y0, y1))]
        if (a, b) in around:
            # Half a step beyond either end: the link closes the ring behind the page.
            dx, dy = float(np.sign(x1 - x0)) / 2, float(np.sign(y1 - y0)) / 2
            lines = [((x0 - dx, x0), (y0 - dy, y0)), ((x1, x1 + dx), (y1, y1 + dy))]
        name, level = t.link_name(i), t.level_names[int(t.level[i])]
        links += [DrawnLink(name, level, float(utilisation[i]), x, y) for x, y in lines]
    return Drawing(nodes, tuple(links), note)


def _window(length: int, around: int, most: int) -> range:
    """At most `most` of `length` in a row, `around` among them."""
    if length <= most:
        return range(length)
    first = min(max(around - most // 2, 0), length - most)
    return range(first, first + most)


def _plane(t: Topology, layout: TorusLayout, utilisation: Array, busiest: int) -> Drawing:
    """The plane of chips in which the busiest link lies."""
    dims, base = layout.dims, layout.devices if layout.devices_per_chip > 1 else 0
    flat = layout.ici.reshape(-1)
    busy = np.where(flat >= 0, utilisation[np.maximum(flat, 0)], -1.0).reshape(layout.ici.shape)
    axis, _, chip = (int(i) for i in np.unravel_index(int(np.argmax(busy)), busy.shape))
    at = layout.coordinates(chip)
    slice_, others = chip // layout.slice_chips, [a for a in range(len(dims)) if a != axis]
    across = max(others, key=lambda a: dims[a], default=axis)
    down, right = sorted((axis, across))
    rows = _window(dims[down], at[down], MOST_SIDE) if down != right else range(1)
    columns = _window(dims[right], at[right], MOST_SIDE)
    places: dict[int, Place] = {}
    number: dict[tuple[int, int], int] = {}
    for r in rows:
        for c in columns:
            here = list(at)
            here[right] = c
            if down != right:
                here[down] = r
            node = base + slice_ * layout.slice_chips + int(np.ravel_multi_index(here, dims))
            number[r, c] = node
            places[node] = (float(c), float(-r))
    stubs = []
    if layout.wrap[right] and dims[right] > 2 and len(columns) == dims[right]:
        stubs += [(number[r, columns[0]], number[r, columns[-1]]) for r in rows]
    if down != right and layout.wrap[down] and dims[down] > 2 and len(rows) == dims[down]:
        stubs += [(number[rows[0], c], number[rows[-1], c]) for c in columns]
    shape = "x".join(map(str, dims))
    fixed = ", ".join(f"{AXES[a]} = {at[a]}" for a in others if a != across)
    note = f"Chips of a {shape} torus" + (f", the plane {fixed} with the busiest link" if fixed else "")
    note += f", slice {slice_} of {layout.slices}" if layout.slices > 1 else ""
    note += "" if len(places) == dims[right] * (dims[down] if down != right else 1) else ", in part"
    ways = f", {AXES[right]} to the right" + (f", {AXES[down]} downwards" if down != right else "")
    return _drawing(t, places, utilisation, note + ways + ". Lines that end outside close a ring.", stubs)


def _spread(nodes: list[int], width: float, y: float) -> dict[int, Place]:
    """A row of nodes over the width of the drawing."""
    return {n: (width * (i + 0.5) / len(nodes), y) for i, n in enumerate(nodes)}


def _tiers(t: Topology, layout: SwitchedLayout, utilisation: Array, busiest: int) -> Drawing:
    """Devices in a row per domain, its switch below, leaves, spines and cores above."""
    ends = int(t.source[busiest]), int(t.target[busiest])
    m = layout.domain
    device = min(ends)
    if device >= t.devices:
        # Above the leaves: a device below the leaf, or the first.
        above = np.argwhere((layout.leaf_up == busiest) | (layout.leaf_down == busiest))
        leaf = int(above[0, 0]) if above.size else 0
        device = int(np.argmax(layout.leaf == leaf)) if layout.leaf.size else 0
    domains = _window(layout.domains, device // m, max(1, MOST_DEVICES // m))
    inside = _window(m, device % m, MOST_DEVICES)
    places: dict[int, Place] = {}
    x = 0.0
    counts = [count for _, count in t.kinds]
    first = dict(zip((kind for kind, _ in t.kinds), [0, *np.cumsum(counts)[:-1].tolist()], strict=True))
    switch = next((kind for kind, _ in t.kinds if kind not in ("device", "leaf", "spine", "core")), None)
    for d in domains:
        begin = x
        for i in inside:
            if layout.crossbar:
                places[d * m + i] = (x, 0.0)
                x += 1.0
            else:
                angle = 2 * np.pi * (i - inside[0]) / len(inside)
                places[d * m + i] = (begin + 2 + 1.8 * float(np.cos(angle)), 0.9 * float(np.sin(angle)))
        x = x if layout.crossbar else begin + 4.0
        if switch is not None and m > 1:
            places[first[switch] + d] = ((begin + x - 1) / 2, -1.0)
        x += 1.0
    width = x - 2.0
    up = 0.0 if layout.crossbar else 0.6
    shown = [n for n in places if n < t.devices]
    if layout.leaf.size:
        leaves = np.unique(layout.leaf[shown])
        places |= _spread([first["leaf"] + int(f) for f in leaves], width, 1.0 + up)
        if layout.leaf_up.size:
            spines = np.unique(t.target[layout.leaf_up[leaves].ravel()])
            near = _near(spines, ends, MOST_SPINES)
            places |= _spread(near, width, 2.0 + up)
            if layout.core_up.size:
                above = np.isin(t.source, near) & (t.target >= first["core"])
                places |= _spread(_near(np.unique(t.target[above]), ends, MOST_CORES), width, 3.0 + up)
    parts = [f"{len(shown)} of {t.devices:,} devices"] if len(shown) < t.devices else [f"{t.devices} devices"]
    for kind, count in t.kinds[1:]:
        there = sum(first[kind] <= n < first[kind] + count for n in places)
        parts.append(f"{there} of {count} {kind}" if there < count else f"{count} {kind}")
    start = "Round the busiest link: " if len(places) < t.nodes else ""
    return _drawing(t, places, utilisation, start + ", ".join(parts) + ".")


def _near(nodes: NDArray[np.int64], ends: tuple[int, int], most: int) -> list[int]:
    """At most so many of `nodes`, an end of the busiest link among them."""
    at = next((int(np.argmax(nodes == e)) for e in ends if (nodes == e).any()), 0)
    return [int(nodes[i]) for i in _window(nodes.size, at, most)]


def _free(t: Topology, utilisation: Array, busiest: int) -> Drawing:
    """A graph from a file, laid out by its springs (Fruchterman and Reingold 1991, as in networkx, seeded)."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(t.nodes))
    graph.add_edges_from(zip(t.source.tolist(), t.target.tolist(), strict=True))
    chosen = [int(t.source[busiest])] if t.links else [0]
    for _, b in networkx.bfs_edges(graph, chosen[0]):
        if len(chosen) < MOST_NODES:
            chosen.append(int(b))
    layout = networkx.spring_layout(graph.subgraph(sorted(chosen)), seed=0, scale=4.0)
    places = {n: (round(float(x), 6), round(float(y), 6)) for n, (x, y) in sorted(layout.items())}
    note = f"{len(places)} of {t.nodes:,} nodes, those nearest to the busiest link" if len(places) < t.nodes else t.name
    return _drawing(t, places, utilisation, note + ".")
