"""How many chips a run needs: forecasts of the best plan at each count, with days, dollars and energy of the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = "1"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run with a batch of its own; its step, days and the changes that make its best plan."""

    tokens: float
    sequences: int
    length: int
    step_time_s: float
    days: float
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SizePoint:
    """One count of one chip; `refused` says why no plan is there, and then the numbers are None.

    `usd` are dollars of the whole run by terms, `usd_per_step` and `usd_per_1b_tokens` at the terms asked for (of the
    last phase); kWh at thermal design power of the chips alone.
    """

    chip: str
    chips: int
    cluster: str
    refused: str | None = None
    phases: tuple[Phase, ...] = ()
    days: float | None = None
    in_time: bool = False
    in_budget: bool = False
    mfu: float | None = None
    memory_peak_bytes: float | None = None
    tokens_per_s: float | None = None
    usd: dict[str, float] = field(default_factory=dict)
    usd_per_step: float | None = None
    usd_per_1b_tokens: float | None = None
    kwh: float | None = None


@dataclass(frozen=True, slots=True)
class Sizing:
    """All counts that were tried; `smallest` is the first of each chip that is in time and in budget.

    `weak` are tokens/s by chips with the batch grown with them. `largest` is (what, number, command's value) that still
    fits the smallest answer. `prices` say terms, dollars per chip and hour, source and date by chip.
    """

    model: str
    tokens: float
    days: float
    budget_usd: float | None
    terms: str
    points: tuple[SizePoint, ...]
    smallest: tuple[SizePoint, ...]
    weak: tuple[tuple[str, int, float], ...]
    largest: tuple[str, int] | None
    prices: dict[str, tuple[tuple[str, float, str, str], ...]]
    checkpoint_bytes: float
    checkpoint_s: float | None
    version: str = VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings, lists and mappings."""
        return asdict(self)
