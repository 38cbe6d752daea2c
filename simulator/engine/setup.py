"""What a run of the engine needs, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulator.engine.load_patterns import Patterns, no_pattern
from simulator.engine.record import Recorder, Spent
from simulator.engine.work import DeviceWork
from simulator.workload.orders import Action


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a run needs, priced and resolved.

    `excess(group, stage, microbatch)` is the busiest expert rank's load over the mean, minus one, averaged over the
    layers with experts of a model stage; `pattern` the loads of all its ranks, for all-to-alls. `slowdown` is what
    overlapped communication costs the compute beside it (0.1: a tenth longer). `straggler(stage, group)` multiplies
    compute. `base_bytes` are the bytes a rank always holds. `launch_s` is what the host needs to launch one kernel; 0
    where whole programs are launched.
    """

    schedule: str
    orders: list[list[Action]]
    devices: list[DeviceWork]
    microbatches: int
    virtual: int
    hop_s: float
    slowdown: float
    groups: int
    replicas: int
    excess: Callable[[int, int, int], float]
    straggler: Callable[[int, int], float]
    base_bytes: list[float]
    host_s: float
    pattern: Patterns = no_pattern
    launch_s: float = 0.0

    @property
    def stages(self) -> int:
        """Pipeline ranks."""
        return len(self.devices)

    @property
    def model_stages(self) -> int:
        """Stages in the order of the model's layers, virtual ones counted."""
        return self.stages if self.schedule == "dualpipe" else self.stages * self.virtual


@dataclass(slots=True)
class Run:
    """What a run leaves: end of the step, seconds by part and class, rows, memory curves per class."""

    step_s: float
    spent: list[Spent]
    recorder: Recorder
    memory: list[tuple[list[float], list[float]]]
    finished_s: list[float]
