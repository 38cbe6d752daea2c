"""Where the difference between two steps comes from: part by part, and op class by op class within a part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = "1"


@dataclass(frozen=True, slots=True)
class Share:
    """Seconds of a step (mean over devices) that one op class has within one part; they sum to the step.

    `name` is an op class, a collective, `not by op` (what the forecast adds or hides beyond single ops) or empty for a
    part that has no ops.
    """

    part: str
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two jobs: what it is, and its forecast in a few numbers; dollars are None without a price."""

    name: str
    model: str
    cluster: str
    devices: int
    tokens_per_step: float
    step_time_s: float
    tokens_per_s_per_device: float
    mfu: float
    memory_peak_bytes: float
    memory_capacity_bytes: float
    usd_per_1b_tokens: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Seconds of one op class (or of a whole part) in either step; `difference_s` is the second's less the first's."""

    part: str
    name: str
    a_s: float
    b_s: float

    @property
    def difference_s(self) -> float:
        """Seconds that the second step has more."""
        return self.b_s - self.a_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two steps; `parts` and `rows` each add up to the difference of the step times.

    `changed` are the fields of the jobs that differ: dotted name, the first's value and the second's.
    """

    a: Side
    b: Side
    engine: str
    parts: tuple[Difference, ...]
    rows: tuple[Difference, ...]
    changed: tuple[tuple[str, Any, Any], ...]
    version: str = field(default=VERSION)

    @property
    def difference_s(self) -> float:
        """Step time of the second less that of the first."""
        return self.b.step_time_s - self.a.step_time_s

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings, lists and mappings."""
        out = asdict(self)
        for key in ("parts", "rows"):
            out[key] = [asdict(d) | {"difference_s": d.difference_s} for d in getattr(self, key)]
        out["changed"] = [{"field": name, "a": a, "b": b} for name, a, b in self.changed]
        return out | {"difference_s": self.difference_s}
