"""Recorded counts of tokens per expert, from the job's folder.

The file is a table with the columns step, layer, expert, tokens: assignments that each expert of each layer got in a
training step. A layer's number is its place in the model from 0, encoder first, MTP modules after the last layer.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.files import inside, read_bytes

if TYPE_CHECKING:
    import pandas as pd

MAX_BYTES = 100_000_000
# A Parquet file of a few bytes can hold any number of rows.
MAX_ROWS = 20_000_000
COLUMNS = ("step", "layer", "expert", "tokens")


def read_counts(
    path: str, folder: Path, layers: Sequence[int], experts: int, tokens_times_k: Sequence[float]
) -> NDArray[np.float64]:
    """Assignments of each expert, [layers, experts], mean over the recorded steps.

    `layers` are the numbers of the model's layers with experts, `tokens_times_k` the assignments that each makes in a
    step. Raises QuestionError, one line naming file, row or column and rule, for anything but such a table.
    """
    start = f"training.routing.file = {path!r:.60}"
    file = inside(path, folder, start)
    table = _read(file, read_bytes(file, MAX_BYTES, start), start)
    columns = [_numbers(table, name, start, file.suffix == ".csv") for name in COLUMNS]
    if not len(columns[0]):
        raise QuestionError(f"{start}: has no rows")
    step, layer, expert, tokens = columns
    row = _Rows(start, file.suffix == ".csv")
    known = np.array(sorted(layers))
    at = np.minimum(np.searchsorted(known, layer), len(known) - 1)
    row.check(known[at] == layer, layer, "layer", f"the model's layers with experts are {_span(known)}")
    row.check((expert >= 0) & (expert < experts), expert, "expert", f"the model's experts are 0 to {experts - 1}")
    row.check(tokens >= 0, tokens, "tokens", "must not be negative")
    steps, which = np.unique(step, return_inverse=True)
    cell = (which * len(known) + at) * experts + expert.astype(np.int64)
    cells = len(steps) * len(known) * experts
    if len(cell) != cells or len(np.unique(cell)) != cells:
        _explain_width(cell, steps, known, experts, row)
    flat = np.empty(cells)
    flat[cell] = tokens
    counts = flat.reshape(len(steps), len(known), experts)
    sent = np.array([dict(zip(layers, tokens_times_k, strict=True))[x] for x in known])
    sums = counts.sum(axis=-1)
    for bad, rule in (((sums > sent * (1 + 1e-9)), "sent"), ((sums <= 0), "none")):
        if bad.any():
            s, i = (int(x[0]) for x in np.nonzero(bad))
            words = (
                f"has {sums[s, i]:,.0f} tokens x k; the job sends {sent[i]:,.0f}" if rule == "sent" else "has no tokens"
            )
            raise QuestionError(f"{start}: step {steps[s]:.0f}, layer {known[i]} {words}")
    order = np.searchsorted(known, np.array(layers))
    mean: NDArray[np.float64] = counts.mean(axis=0)[order]
    return mean


def _read(file: Path, data: bytes, start: str) -> pd.DataFrame:
    import pandas as pd

    if file.suffix not in (".csv", ".parquet"):
        raise QuestionError(f"{start}: must end in .csv or .parquet")
    if file.suffix == ".parquet":
        table = _parquet(data, start)
    else:
        if b"\0" in data:
            raise QuestionError(f"{start}: not a text file (NUL byte)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                table = pd.read_csv(
                    io.BytesIO(data.rstrip()), index_col=False, skip_blank_lines=False, low_memory=False,
                    encoding="utf-8-sig", skipinitialspace=True,
                )  # fmt: skip
        except pd.errors.EmptyDataError:
            raise QuestionError(f"{start}: is empty") from None
        except UnicodeDecodeError:
            raise QuestionError(f"{start}: not a text file (UTF-8)") from None
        except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError, OverflowError, csv_error()) as error:
            raise QuestionError(f"{start}: not a CSV table: {' '.join(str(error).split()):.80}") from None
    names = [str(c).strip() for c in table.columns]
    unknown = next((n for n in names if n not in COLUMNS), None)
    if unknown is not None:
        hint = nearest(unknown[:40], COLUMNS) or f"; known: {', '.join(COLUMNS)}"
        raise QuestionError(f"{start}: unknown column {unknown!r:.40}{hint}")
    missing = next((n for n in COLUMNS if n not in names), None)
    if missing is not None:
        raise QuestionError(f"{start}: has no column {missing}; needs {', '.join(COLUMNS)}")
    if len(names) > len(COLUMNS):
        raise QuestionError(f"{start}: a column appears twice")
    table.columns = pd.Index(names)
    return table


def csv_error() -> type[Exception]:
    """The error of Python's own CSV reader, which pandas lets through."""
    import csv

    return csv.Error


