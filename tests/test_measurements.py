"""Measurement tables: what is written is read again, and what is no table is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.calibration.tables import read_table, write_table
from simulator.results.measurement import KINDS, PASSES, Measurement, MeasurementTable

ROW = Measurement(
    "a", "by hand", "2026-11-22", "cpu-host", "none", "collective", "all_to_all", 1e-3, bytes=1024.0, group_size=4,
    p10_s=0.9e-3, p90_s=1.2e-3, samples=7,
)  # fmt: skip
positive = st.floats(1e-9, 1e9)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=("Cs",)), min_size=1)
rows = st.builds(
    Measurement, id=texts, source=texts, date=texts, chip=texts, software=texts, kind=st.sampled_from(KINDS),
    name=texts, seconds=positive, phase=st.sampled_from(PASSES), shape=st.lists(st.integers(1, 2**40)).map(tuple),
    bytes=positive, flops=st.none() | positive, calls=positive, group_size=st.integers(1, 2**40),
    device=st.none() | st.integers(0, 99), p10_s=st.none() | positive, note=st.just("") | texts,
)  # fmt: skip


@given(st.lists(rows, min_size=1, max_size=5, unique_by=lambda r: r.id), st.sampled_from([".csv", ".parquet"]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, given: list[Measurement], end: str) -> None:
    path = tmp_path_factory.mktemp("tables") / f"table{end}"
    table = MeasurementTable(
        tuple(given), {"h": {"model": "x"}}, {"h": "r.parquet"}, path.name, {"h": [(0, "forward", 0.0, 1.5)]}
    )
    write_table(table, path)
    back = read_table(path)
    assert back.rows == table.rows
    if end == ".parquet":
        assert back == table


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"seconds": -1.0}, "row 1: seconds = -1: must be a finite number greater than 0"),
        ({"seconds": 0.0}, "row 1: seconds = 0: must be"),
        ({"seconds": float("nan")}, "row 1: seconds = nan: must be"),
        ({"seconds": None}, "row 1: seconds is empty"),
        ({"p90_s": float("inf")}, "row 1: p90_s = inf: must be"),
        ({"bytes": -8.0}, "row 1: bytes = -8: must be a finite number, at least 0"),
        ({"kind": "colective"}, "row 1: kind = 'colective': known: .*did you mean 'collective'"),
        ({"kind": "memory", "bytes": None}, "row 1: bytes is empty"),
        ({"phase": "sideways"}, "row 1: phase = 'sideways': must be"),
        ({"group_size": 0}, "row 1: group_size = 0: must be at least 1"),
        ({"id": "a"}, "row 1: id = 'a': appears twice"),
        ({"chip": ""}, "row 1: chip is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], rule: str) -> None:
    path = tmp_path / "t.parquet"
    write_table(MeasurementTable((ROW, replace(ROW, **{"id": "b", **change}))), path)
    with pytest.raises(QuestionError, match=f"t.parquet, {rule}"):
        read_table(path)


def test_no_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"

    def refused(rule: str) -> None:
        with pytest.raises(QuestionError, match=rule) as error:
            read_table(path)
        assert "\n" not in str(error.value)

    refused("no such file")
    write_table(MeasurementTable((ROW,)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a Parquet table")
    table = pq.read_table(pa.BufferReader(whole))
    for changed, rule in (
        (table.drop_columns(["chip"]), "has no column chip"),
        (table.append_column("secconds", table["seconds"]), "unknown column 'secconds'.*did you mean 'seconds'"),
        (table.set_column(7, "seconds", pa.array(["x"])), "column seconds is string, not double"),
        (table.slice(0, 0), "has no rows"),
        (table.replace_schema_metadata(), "not a measurement table"),
        (table.replace_schema_metadata({b"moecast": b'{"version": 99, "jobs": {}, "routing": {}}'}), "version 99"),
    ):
        pq.write_table(changed, path)
        refused(rule)
    path = tmp_path / "t.csv"
    write_table(MeasurementTable((ROW,)), path)
    path.write_text(path.read_text().replace("0.001,", "x,"))
    refused("t.csv, line 2: seconds = 'x': not a number")
    with pytest.raises(QuestionError, match=r"must end in \.parquet or \.csv"):
        write_table(MeasurementTable((ROW,)), tmp_path / "t.txt")
