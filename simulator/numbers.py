"""Numbers or NumPy arrays: the few functions that formulas need beyond + - * /.

Formulas are written once and serve one plan (plain numbers, no NumPy imported) or many (columns). Scalars take the
short way because one forecast evaluates some hundreds of them and must stay under two milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# A plain number, or a NumPy array of them. NumPy is not imported for plain numbers, so it cannot be named here.
Number = Any

_PLAIN = (int, float)


def maximum(a: Number, b: Number) -> Number:
    """Larger of the two, element by element."""
    if isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
        return a if a > b else b
    import numpy as np

    return np.maximum(a, b)


def minimum(a: Number, b: Number) -> Number:
    """Smaller of the two, element by element."""
    if isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
        return a if a < b else b
    import numpy as np

    return np.minimum(a, b)


def ceil(a: Number) -> Number:
    """Rounded up."""
    if isinstance(a, _PLAIN):
        return math.ceil(a)
    import numpy as np

    return np.ceil(a)


def where(condition: Number, a: Number, b: Number) -> Number:
    """`a` where the condition holds, else `b`."""
    if isinstance(condition, (bool, *_PLAIN)):
        return a if condition else b
    import numpy as np

    return np.where(condition, a, b)


def some(condition: Number) -> bool:
    """Whether the condition holds, or holds for any element."""
    return bool(condition) if isinstance(condition, (bool, *_PLAIN)) else bool(condition.any())


def largest(values: Sequence[Number], default: Number = 0.0) -> Number:
    """Largest of several numbers or columns, element by element."""
    out = values[0] if len(values) else default
    for value in values[1:]:
        out = maximum(out, value)
    return out


def log10(a: Number) -> Number:
    """Decimal logarithm of positive numbers."""
    if isinstance(a, _PLAIN):
        return math.log10(a)
    import numpy as np

    return np.log10(a)


def round_up(a: Number, multiple: Number) -> Number:
    """`a` rounded up to a multiple."""
    return ceil(a / multiple) * multiple
