"""Loads on any graph: traffic goes along shortest paths in hops and splits evenly over the next hops.

Legend: N nodes, L links, D devices, B destinations of one batch, V levels. Cost: a breadth-first search per
destination, then one pass over its shortest-path links: seconds at 1,000 nodes, minutes at 9,000. Regular networks have
faster ways (loads_torus, loads_switched).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.network.joins import sums

Array = NDArray[np.float64]
Index = NDArray[np.int64]

# Entries (links x destinations) of one batch: about 200 MB of working arrays.
BATCH_ENTRIES = 2_000_000


def shares(source: Index, target: Index, nodes: int) -> Array:
    """Share of each pair's traffic that crosses each link ((N*N) x L), for a small graph whose nodes are devices."""
    out = np.zeros((nodes, nodes, source.size))
    for a in range(nodes):

        def one(columns: Index, a: int = a) -> tuple[Array, Array]:
            block = np.zeros((nodes, columns.size))
            block[a] = 1.0
            return block, block

        for b in range(nodes):
            level = np.zeros(source.size, dtype=np.int64)
            loads = spread(source, target, level, nodes, np.array([b]), one)
            out[a, b] = loads[0][0] if a != b else 0.0
    return out.reshape(nodes * nodes, source.size)


def spread(
    source: Index,
    target: Index,
    level: Index,
    nodes: int,
    destinations: Index,
    columns: Callable[[Index], tuple[Array, Array]],
) -> tuple[Array, Array, Array]:
    """Bytes and flows on every link by highest level crossed (V x L each), and bytes of the largest flow (V).

    `columns(batch)` gives bytes and flows (D x B) from every device to each destination of the batch.
    """
    levels, links = int(level.max(initial=0)) + 1, source.size
    total_bytes, total_flows, largest = np.zeros((levels, links)), np.zeros((levels, links)), np.zeros(levels)
    back = _reversed(source, target, nodes)
    step = max(1, BATCH_ENTRIES // max(1, links))
    for start in range(0, destinations.size, step):
        batch = destinations[start : start + step]
        hops = _hops(back, batch)
        link, column, layers, ways = _shortest(source, target, hops)
        top = _highest(source[link], target[link], level[link], column, layers, hops.shape)
        bytes_DB, flows_DB = columns(batch)
        devices = bytes_DB.shape[0]
        crossed = top[:, :devices].T
        crossed = np.where(hops[:, :devices].T > 0, crossed, -1)
        for v in range(levels):
            here = crossed == v
            if not flows_DB[here].any():
                continue
            largest[v] = max(largest[v], float(bytes_DB[here].max()))
            for values, total in ((bytes_DB, total_bytes), (flows_DB, total_flows)):
                waiting = np.zeros(hops.shape)
                waiting[:, :devices] = np.where(here, values, 0.0).T
                total[v] += _push(source, target, link, column, layers, ways, waiting, links)
    return total_bytes, total_flows, largest


def _reversed(source: Index, target: Index, nodes: int) -> Any:
    from scipy.sparse import csr_array

    return csr_array((np.ones(source.size), (target, source)), shape=(nodes, nodes))


def _hops(back: Any, batch: Index) -> NDArray[np.int32]:
    """Hops from every node to each destination (B x N); -1 where there is no path."""
    from scipy.sparse.csgraph import shortest_path

    hops = shortest_path(back, method="D", unweighted=True, indices=batch)
    return np.where(np.isfinite(hops), hops, -1).astype(np.int32)


def _shortest(source: Index, target: Index, hops: NDArray[np.int32]) -> tuple[Index, Index, list[slice], Array]:
    """Links on shortest paths with their column, far ones first, slices of equal distance, and next hops (B x N)."""
    away = hops[:, source]
    column, link = np.nonzero((away > 0) & (hops[:, target] == away - 1))
    distance = away[column, link]
    order = np.argsort(-distance, kind="stable")
    link, column, distance = link[order], column[order], distance[order]
    cuts = np.flatnonzero(np.diff(distance, prepend=-1, append=-1))
    layers = [slice(int(a), int(b)) for a, b in zip(cuts, cuts[1:], strict=False)]
    nodes = hops.shape[1]
    ways = np.bincount(column * nodes + source[link], minlength=hops.size).reshape(hops.shape)
    return link, column, layers, np.maximum(ways, 1).astype(np.float64)


def _highest(
    source: Index, target: Index, level: Index, column: Index, layers: list[slice], shape: tuple[int, ...]
) -> Index:
    """The highest level on any shortest path from each node to each destination (B x N), -1 at the destination."""
    top = np.full(shape, -1, dtype=np.int64)
    for part in reversed(layers):
        reached = np.maximum(level[part], top[column[part], target[part]])
        np.maximum.at(top, (column[part], source[part]), reached)
    return top


def _push(
    source: Index,
    target: Index,
    link: Index,
    column: Index,
    layers: list[slice],
    ways: Array,
    waiting: Array,
    links: int,
) -> Array:
    """Loads (L) after all that waits at the nodes (B x N) has gone, layer by layer, to its destination."""
    nodes = waiting.shape[1]
    share = np.empty(link.size)
    flat = waiting.ravel()
    for part in layers:
        at = column[part] * nodes + source[link[part]]
        share[part] = flat[at] / ways.ravel()[at]
        np.add.at(flat, column[part] * nodes + target[link[part]], share[part])
    return sums(link, share, links)
