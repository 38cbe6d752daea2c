"""Scores of forecasts against measurements: the record that `moecast validate` prints, writes and draws.

Errors are fractions, forecast / measured - 1. Seconds, bytes and FLOPs are per device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = "1"


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One measured quantity beside its forecast.

    `interval` is what the forecast states around itself (p10 to p90), None where it states none. `baseline` is what the
    table's constant gives, None where it has nothing to multiply. `work_flops` are the model FLOPs of a device in a
    step, None but for steps. `fitted` says for what the profile used this row, empty where it did not.
    """

    id: str
    table: str
    quantity: str
    unit: str
    chip: str
    model: str
    op_class: str
    kind: str
    measured: float
    forecast: float
    interval: tuple[float, float] | None
    baseline: float | None
    work_flops: float | None = None
    job_hash: str = ""
    fitted: str = ""
    interval_fitted: bool = False

    @property
    def error(self) -> float:
        """forecast / measured - 1."""
        return self.forecast / self.measured - 1


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row, or a quantity of it, that was not scored, and why."""

    id: str
    table: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scores:
    """How far off a set of forecasts is; None where it cannot be said.

    `bias` is the median error, `p90_abs_error` the 90th percentile of the absolute one. `spearman` ranks forecasts
    against measurements (one unit only, three rows or more), `flops_spearman` achieved model FLOP/s of a device
    (steps). `coverage` is the share of rows inside the interval that their forecast states, of the `intervals` rows
    that have one; rows that the interval itself was read from are left out of it: `coverage_in_sample` is theirs.
    """

    rows: int
    median_abs_error: float | None
    mean_abs_error: float | None
    p90_abs_error: float | None
    bias: float | None
    spearman: float | None
    flops_spearman: float | None = None
    coverage: float | None = None
    intervals: int = 0
    coverage_in_sample: float | None = None
    intervals_in_sample: int = 0


@dataclass(frozen=True, slots=True)
class Constant:
    """The baseline of one quantity of one table: one constant, the least absolute relative error on the rows scored.

    `value` says it as people do: an MFU, a share of a bandwidth, a factor; `meaning` says which.
    """

    table: str
    quantity: str
    value: float
    meaning: str
    rows: int


@dataclass(frozen=True, slots=True)
class Group:
    """Scores of the rows that share a chip, model, op class, quantity, table or `kind`, the baseline's beside them."""

    by: str
    name: str
    scores: Scores
    baseline: Scores | None


@dataclass(frozen=True, slots=True)
class TableUsed:
    """A table as given: what it was taken for, its rows, and how many of them `--where` and `--first-per` chose."""

    name: str
    kind: str
    table_rows: int
    chosen_rows: int


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """All that a validation found; rows = forecast + skipped, always.

    A table of several quantities has one entry for each quantity of a row. `fitted_rows` counts scored rows that the
    profile was fitted on (only where that was allowed); `held_out` are the scores without them.
    """

    tables: tuple[TableUsed, ...]
    profile: str
    engine: str
    allow_fitted: bool
    rows: int
    scored: tuple[ScoredRow, ...]
    skipped: tuple[SkippedRow, ...]
    scores: Scores
    baseline: Scores | None
    constants: tuple[Constant, ...]
    groups: tuple[Group, ...]
    fitted_rows: int
    held_out: Scores | None
    notes: tuple[str, ...] = ()
    version: str = field(default=VERSION)

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many rows were skipped for each reason, the most frequent first."""
        counts: dict[str, int] = {}
        for row in self.skipped:
            counts[row.reason] = counts.get(row.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; its names are a contract (docs/validate.md)."""
        groups: dict[str, dict[str, Any]] = {}
        for g in self.groups:
            beside = None if g.baseline is None else asdict(g.baseline)
            groups.setdefault(g.by, {})[g.name] = {**asdict(g.scores), "baseline": beside}
        per_row = [
            {**asdict(r), "error": r.error, "interval": list(r.interval) if r.interval else None} for r in self.scored
        ]
        return {
            "version": self.version,
            "tables": [asdict(t) for t in self.tables],
            "profile": self.profile,
            "engine": self.engine,
            **asdict(self.scores),
            "rows": self.rows,
            "forecast": len(self.scored),
            "skipped": [asdict(s) for s in self.skipped],
            "reasons": dict(self.reasons),
            "baseline": None if self.baseline is None else asdict(self.baseline),
            "constants": [asdict(c) for c in self.constants],
            "groups": groups,
            "allow_fitted": self.allow_fitted,
            "fitted_rows": self.fitted_rows,
            "held_out": None if self.held_out is None else asdict(self.held_out),
            "notes": list(self.notes),
            "per_row": per_row,
        }
