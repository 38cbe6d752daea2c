"""Constraints on plans, such as `memory_peak_bytes<=70e9` or `plan.tensor<=8`: parsed, never evaluated as code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hw_profiles.errors import QuestionError, nearest
from simulator.planner.table import CHOICES, FIELDS, Column, code, value

# What an answer has a column of; larger or smaller, each has its own unit in the name.
MEASURES = ("step_time_s", "memory_peak_bytes", "mfu", "usd_per_1b_tokens", "tokens_per_s", "devices")
NAMES = (*MEASURES, *FIELDS)
_FORM = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|==|!=|<|>|=)\s*(\S.*?)\s*")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<=": np.less_equal,
    ">=": np.greater_equal,
    "<": np.less,
    ">": np.greater,
    "==": np.equal,
    "!=": np.not_equal,
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A name, a comparison and a number (of a field with names: its code)."""

    text: str
    name: str
    sign: str
    bound: float

    @property
    def of_plan(self) -> bool:
        """Whether the plan alone decides it, before anything is forecast."""
        return self.name in FIELDS

    def holds(self, column: Any) -> Any:
        """Where the constraint holds; NaN never does."""
        return _COMPARE[self.sign](column, self.bound)

    def misses_by(self, column: Column) -> Column:
        """How far each row is from holding, in the unit of the name; 0 where it holds."""
        return np.where(self.holds(column), 0.0, np.abs(column - self.bound))

    def said(self, number: float) -> str:
        """A value of the constraint's name, as people write it."""
        return str(value(self.name, number)) if self.name in CHOICES else f"{number:.6g}"


def parse_constraint(text: str) -> Constraint:
    """`plan.tensor<=8` as a constraint; QuestionError naming what is wrong with any other text."""
    start = f"--constraint {text!r:.80}"
    found = _FORM.fullmatch(text)
    if found is None:
        raise QuestionError(f"{start}: write it as NAME<=NUMBER, such as memory_peak_bytes<=70e9 (also < > >= == !=)")
    name, sign, given = found.groups()
    if name not in NAMES:
        raise QuestionError(f"{start}: unknown name {name!r}{nearest(name, NAMES)}")
    sign = "==" if sign == "=" else sign
    if name in CHOICES:
        if sign not in ("==", "!="):
            raise QuestionError(f"{start}: {name} has names, not numbers: compare it with == or !=")
        try:
            return Constraint(text.strip(), name, sign, code(name, _named(name, given)))
        except QuestionError as error:
            raise QuestionError(f"{start}: {error}") from None
    try:
        bound = float(given)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise QuestionError(f"{start}: {given!r:.40} is not a finite number")
    return Constraint(text.strip(), name, sign, bound)


def _named(name: str, given: str) -> Any:
    """The value of a field that is written as `given`."""
    if name == "plan.placement.order":
        return tuple(part.strip() for part in given.strip("[]").split(","))
    return next((v for v in CHOICES[name] if str(v).lower() == given.lower()), given)


def all_hold(constraints: Sequence[Constraint], columns: Mapping[str, Any], n: int) -> Column:
    """Rows where every constraint whose name is among `columns` holds."""
    out = np.ones(n, dtype=np.bool_)
    for c in constraints:
        if c.name in columns:
            out &= c.holds(columns[c.name])
    return out
