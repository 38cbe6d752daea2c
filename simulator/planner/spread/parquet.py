"""Plans as the bytes of a Parquet file: columns `plan.tensor` and alike by name, numbers, and a record beside them.

The same plans are the same bytes: nothing in them says when, where or how fast they were found.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.planner.kept import NUMBERS, Kept
from simulator.planner.table import CHOICES, FIELDS

_KEY = b"moecast"


def encode(kept: Kept, record: dict[str, Any], more: dict[str, NDArray[Any]] | None = None) -> bytes:
    """Plans, with a `record` for the reader and `more` columns after theirs, as a file."""
    pa: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    columns: dict[str, Any] = {}
    for name, codes in zip(FIELDS, kept.codes.T, strict=True):
        if name in CHOICES:
            texts = pa.array([_text(v) for v in CHOICES[name]], type=pa.string())
            columns[name] = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int8)), texts)
        else:
            columns[name] = pa.array(codes.astype(np.int32))
    columns |= {name: pa.array(column) for name, column in zip(NUMBERS, kept.numbers.T, strict=True)}
    columns |= {name: pa.array(column) for name, column in (more or {}).items()}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(record, sort_keys=True)})
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def decode(data: bytes) -> tuple[Kept, dict[str, Any]]:
    """Plans and record of such a file; ValueError for bytes that are none, such as half of one."""
    pa: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.read_table(pa.BufferReader(data))
        record = json.loads(table.schema.metadata[_KEY])
        codes = np.empty((table.num_rows, len(FIELDS)), dtype=np.int64)
        for i, name in enumerate(FIELDS):
            codes[:, i] = _codes(name, table[name]) if name in CHOICES else table[name].to_numpy()
        numbers = [table[name].to_numpy() for name in NUMBERS]
    except (pa.ArrowException, KeyError, TypeError, OSError) as error:
        raise ValueError(f"no file of plans: {error}") from None
    return Kept(codes, np.stack(numbers, axis=1).reshape(-1, len(NUMBERS))), record


def _codes(name: str, column: Any) -> NDArray[np.int64]:
    """Codes of the texts of a field with names; a file's own numbering of them may be another."""
    known = {_text(v): i for i, v in enumerate(CHOICES[name])}
    out = np.empty(len(column), dtype=np.int64)
    at = 0
    for chunk in column.chunks:
        own = np.array([known[text] for text in chunk.dictionary.to_pylist()], dtype=np.int64)
        out[at : at + len(chunk)] = own[chunk.indices.to_numpy()]
        at += len(chunk)
    return out


def _text(what: Any) -> str:
    if isinstance(what, tuple):
        return ",".join(what)
    if what is None:
        return "default"
    return str(what).lower() if isinstance(what, bool) else str(what)
