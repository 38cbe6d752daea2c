"""Texts from JSONL and Parquet, with the line or row in every error."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError, nearest

# A small Parquet file can stand for a large column: what is read at a time is bounded by rows and by row group.
ROWS_AT_A_TIME = 64
MAX_ROW_GROUP_BYTES = 2**31


def jsonl_texts(content: bytes, field: str, where: str) -> Iterator[tuple[int, str]]:
    """(line, counted from 1; its text under the key `field`) of JSON lines; blank lines are passed over.

    Raises QuestionError for a line that is not a JSON object, lacks the field, or has something else than text in it.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        start = f"{where}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise QuestionError(f"{start}: not a text file (UTF-8)") from None
        except (ValueError, RecursionError):
            raise QuestionError(f"{start}: not JSON") from None
        if not isinstance(record, dict):
            raise QuestionError(f"{start}: must be a JSON object with the key {field!r:.60}")
        if field not in record:
            raise QuestionError(f"{start}: has no key {field!r:.60}{nearest(field, record)}")
        yield number, _text(record[field], field, start)


def parquet_texts(path: Path, field: str, where: str) -> Iterator[tuple[int, str]]:
    """(row, counted from 1; its text in the column `field`) of a Parquet file.

    Raises QuestionError for a file that is not Parquet or cut short, lacks the column, or has a row without text.
    """
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise QuestionError(f"{where}: Parquet needs the package pyarrow; without it write JSONL") from None
    # Of Arrow's errors, ArrowInvalid is a ValueError, ArrowKeyError a KeyError, and so on; OSError is for bad pages.
    row = 0
    errors = (arrow.ArrowException, OSError, ValueError)
    try:
        with parquet.ParquetFile(path) as table:
            _check_column(table, field, where)
            for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield row, _text(value.as_py(), field, f"{where}, row {row}")
    except QuestionError:
        raise
    except UnicodeDecodeError:
        what = f", row {row}: {field!r:.60} is not UTF-8 text" if row else ": not a whole Parquet file: bad names"
        raise QuestionError(f"{where}{what}") from None
    except errors as error:
        raise QuestionError(f"{where}: not a whole Parquet file: {' '.join(str(error).split()):.80}") from None


def _check_column(table: Any, field: str, where: str) -> None:
    names = list(table.schema_arrow.names)
    if field not in names:
        raise QuestionError(f"{where}: has no column {field!r:.60}{nearest(field, names)}")
    kind = str(table.schema_arrow.field(field).type)
    if "string" not in kind or kind.startswith(("list", "large_list", "struct", "map", "fixed_size_list")):
        raise QuestionError(f"{where}: column {field!r:.60} holds {kind:.40}; it must hold text")
    # Not the size of the column's own chunk: on a damaged file pyarrow 26 ends the process where it is asked for that.
    for group in range(table.metadata.num_row_groups):
        size = table.metadata.row_group(group).total_byte_size
        if size > MAX_ROW_GROUP_BYTES:
            rule = f"{size:,} bytes; at most {MAX_ROW_GROUP_BYTES:,} are read"
            raise QuestionError(f"{where}: row group {group + 1} has {rule}")


def _text(value: Any, field: str, start: str) -> str:
    if not isinstance(value, str):
        kind = (
            "null" if value is None else {"int": "a number", "float": "a number"}.get(type(value).__name__, "no text")
        )
        raise QuestionError(f"{start}: {field!r:.60} is {kind}; it must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which is no character.
        raise QuestionError(f"{start}: {field!r:.60} is not UTF-8 text (half a surrogate pair)") from None
    return value
