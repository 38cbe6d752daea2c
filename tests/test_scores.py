"""Statistics of a validation by hand and beside NumPy, and the hash that tells a row again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.calibration.scores import least_absolute, quantile, score, spearman
from simulator.results.measurement import Measurement, measurement_hash, row_hash
from simulator.results.validation import ScoredRow

positive = st.floats(1e-6, 1e6)


def scored(measured: float, forecast_: float, **more: Any) -> ScoredRow:
    plain: dict[str, Any] = {
        "id": "1", "table": "t", "quantity": "time", "unit": "s", "chip": "c", "model": "", "op_class": "o", "kind": "",
        "interval": None, "baseline": None,
    }  # fmt: skip
    return ScoredRow(measured=measured, forecast=forecast_, **(plain | more))


def test_scores_by_hand() -> None:
    rows = [
        scored(1.0, 1.1),
        scored(2.0, 1.6),
        scored(4.0, 6.0, interval=(3.0, 4.5)),
        scored(8.0, 8.0, interval=(9.0, 10.0)),
    ]
    s = score(rows)
    assert (s.rows, s.intervals, s.coverage) == (4, 2, 0.5)
    assert s.median_abs_error == pytest.approx(0.15) and s.mean_abs_error == pytest.approx(0.2)
    assert s.bias == pytest.approx(0.05) and s.p90_abs_error == pytest.approx(0.2 + 0.7 * 0.3)
    assert s.spearman == 1.0
    assert score([*rows, scored(1.0, 1.0, unit="bytes")]).spearman is None
    seen = score([replace(rows[2], interval_fitted=True), rows[3]])
    assert (seen.coverage, seen.coverage_in_sample) == (0.0, 1.0)


def test_ranks_and_quantiles_agree_with_numpy() -> None:
    import numpy as np

    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert quantile(values, 0.9) == pytest.approx(np.quantile(values, 0.9))
    # By ranks: (1, 2, 3, 4) beside (2, 1, 4, 3): 1 - 6 x 4 / (4 x 15).
    assert spearman([1, 2, 3, 4], [20, 10, 40, 30]) == pytest.approx(0.6)
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1, 2], [1, 2]) is None


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=12), positive)
def test_no_constant_beats_the_baseline(pairs: list[tuple[float, float]], other: float) -> None:
    bases, measured = zip(*pairs, strict=True)

    def cost(c: float) -> float:
        return sum(abs(c * b / m - 1) for b, m in pairs)

    best = least_absolute(bases, measured)
    assert all(cost(best) <= cost(c) * (1 + 1e-9) + 1e-9 for c in [other, best * 0.99, best * 1.01])


FIELDS = {"source": "a", "seconds": 1.5, "shape": (1, 2), "bytes": 8}


def test_a_hash_is_of_values() -> None:
    same = [
        {"source": "a", "seconds": "1.50", "shape": "1x2", "bytes": "8.0"},
        dict(reversed(FIELDS.items())),
        {**FIELDS, "dtype": ""},
    ]
    assert all(row_hash(s) in (row_hash(FIELDS), row_hash({**FIELDS, "shape": "1x2"})) for s in same)
    assert len({row_hash({**FIELDS, k: "other"}) for k in FIELDS} | {row_hash(FIELDS)}) == 1 + len(FIELDS)
    row = Measurement("1", "s", "2026-11-22", "cpu-host", "x", "kernel", "stream", 1e-3, bytes=8.0)
    assert measurement_hash(row) == measurement_hash(replace(row, id="2", date="2027-01-01", note="copied"))
    assert measurement_hash(row) != measurement_hash(replace(row, seconds=1.1e-3))
