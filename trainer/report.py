"""What a run tells while it goes, and what came of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.data import Entropies

# The loss that a run ends with is the mean of its last steps.
LAST_STEPS = 10


class Progress:
    """What a run tells while it goes; this one keeps silent."""

    def begin(self, done: int, total: int, entropies: Entropies) -> None:
        """All is read and compiled; `done` of `total` steps were done before."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A step's line of metrics."""

    def say(self, text: str) -> None:
        """Something to know, in a line."""


@dataclass(frozen=True)
class Result:
    """What came of a run: losses in nats per target, as means over the last steps; times are this process's."""

    job: str
    hash: str
    out: str
    steps: int
    resumed_from: int | None
    checkpoint: int | None
    nats: float
    held_out_nats: float | None
    unigram_nats: float
    bigram_nats: float
    dropped: float | None
    balance: float | None
    load: float | None
    rank_load: float | None
    tokens_per_s: float | None
    step_s: float | None
    compile_s: float
    devices: int
    platform: str
    processes: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def summarised(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of `Result` that follow from the newest lines of metrics."""
    last = records[-LAST_STEPS:]
    # The first step of a process waits for memory and threads; it says little.
    times = [r["seconds"] for r in records[1:]] or [r["seconds"] for r in records]
    rates = [r["tokens_per_s"] * r["seconds"] for r in last]
    step_s = statistics.median(times) if times else None

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    held_out = [r["held_out_nats"] for r in records if "held_out_nats" in r]
    out: dict[str, Any] = {
        name: mean([r[name] for r in last if name in r]) for name in ("dropped", "load", "rank_load")
    }
    return out | {
        "nats": mean([r["nats"] for r in last]) or 0.0,
        "held_out_nats": held_out[-1] if held_out else None,
        "balance": mean([r["router"]["balance"] for r in last if "balance" in r["router"]]),
        "step_s": step_s,
        "tokens_per_s": rates[-1] / step_s if step_s else None,
    }
