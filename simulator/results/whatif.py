"""Answers to what if: grids of forecasts, and how much each number of chip and model weighs in a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = "1"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of values and its forecast; where a rule refuses it, `refused` says which and numbers are None.

    `usd_per_1b_tokens` is None without a price.
    """

    values: dict[str, Any]
    refused: str | None = None
    step_time_s: float | None = None
    memory_peak_bytes: float | None = None
    fits: bool | None = None
    mfu: float | None = None
    tokens_per_s_per_device: float | None = None
    all_to_all_exposed_s: float | None = None
    usd_per_1b_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """All combinations of the values of some fields, in order: the last field changes fastest. `base` is the job's."""

    job: str
    cluster: str
    engine: str
    axes: dict[str, tuple[Any, ...]]
    base: Cell
    cells: tuple[Cell, ...]
    version: str = field(default=VERSION)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings, lists and mappings."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Weight:
    """How much one number weighs: `elasticity` is per cent of step time for one per cent of the number.

    A central difference in logarithms over `down` and `up` times the `value`; one of them is 1 where the other side is
    refused. `kind` is rate, latency, efficiency, slowdown, size or model. `better` is the value twice as good (half, of
    a latency; at most 1, of an efficiency), `speed_up` the step's then; both None for the model's. `refused` says why a
    number could not be varied.
    """

    name: str
    kind: str
    value: float
    down: float
    up: float
    elasticity: float | None
    better: float | None = None
    speed_up: float | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Weights of all numbers of a job, the heaviest first, by the closed form.

    `rates` and `latencies` are sums of elasticities: a chip all of whose rates double and whose latencies halve takes
    half the time, so that rates less latencies are -1 (but for kinks within the differences).
    """

    job: str
    cluster: str
    step_time_s: float
    weights: tuple[Weight, ...]
    rates: float
    latencies: float
    version: str = field(default=VERSION)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings, lists and mappings."""
        return asdict(self)
