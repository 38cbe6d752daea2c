"""What a search over plans answers: the best plans, the front, and why not their neighbours."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = "1"


@dataclass(frozen=True, slots=True)
class RankedPlan:
    """A plan by dotted field, and its forecast; `step_time_s` is by events where `engine` says so.

    `closed_form_step_time_s` is always there. Dollars are None without a price. `overrides` are the changes to the job
    that make it this plan, as after `--set`.
    """

    plan: dict[str, Any]
    step_time_s: float
    memory_peak_bytes: float
    usd_per_1b_tokens: float | None
    mfu: float
    tokens_per_s: float
    engine: str
    closed_form_step_time_s: float
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A plan one step beside the winner, and what rejected it: `rule`, `memory`, `constraint`, `cost` or `equal`.

    `by` is how much: bytes too many, a constraint's distance, or seconds longer; `command` shows it.
    """

    field: str
    winner: Any
    value: Any
    kind: str
    said: str
    by: float | None
    command: str


@dataclass(frozen=True, slots=True)
class PlanSearch:
    """The answer of a search.

    `space` are all combinations; `searched` those whose rules were looked at, all but repetitions and what a constraint
    on the plan alone left out; `valid` keep the rules; `pruned` were dropped before their time was worked out, since
    they do not fit, or cannot be among the best nor on the front; of those `evaluated`, `too_large` do not fit, and
    `feasible` fit and hold the constraints.
    """

    job: str
    cluster: str
    objective: str
    constraints: tuple[str, ...]
    capacity_bytes: float
    space: int
    searched: int
    valid: int
    too_large: int
    pruned: int
    evaluated: int
    feasible: int
    seconds: float
    given: RankedPlan | None
    given_said: str
    best: tuple[RankedPlan, ...]
    pareto: tuple[RankedPlan, ...]
    rejected: tuple[Rejection, ...]
    broken: dict[str, int] = field(default_factory=dict)
    version: str = VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings, lists and mappings."""
        return asdict(self)
