"""What-if numbers: a chip with some of its quantities replaced or scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.schema import Chip, Quantity

# Zero is a meaning for a delay or a reserve; for a rate or a size it would divide by zero later.
_MAY_BE_ZERO = ("_us", "framework_reserve_gib")
# In YAML an unquoted *2 is an alias, so x2 means the same.
_FACTOR_SIGNS = ("*", "x")
_FRACTIONS = (
    "ring_efficiency",
    "all_to_all_efficiency",
    "attention_forward",
    "attention_backward",
    "efficiency.memory",
)


def quantities(record: BaseModel | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Quantity]]:
    """Dotted name and quantity of every number in `record` that has a source."""
    for name, value in record.items() if isinstance(record, dict) else record:
        path = f"{prefix}{name}"
        if isinstance(value, Quantity):
            yield path, value
        elif isinstance(value, (BaseModel, dict)):
            yield from quantities(value, f"{path}.")


def _changed(old: float, change: str | float, path: str) -> float:
    text = str(change).strip()
    scales = text.startswith(_FACTOR_SIGNS)
    try:
        new = float(text[1:] if scales else text) * (old if scales else 1.0)
    except ValueError:
        raise QuestionError(f"cluster.chip.{path} = {text!r:.60}: a number, or a factor such as '*2' or x2") from None
    if not math.isfinite(new) or new < 0 or (new == 0 and not path.endswith(_MAY_BE_ZERO)):
        raise QuestionError(f"cluster.chip.{path} = {text!r:.60}: must be a finite number above zero")
    if new > 1 and path.endswith(_FRACTIONS):
        raise QuestionError(f"cluster.chip.{path} = {text!r:.60}: a fraction of the peak, at most 1, not {new:g}")
    return new


def _replace(record: Any, path: list[str], new: Quantity) -> Any:
    """A copy of the frozen `record` in which the quantity at `path` is `new`."""
    name, rest = path[0], path[1:]
    child = record[name] if isinstance(record, dict) else getattr(record, name)
    value = _replace(child, rest, new) if rest else new
    return {**record, name: value} if isinstance(record, dict) else record.model_copy(update={name: value})


def apply_overrides(chip: Chip, changes: Mapping[str, str | float]) -> Chip:
    """`chip` with numbers changed: {"peak_tflops.bf16": "*0.5", "scale_out.nic_gb_per_s": 100}.

    A text that begins with `*` or `x` scales the profile's number; anything else replaces it, in the key's unit.
    QuestionError for a name the chip does not have (with the nearest one) and for impossible values.
    """
    known = dict(quantities(chip))
    for path, change in changes.items():
        old = known.get(path)
        if old is None:
            raise QuestionError(f"cluster.chip: {path:.60}: no such number in {chip.name}{nearest(path, known)}")
        value = _changed(old.value, change, path)
        note = f"was {old.value:g} ({old.source})"
        new = Quantity(value=value, source="override", date=old.date, confidence="assumption", note=note)
        chip = _replace(chip, path.split("."), new)
    return chip
