"""Small engine set-ups made by hand: stages with round times, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import simpy

from simulator.engine.run import Engine, Run, Setup
from simulator.engine.work import ChunkWork, DeviceWork, PassWork, Transfer
from simulator.network.flight import TICK_S
from simulator.results.timeline import KINDS
from simulator.workload.orders import ORDERS

SHORT = {"forward": "F", "backward": "B", "input gradient": "I", "weight gradient": "W", "forward and backward": "FB"}


class Instant:
    """A network on which a transfer takes as many seconds as it has bytes."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env

    def transfer(self, t: Transfer, stage: int, group: int, pattern: object = None) -> simpy.Event:
        del stage, group, pattern
        ticks = round(t.bytes / TICK_S)
        return self.env.timeout(ticks, value=(self.env.now, self.env.now + ticks))

    def uneven_share(self, event: simpy.Event) -> float:
        del event
        return 0.0

    def span(self, event: simpy.Event) -> tuple[float, float]:
        begin, end = event.value
        return begin * TICK_S, end * TICK_S


def chunk(f: float = 1.0, i: float = 1.0, w: float = 1.0, kept: float = 1.0, **transfers: list[Transfer]) -> ChunkWork:
    """A chunk of one layer with these seconds; `forward=[...]` and `input=[...]` add transfers."""
    return ChunkWork(
        PassWork(f, transfers=transfers.get("forward", [])),
        PassWork(i, transfers=transfers.get("input", [])),
        PassWork(w),
        kept,
        1,
    )


def setup(
    schedule: str,
    stages: int,
    microbatches: int,
    virtual: int = 1,
    *,
    devices: list[DeviceWork] | None = None,
    **changes: Any,
) -> Setup:
    """A set-up with equal chunks (1 s forward, 1 s each gradient) unless `devices` are given."""
    chunks = 2 if schedule == "dualpipe" else virtual
    made = devices or [DeviceWork([chunk() for _ in range(chunks)], [], [], 0.0, 1) for _ in range(stages)]
    no_excess: Callable[[int, int, int], float] = lambda group, stage, microbatch: 0.0  # noqa: E731
    values: dict[str, Any] = {
        "schedule": schedule,
        "orders": [ORDERS[schedule](p, stages, microbatches, virtual) for p in range(stages)],
        "devices": made,
        "microbatches": microbatches,
        "virtual": virtual,
        "hop_s": 0.0,
        "slowdown": 0.0,
        "groups": 1,
        "replicas": 1,
        "excess": no_excess,
        "straggler": lambda stage, group: 1.0,
        "base_bytes": [0.0] * stages,
        "host_s": 0.0,
    }
    return Setup(**(values | changes))


def run(made: Setup) -> Run:
    """The step of a set-up."""
    return Engine(made, Instant).run()


def story(made: Setup) -> list[str]:
    """The compute rows of each device as one line: `F0 0-1` is microbatch 0's forward; `F0.1` that of chunk 1."""
    result = run(made)
    rows = result.recorder
    lines = []
    for device in range(len(made.devices) * made.groups):
        mine = [i for i in range(len(rows.start)) if rows.device[i] == device and rows.stream[i] == 0]
        words = []
        for i in mine:
            name = SHORT.get(KINDS[rows.kind[i]])
            if name:
                where = f".{rows.chunk[i]}" if len(made.devices[0].chunks) > 1 else ""
                words.append(f"{name}{rows.microbatch[i]}{where} {rows.start[i]:g}-{rows.end[i]:g}")
        lines.append(", ".join(words))
    return lines


def most_kept(made: Setup) -> list[float]:
    """The most microbatch chunks whose activations each device keeps at once (every chunk keeps 1 byte)."""
    return [max(bytes_) for _, bytes_ in run(made).memory]
