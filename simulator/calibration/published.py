"""The tables that can be scored: which one a file is, by its columns; its rows, checked; and those of them chosen.

Five tables of published measurements as they stand, and our own. What a row of each asks is said by one module a table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.files import read_bytes
from simulator.calibration.collective_rows import collective_question
from simulator.calibration.gpt_rows import gpt_job
from simulator.calibration.kernel_rows import kernel_question
from simulator.calibration.maxtext_rows import maxtext_questions
from simulator.calibration.measurement_rows import measurement_questions
from simulator.calibration.questions import Question, step_question
from simulator.calibration.step_rows import step_job
from simulator.calibration.tables import MAX_BYTES, NEEDED, csv_text_rows, read_table
from simulator.results.measurement import measurement_hash, row_hash

Row = Mapping[str, str]
Found = Question | QuestionError
FEWEST_COLUMNS = 0.5


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of table: the columns that it needs, those that tell a row from others, and what its rows ask.

    `positive` columns must be greater than 0 where they are not empty, `counted` ones at least 0.
    """

    name: str
    needs: tuple[str, ...]
    identity: tuple[str, ...]
    positive: tuple[str, ...]
    counted: tuple[str, ...]
    questions: Callable[[Row], list[Found]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A chosen row: its id, its hash, its columns as text, and its questions (or why it has none)."""

    id: str
    hash: str
    columns: Row
    found: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """What a file gave: its kind, how many rows it has, and those chosen; `sha256` of the file."""

    path: str
    name: str
    kind: str
    sha256: str
    table_rows: int
    entries: tuple[Entry, ...]


def _step(row: Row) -> list[Found]:
    if not row["step_time_s"]:
        raise QuestionError("no step time is stated")
    return [step_question(row["id"], step_job(row), float(row["step_time_s"]), row["model"], row["kind"])]


def _gpt(row: Row) -> list[Found]:
    if not row["step_time_s"]:
        raise QuestionError("no step time is stated")
    model = f"GPT {row['layers']} x {row['hidden']}"
    return [step_question(row["id"], gpt_job(row), float(row["step_time_s"]), model, "dense")]


KINDS = (
    Kind(
        "train_steps",
        ("id", "kind", "source", "model", "hardware", "num_devices", "topology", "precision", "seq_len", "global_batch",
         "micro_batch", "TP", "PP", "VPP", "CP", "EP", "ETP", "FSDP_DP", "sharding_notes", "recompute", "dispatcher",
         "overlap_flags", "step_time_s", "tokens_per_s_per_device", "model_TFLOPs_per_device", "notes"),
        ("source", "model", "hardware", "num_devices", "precision", "seq_len", "global_batch", "micro_batch", "TP",
         "PP", "VPP", "CP", "EP", "ETP", "FSDP_DP", "recompute", "dispatcher", "overlap_flags", "step_time_s"),
        ("step_time_s", "tokens_per_s_per_device", "model_TFLOPs_per_device"), (), _step,
    ),
    Kind(
        "gpt_a100_steps",
        ("id", "software", "hardware", "num_devices", "hidden", "heads", "layers", "seq_len", "vocab", "global_batch",
         "micro_batch", "TP", "DP", "PP", "step_time_s"),
        ("software", "hardware", "num_devices", "hidden", "heads", "layers", "seq_len", "vocab", "global_batch",
         "micro_batch", "TP", "DP", "PP", "step_time_s"),
        ("step_time_s",), (), _gpt,
    ),
    Kind(
        "collectives",
        ("id", "source_key", "source", "chip", "n_devices", "n_nodes", "inter_node", "collective",
         "message_bytes_per_rank", "time_us", "algbw_GBps", "busbw_GBps", "dtype", "library", "tokens_per_rank",
         "hidden", "topk", "sms", "fit"),
        ("source", "chip", "n_devices", "n_nodes", "inter_node", "collective", "message_bytes_per_rank", "time_us",
         "algbw_GBps", "busbw_GBps", "dtype", "library", "tokens_per_rank", "hidden", "topk", "sms"),
        ("time_us", "algbw_GBps", "busbw_GBps", "n_devices", "n_nodes", "tokens_per_rank", "hidden", "topk", "sms"),
        ("message_bytes_per_rank",), lambda row: [collective_question(row)],
    ),
    Kind(
        "kernels",
        ("id", "source", "chip", "kind", "m", "n", "k", "groups", "dtype", "time_us", "tflops", "gbps", "bytes",
         "library", "topk", "ep", "tp", "routing"),
        ("source", "chip", "kind", "m", "n", "k", "groups", "dtype", "time_us", "tflops", "gbps", "bytes", "library",
         "topk", "ep", "tp", "routing"),
        ("m", "n", "k", "groups", "time_us", "tflops", "gbps", "bytes", "topk", "ep", "tp"), (),
        lambda row: [kernel_question(row)],
    ),
    Kind(
        "maxtext_compiled",
        ("id", "model", "topology", "n_devices", "mesh", "per_device_batch", "seq", "remat", "capacity_factor",
         "ring_of_experts", "argument_bytes", "peak_memory_bytes", "hbm_total_bytes", "flops_executed_balanced",
         "all_gather_result_bytes", "all_reduce_operand_bytes", "reduce_scatter_operand_bytes",
         "all_to_all_operand_bytes", "ragged_all_to_all_ring_wire_bytes"),
        ("model", "topology", "mesh", "per_device_batch", "seq", "remat", "capacity_factor", "ring_of_experts",
         "argument_bytes", "hbm_total_bytes", "flops_executed_balanced"),
        ("n_devices", "per_device_batch", "seq", "argument_bytes", "peak_memory_bytes", "hbm_total_bytes",
         "flops_executed_balanced"),
        ("all_gather_result_bytes", "all_reduce_operand_bytes", "reduce_scatter_operand_bytes",
         "all_to_all_operand_bytes", "ragged_all_to_all_ring_wire_bytes"), maxtext_questions,
    ),
)  # fmt: skip


def kind_of(columns: Sequence[str], start: str) -> Kind | None:
    """The published table with these columns, None for one of ours; QuestionError, naming the column that it lacks."""
    shares = {kind.name: sum(c in columns for c in kind.needs) / len(kind.needs) for kind in KINDS}
    best = max(KINDS, key=lambda kind: shares[kind.name])
    ours = sum(c in columns for c in NEEDED) / len(NEEDED)
    if ours > shares[best.name] or ours == 1:
        return None
    if shares[best.name] < FEWEST_COLUMNS:
        known = ", ".join([*(kind.name for kind in KINDS), "measurements"])
        raise QuestionError(f"{start}: not a table that can be scored: its columns are those of none of {known}")
    missing = next((c for c in best.needs if c not in columns), None)
    if missing is not None:
        raise QuestionError(
            f"{start}: has no column {missing}, which a table of {best.name} needs{nearest(missing, columns)}"
        )
    return best


def read_rows(path: Path, where: Sequence[tuple[str, str]] = (), first_per: str | None = None) -> ChosenRows:
    """The rows of `path` that `where` (column, value) and `first_per` choose, in file order, with their questions.

    QuestionError, naming file, line, column and rule, for a file that is no known table, a number that is none or not
    above zero, an unknown column, and a choice that leaves no rows.
    """
    start = str(path)
    data = read_bytes(path, MAX_BYTES, start)
    digest = hashlib.sha256(data).hexdigest()
    kind = None
    if path.suffix == ".csv":
        columns, texts = csv_text_rows(data, start)
        kind = kind_of(columns, start)
    if kind is None:
        table = read_table(path)
        ours = [{name: _text(value) for name, value in asdict(row).items()} for row in table.rows]
        chosen = _choose(ours, where, first_per, start)
        some = replace(table, rows=tuple(table.rows[i] for i in chosen))
        entries = tuple(
            Entry(row.id, measurement_hash(row), ours[i], (found,))
            for i, row, found in zip(chosen, some.rows, measurement_questions(some), strict=True)
        )
        return ChosenRows(start, path.stem, "measurements", digest, len(ours), entries)
    _check(texts, kind, start)
    chosen = _choose(texts, where, first_per, start)
    entries = tuple(
        Entry(
            texts[i]["id"], row_hash({c: texts[i][c] for c in kind.identity}), texts[i], tuple(_asked(kind, texts[i]))
        )
        for i in chosen
    )
    return ChosenRows(start, path.stem, kind.name, digest, len(texts), entries)


def _asked(kind: Kind, row: Row) -> list[Found]:
    try:
        return kind.questions(row)
    except QuestionError as error:
        # Mappings that speak of a row begin with its id, which stands beside the reason anyway.
        return [QuestionError(str(error).removeprefix(f"{row['id']}: "))]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _check(rows: Sequence[Row], kind: Kind, start: str) -> None:
    if not rows:
        raise QuestionError(f"{start}: has no rows")
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        where = f"{start}, line {line}"
        if not row["id"]:
            raise QuestionError(f"{where}: id is empty")
        if row["id"] in seen:
            raise QuestionError(f"{where}: id = {row['id']!r:.60}: appears twice (line {seen[row['id']]})")
        seen[row["id"]] = line
        for names, least in ((kind.positive, "greater than 0"), (kind.counted, "at least 0")):
            for name in names:
                text = row[name]
                if text and not _holds(text, least):
                    raise QuestionError(f"{where}: {name} = {text!r:.40}: must be a finite number, {least}")


def _holds(text: str, least: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and (value > 0 if least == "greater than 0" else value >= 0)


def _choose(rows: Sequence[Row], where: Iterable[tuple[str, str]], first_per: str | None, start: str) -> list[int]:
    """Indices of the rows that are asked for."""
    chosen = list(range(len(rows)))
    for column, value in where:
        _known(column, rows[0], start, "--where")
        there = {rows[i][column] for i in chosen}
        chosen = [i for i in chosen if _same(rows[i][column], value)]
        if not chosen:
            hint = nearest(value, (t for t in there if t))
            raise QuestionError(f"{start}: --where {column}={value:.60} leaves no rows{hint}")
    if first_per is not None:
        _known(first_per, rows[0], start, "--first-per")
        seen: set[str] = set()
        first = []
        for i in chosen:
            value = rows[i][first_per]
            # Rows that belong to nothing stand for themselves.
            if not value or value not in seen:
                first.append(i)
            seen.add(value)
        chosen = first
    return chosen


def _known(column: str, row: Row, start: str, option: str) -> None:
    if column not in row:
        raise QuestionError(f"{option} {column:.60}: {start} has no such column{nearest(column, row)}")


def _same(text: str, value: str) -> bool:
    """Equal as texts in any case, or as numbers."""
    if text.strip().lower() == value.strip().lower():
        return True
    try:
        return float(text) == float(value)
    except ValueError:
        return False
