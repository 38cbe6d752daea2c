"""Collects what happened: rows of the timeline, parts of a step, memory over time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from simulator.results.links import Drawing, LinkUse
from simulator.results.timeline import KINDS, Timeline

KIND = {name: i for i, name in enumerate(KINDS)}
COMPUTE, NETWORK, HOST = 0, 1, 2


@dataclass(slots=True)
class Spent:
    """Seconds of one device class by part of a step; what is left of the step is waiting."""

    compute_s: float = 0.0
    all_to_all_s: float = 0.0
    other_s: float = 0.0
    host_s: float = 0.0
    imbalance_s: float = 0.0


@dataclass(slots=True)
class Recorder:
    """Rows as typed arrays: a step of a large job has some ten thousand."""

    device: array[int] = field(default_factory=lambda: array("i"))
    stream: array[int] = field(default_factory=lambda: array("b"))
    kind: array[int] = field(default_factory=lambda: array("b"))
    chunk: array[int] = field(default_factory=lambda: array("h"))
    microbatch: array[int] = field(default_factory=lambda: array("i"))
    start: array[float] = field(default_factory=lambda: array("d"))
    end: array[float] = field(default_factory=lambda: array("d"))
    predecessor: array[int] = field(default_factory=lambda: array("q"))

    def add(
        self,
        device: int,
        stream: int,
        kind: int,
        chunk: int,
        microbatch: int,
        start: float,
        end: float,
        before: int = -1,
    ) -> int:
        """Append a row; returns its index. `before` is the row whose end let this one start, -1 if none did."""
        self.device.append(device)
        self.stream.append(stream)
        self.kind.append(kind)
        self.chunk.append(chunk)
        self.microbatch.append(microbatch)
        self.start.append(start)
        self.end.append(end)
        self.predecessor.append(before)
        return len(self.start) - 1

    def timeline(
        self,
        step_s: float,
        classes: tuple[str, ...],
        replicas: tuple[int, ...],
        memory: list[tuple[list[float], list[float]]],
        links: tuple[LinkUse, ...],
        network: Drawing | None = None,
    ) -> Timeline:
        """The finished record."""
        return Timeline(
            classes=classes,
            replicas=replicas,
            device=np.array(self.device, np.int32),
            stream=np.array(self.stream, np.int8),
            kind=np.array(self.kind, np.int8),
            chunk=np.array(self.chunk, np.int16),
            microbatch=np.array(self.microbatch, np.int32),
            start_s=np.array(self.start),
            end_s=np.array(self.end),
            predecessor=np.array(self.predecessor, np.int64),
            step_s=step_s,
            memory=tuple((np.array(t), np.array(b)) for t, b in memory),
            links=links,
            network=network,
        )
