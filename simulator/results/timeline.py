"""The timeline: what every device class did when. Plain typed columns; no computation.

A row is one interval on one stream of one device class. Seconds from the start of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.results.links import Drawing, LinkUse

VERSION = "1"

# Streams of a device, and what an interval is (`kinds` index these).
STREAMS = ("compute", "network", "host")
KINDS = (
    "forward", "backward", "input gradient", "weight gradient", "forward and backward", "all-to-all", "tensor",
    "parameters", "gradients", "optimizer", "host", "imbalance", "launch",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Columns of equal length: device class, stream, kind, chunk, microbatch, start and end (seconds).

    `classes` names each device class ("stage 3", or "stage 3, group 1" when unfolded); `replicas` says how many devices
    it stands for. `memory` has, per class, the times (s) and bytes of its memory curve. `links` are the busiest links:
    name, level, bytes carried, share of the step it was busy; `network` is the drawing of all or the busiest part.
    """

    classes: tuple[str, ...]
    replicas: tuple[int, ...]
    device: NDArray[np.int32]
    stream: NDArray[np.int8]
    kind: NDArray[np.int8]
    chunk: NDArray[np.int16]
    microbatch: NDArray[np.int32]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    predecessor: NDArray[np.int64]
    step_s: float
    memory: tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...] = ()
    links: tuple[LinkUse, ...] = ()
    notes: tuple[str, ...] = field(default=())
    network: Drawing | None = None

    def __len__(self) -> int:
        return len(self.start_s)