def _parquet(data: bytes, start: str) -> pd.DataFrame:
    import pandas as pd

    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise QuestionError(f"{start}: Parquet needs the package pyarrow; without it write the table as CSV") from None
    try:
        opened = parquet.ParquetFile(io.BytesIO(data))
        rows = int(opened.metadata.num_rows)
        if rows <= MAX_ROWS:
            return pd.DataFrame(opened.read().to_pandas())
    except (OSError, ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise QuestionError(f"{start}: not a Parquet table: {' '.join(str(error).split()):.80}") from None
    raise QuestionError(f"{start}: {rows:,} rows; at most {MAX_ROWS:,} are read")


def _numbers(table: pd.DataFrame, name: str, start: str, csv: bool) -> NDArray[np.float64]:
    """A column as finite numbers, whole but for tokens (which may be means)."""
    import pandas as pd

    column = table[name]
    row = _Rows(start, csv)
    kind = getattr(column.dtype, "kind", "O")
    numbers = column if kind in "iuf" else pd.to_numeric(column.astype(str), errors="coerce")
    values: NDArray[np.float64] = np.asarray(numbers.to_numpy(dtype=np.float64, na_value=np.nan))
    row.check(np.isfinite(values), column, name, "must be a finite number")
    row.check(np.abs(values) < 2**53, values, name, "is too large")
    if name != "tokens":
        row.check(values == np.floor(values), values, name, "must be a whole number")
    return values


class _Rows:
    """Names the first bad row: its line in a CSV file, its number from 0 in a Parquet file."""

    def __init__(self, start: str, csv: bool) -> None:
        self.start, self.csv = start, csv

    def check(self, good: Any, values: Any, column: str, rule: str) -> None:
        """QuestionError for the first row that is not `good`."""
        if not np.all(good):
            i = int(np.argmin(good))
            value = values.iloc[i] if hasattr(values, "iloc") else values[i]
            text = (
                repr(value) if isinstance(value, str) else f"{value:.12g}" if isinstance(value, float) else str(value)
            )
            where = f"line {i + 2}" if self.csv else f"row {i}"
            raise QuestionError(" ".join(f"{self.start}, {where}: {column} = {text:.40}: {rule}".split()))


def _span(known: NDArray[np.int64]) -> str:
    if len(known) == known[-1] - known[0] + 1:
        return f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0])
    return ", ".join(str(x) for x in known[:8]) + (", ..." if len(known) > 8 else "")


def _explain_width(
    cell: NDArray[np.int64], steps: NDArray[np.float64], known: NDArray[np.int64], experts: int, row: _Rows
) -> None:
    """QuestionError naming the first (step, layer, expert) that is there twice or missing."""
    found, times = np.unique(cell, return_counts=True)
    if (times > 1).any():
        bad, words = int(found[np.argmax(times > 1)]), "appears twice"
    else:
        gap = np.nonzero(found != np.arange(len(found)))[0]
        bad, words = int(gap[0]) if len(gap) else len(found), "is missing"
    s, rest = divmod(bad, len(known) * experts)
    i, e = divmod(rest, experts)
    raise QuestionError(f"{row.start}: step {steps[s]:.0f}, layer {known[i]}, expert {e} {words}")
