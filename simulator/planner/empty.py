"""Why a search found nothing: which constraint, rule or memory is to blame, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.planner.constraints import Constraint
from simulator.planner.outcome import Outcome
from simulator.planner.space import Space


def why_empty(out: Outcome, space: Space, constraints: Sequence[Constraint], capacity: float) -> str:
    """One line for an outcome without a feasible plan; `capacity` are the bytes of a device."""
    for c in constraints:
        column = np.array(space.values[c.name]) if c.of_plan else None
        if column is not None and not c.holds(column).any():
            i = int(c.misses_by(column).argmin())
            return f"--constraint {c.text!r}: no plan of the space holds it; nearest is {c.said(column[i])}"
    if not out.searched:
        texts = ", ".join(c.text for c in constraints if c.of_plan)
        return f"the constraints on the plan leave no plan of the space: together {texts} exclude all"
    if not out.valid:
        (name, rule), count = out.most_broken()[0]
        most = f"no plan of the space keeps the rules; {name} refused most, {count:,} of {out.searched:,}"
        return f"{most}: {_listed(space, name)}{rule}"
    for c in constraints:
        by, near = out.nearest.get(c.text, (0.0, 0.0))
        if by > 0:
            return f"--constraint {c.text!r}: no plan holds it; the nearest has {c.name} {c.said(near)}, {by:.4g} off"
    limits = [c for c in constraints if c.name == "memory_peak_bytes"]
    of = min([capacity, *(c.bound for c in limits)])
    if np.isfinite(out.smallest) and out.smallest > of:
        what = f"--constraint {limits[0].text!r}: " if limits and of < capacity else ""
        return (
            f"{what}none of {out.valid:,} plans fits: the smallest needs {out.smallest:.4g} bytes a device,"
            f" {out.smallest - of:.4g} more than {of:.4g}"
        )
    return f"no plan holds all constraints together: {', '.join(c.text for c in constraints)}"


def _listed(space: Space, name: str) -> str:
    values = space.values.get(name, ())
    return f"its values {', '.join(map(str, values[:6]))}{', ...' if len(values) > 6 else ''} " if values else ""
