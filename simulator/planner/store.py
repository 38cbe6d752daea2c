"""Plans as a Parquet dataset: a folder with one record of what it holds, and files of rows as they come.

Columns are `plan.tensor` and alike by name, and the numbers of `search.NUMBERS`. The record, `search.json`, has the
version of the form and the hash of the question: a folder of another version or question is refused, never mixed.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.files import read_bytes, write_whole
from simulator.planner.table import CHOICES, FIELDS, Column

VERSION = "1"
RECORD = "search.json"
# Rows that are held back before a file is written.
ROWS_PER_FILE = 500_000
MOST_RECORD_BYTES = 1 << 20


class Store:
    """A folder of plans that is being written."""

    def __init__(self, folder: Path, question: str) -> None:
        self.folder, self.rows, self.files = folder, 0, 0
        self._waiting: list[dict[str, Any]] = []
        self._held = 0
        record = folder / RECORD
        if folder.exists() and not folder.is_dir():
            raise QuestionError(f"{folder}: is a file; results are written to a folder")
        if record.exists():
            check(folder, question)
            for old in sorted(folder.glob("part-*.parquet")):
                old.unlink()
        elif folder.exists() and any(folder.iterdir()):
            raise QuestionError(f"{folder}: holds something else: no {RECORD} in it")
        folder.mkdir(parents=True, exist_ok=True)
        self._record(question, complete=False)
        self.question = question

    def add(self, codes: dict[str, Column], numbers: dict[str, Column]) -> None:
        """More plans: codes by field and numbers by name."""
        self._waiting.append({**codes, **numbers})
        self._held += len(next(iter(numbers.values())))
        if self._held >= ROWS_PER_FILE:
            self._write()

    def close(self) -> None:
        """Write what is held back, and that the results are whole."""
        self._write()
        self._record(self.question, complete=True)

    def _write(self) -> None:
        import numpy as np

        pa: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
        if not self._waiting:
            return
        columns: dict[str, Any] = {}
        for name in self._waiting[0]:
            values = np.concatenate([w[name] for w in self._waiting])
            if name in CHOICES:
                texts = pa.array([_text(v) for v in CHOICES[name]], type=pa.string())
                columns[name] = pa.DictionaryArray.from_arrays(pa.array(values.astype(np.int8)), texts)
            else:
                columns[name] = pa.array(values.astype(np.int32) if name in FIELDS else values)
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table(columns), sink)
        write_whole(self.folder / f"part-{self.files:05d}.parquet", sink.getvalue().to_pybytes())
        self.files, self.rows = self.files + 1, self.rows + self._held
        self._waiting, self._held = [], 0

    def _record(self, question: str, complete: bool) -> None:
        record = {"version": VERSION, "question": question, "complete": complete, "rows": self.rows}
        write_whole(self.folder / RECORD, json.dumps(record, indent=2).encode())


def check(folder: Path, question: str | None = None) -> dict[str, Any]:
    """The record of a folder of plans; QuestionError where it is of another version, or of another `question`."""
    path = folder / RECORD
    try:
        record = json.loads(read_bytes(path, MOST_RECORD_BYTES, str(path)))
    except ValueError as error:
        if isinstance(error, QuestionError):
            raise
        raise QuestionError(f"{path}: not JSON") from None
    found = record.get("version") if isinstance(record, dict) else None
    if found != VERSION:
        raise QuestionError(f"{folder}: results of version {found!r:.20}; this moecast writes and reads {VERSION!r}")
    if question is not None and record.get("question") != question:
        raise QuestionError(f"{folder}: holds the results of another question; name another folder")
    return dict(record)


def _text(what: Any) -> str:
    if isinstance(what, tuple):
        return ",".join(what)
    if what is None:
        return "default"
    return str(what).lower() if isinstance(what, bool) else str(what)
