"""How an uneven collective is cut into parts of its own, where it contends with others.

A part progresses at one rate, so its flows should be alike in two ways. In size: of flows of equal bandwidth the small
ones leave early, and a part that mixes sizes keeps their share. And in what else holds them back: a flow from a source
that is busy elsewhere is slow, and whoever is in its part waits for it. So flows are cut by size, in classes of 10 %,
and each class in quarters by the end that does not set the size. Neighbours share the links above their node or leaf,
or those of a torus, and so what holds them back: they stay in one quarter. (Dealt over all quarters they held up every
one, and the flows beside them: on a tree of 4:1 a collective was 10 % too early, and another 9 % late.) Members of one
switch share nothing, and are dealt in turn. tests/test_reference_flows.py prints what is left of the error against
every flow by itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEP, QUARTERS = 1.1, 4


def size_class(sizes: ArrayLike) -> NDArray[np.int64]:
    """The class of each positive size: 0 for the largest, one less for each 10 % below it."""
    values = np.asarray(sizes, dtype=np.float64)
    out: NDArray[np.int64] = np.round(np.log(values / values.max()) / np.log(STEP)).astype(np.int64)
    return out


def quarters(members: int, one_switch: bool) -> NDArray[np.int64]:
    """The quarter of each member of a group by its place: neighbours together, or in turn on `one_switch`."""
    place = np.arange(members)
    out: NDArray[np.int64] = place % QUARTERS if one_switch else place * QUARTERS // members
    return out
