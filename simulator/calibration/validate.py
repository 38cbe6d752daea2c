"""Forecasts scored against the rows of tables: every row has a forecast or a reason, and a baseline beside it.

Rows that the profile was fitted on are refused, each with that reason, unless they are asked for; the record then says
so. The baseline is one constant a table and quantity, fitted on the very rows that are scored, which flatters it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hw_profiles.errors import QuestionError
from hw_profiles.fitted_rows import INTERVAL, rows_used
from hw_profiles.loader import load_chip
from hw_profiles.schema import Chip
from simulator.calibration.measurement_rows import measurement_questions
from simulator.calibration.published import ChosenRows, Entry, Row
from simulator.calibration.questions import Question
from simulator.calibration.scores import least_absolute, score, score_baseline
from simulator.results.measurement import MeasurementTable, measurement_hash
from simulator.results.validation import Constant, Group, ScoredRow, SkippedRow, TableUsed, ValidationResult

# What the constant of a quantity is, as people say it, and whether people say its inverse (time at the peak over time).
MEANINGS = {
    ("train_steps", "step_time"): ("MFU", True),
    ("gpt_a100_steps", "step_time"): ("MFU", True),
    ("measurements", "step_time"): ("MFU", True),
    ("collectives", "time"): ("share of the port's rate", True),
    ("kernels", "time"): ("share of the data sheet's roofline", True),
    ("measurements", "time"): ("share of the data sheet's rates", True),
    ("maxtext_compiled", "peak"): ("times the arguments", False),
    ("measurements", "peak"): ("times the arguments", False),
    ("measurements", "allocated"): ("times the arguments", False),
    ("maxtext_compiled", "executed_flops"): ("times the model FLOPs", False),
}
BYTES_MEANING = ("times the parameters in 16 bits", False)
MOST_USES = 5
GROUPINGS = ("table", "quantity", "chip", "model", "op_class", "kind")


@dataclass(frozen=True, slots=True)
class Options:
    """How to score: a profile in place of the shipped one (and its name to show), engine, whether fitted rows count."""

    chip: Chip | None = None
    profile: str = "as shipped"
    engine: str = "closed-form"
    allow_fitted: bool = False


@dataclass(slots=True)
class _Pending:
    """A scored row and what its baseline multiplies, until the constants are known."""

    row: ScoredRow
    basis: float | None
    table_kind: str


class _Score:
    """Goes over the rows of all tables and keeps what was found."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.scored: list[_Pending] = []
        self.skipped: list[SkippedRow] = []
        self._seen: dict[tuple[str, str], str] = {}
        self._used: dict[str, dict[str, str]] = {}
        self.chips: dict[str, int] = {}

    def add(self, table: ChosenRows, entry: Entry) -> None:
        """Score the questions of one row, or note why not."""
        before = self._seen.setdefault((table.kind, entry.hash), table.path)
        several = len(entry.found) > 1
        for found in entry.found:
            if isinstance(found, QuestionError):
                self._skip(table, entry.id, str(found))
                continue
            name = f"{entry.id}:{found.quantity}" if several or table.kind == "maxtext_compiled" else entry.id
            self.chips[found.chip] = self.chips.get(found.chip, 0) + 1
            if before != table.path:
                self._skip(table, name, f"the same row is in {before}")
                continue
            try:
                self._ask(table, entry, found, name)
            except QuestionError as error:
                self._skip(table, name, str(error))
        if not entry.found:
            self._skip(table, entry.id, "no quantity that is scored is stated")

    def _skip(self, table: ChosenRows, row_id: str, reason: str) -> None:
        self.skipped.append(SkippedRow(row_id, table.name, reason))

    def _ask(self, table: ChosenRows, entry: Entry, found: Question, name: str) -> None:
        options = self.options
        chip = options.chip
        if chip is not None and chip.name != found.chip:
            raise QuestionError(f"the profile is of {chip.name}, the row of {found.chip}")
        use = self._used_for(found.chip).get(entry.hash, "")
        fitted = "" if use == INTERVAL else use
        if fitted and not options.allow_fitted:
            raise QuestionError(f"its profile rests on it: {fitted} (--allow-fitted scores it)")
        answer = found.ask(chip, options.engine)
        row = ScoredRow(
            id=name, table=table.name, quantity=found.quantity, unit=found.unit, chip=found.chip, model=found.model,
            op_class=found.op_class, kind=found.kind, measured=found.measured, forecast=answer.forecast,
            interval=answer.interval, baseline=None, work_flops=answer.work_flops, job_hash=found.job_hash,
            fitted=fitted, interval_fitted=bool(use),
        )  # fmt: skip
        self.scored.append(_Pending(row, answer.basis, table.kind))

    def _used_for(self, chip_name: str) -> dict[str, str]:
        if chip_name not in self._used:
            chip = self.options.chip
            self._used[chip_name] = rows_used(chip if chip is not None else load_chip(chip_name))
        return self._used[chip_name]

    def result(self, tables: Sequence[ChosenRows]) -> ValidationResult:
        """The record of all that was found."""
        options = self.options
        rows, constants = _with_baselines(self.scored)
        fitted = [r for r in rows if r.fitted]
        held = [r for r in rows if not r.fitted]
        return ValidationResult(
            tables=tuple(TableUsed(t.name, t.kind, t.table_rows, len(t.entries)) for t in tables),
            profile=options.profile,
            engine=options.engine,
            allow_fitted=options.allow_fitted,
            rows=len(rows) + len(self.skipped),
            scored=tuple(rows),
            skipped=tuple(self.skipped),
            scores=score(rows),
            baseline=score_baseline(rows),
            constants=tuple(constants),
            groups=tuple(_groups(rows)),
            fitted_rows=len(fitted),
            held_out=score(held) if fitted and held else None,
            notes=tuple(_notes(rows, fitted)),
        )


def validate(
    tables: Sequence[ChosenRows], options: Options | None = None, step: Callable[[], None] = lambda: None
) -> ValidationResult:
    """Scores of forecasts against the chosen rows of `tables`; `step` is called after each row.

    QuestionError where the profile is of another chip than every row's, or where all rows were used in its fit.
    """
    options = options or Options()
    run = _Score(options)
    for table in tables:
        for entry in table.entries:
            run.add(table, entry)
            step()
    chip = options.chip
    if chip is not None and run.chips and chip.name not in run.chips:
        there = ", ".join(f"{name} ({n})" for name, n in sorted(run.chips.items(), key=lambda item: -item[1])[:8])
        raise QuestionError(
            f"{options.profile}: a profile of {chip.name}, and no row is of it; the rows' chips: {there}"
        )
    if not run.scored:
        fitted = sum("--allow-fitted" in s.reason for s in run.skipped)
        if fitted:
            said = (
                "the profile was fitted on all of them"
                if fitted == len(run.skipped)
                else f"the profile was fitted on {fitted}"
            )
            raise QuestionError(
                f"no row is left to score of {len(run.skipped)}: {said}; --allow-fitted scores them all the same"
            )
    return run.result(tables)


def leave_one_job_out(
    table: MeasurementTable, fit: Callable[[MeasurementTable], Chip], engine: str = "closed-form"
) -> ValidationResult:
    """Scores of the rows of each job by a profile that `fit` made from the rows of all other jobs.

    Rows without a job are given to every fit and not scored. QuestionError for fewer than two jobs, and where the
    profile says (`Chip.calibration`) that it was fitted on a row that was held out.
    """
    jobs = sorted({row.job_hash for row in table.rows if row.job_hash})
    if len(jobs) < 2:
        raise QuestionError(f"{table.name}: leave-one-job-out needs rows of two jobs or more, not {len(jobs)}")
    runs: list[_Score] = []
    parts: list[ChosenRows] = []
    for job in jobs:
        held = replace(table, rows=tuple(row for row in table.rows if row.job_hash == job))
        rest = replace(table, rows=tuple(row for row in table.rows if row.job_hash != job))
        chip = fit(rest)
        run = _Score(Options(chip, "fitted without the row's job", engine))
        entries = tuple(
            Entry(row.id, measurement_hash(row), _no_columns(), (found,))
            for row, found in zip(held.rows, measurement_questions(held), strict=True)
        )
        leaked = rows_used(chip).keys() & {entry.hash for entry in entries}
        if leaked:
            raise QuestionError(
                f"{table.name}: the profile fitted without job {job[:12]} used {len(leaked)} of its rows"
            )
        part = ChosenRows(table.name, table.name, "measurements", "", len(table.rows), entries)
        for entry in entries:
            run.add(part, entry)
        runs.append(run)
        parts.append(part)
    whole = _Score(Options(None, "fitted without the row's job", engine))
    whole.scored = [row for run in runs for row in run.scored]
    whole.skipped = [row for run in runs for row in run.skipped]
    every = ChosenRows(
        table.name, table.name, "measurements", "", len(table.rows), tuple(e for p in parts for e in p.entries)
    )
    return whole.result([every])


def _no_columns() -> Row:
    return {}


def _with_baselines(pending: Sequence[_Pending]) -> tuple[list[ScoredRow], list[Constant]]:
    """The rows with what their table's constant gives, and the constants."""
    families: dict[tuple[str, str], list[_Pending]] = {}
    for p in pending:
        families.setdefault((p.row.table, p.row.quantity), []).append(p)
    constants = []
    value: dict[tuple[str, str], float] = {}
    for (table, quantity), members in families.items():
        told = [(p.basis, p.row.measured) for p in members if p.basis]
        if told:
            c = least_absolute([b for b, _ in told], [m for _, m in told])
            value[table, quantity] = c
            words, inverse = MEANINGS.get((members[0].table_kind, quantity), BYTES_MEANING)
            constants.append(Constant(table, quantity, 1 / c if inverse else c, words, len(told)))
    rows = []
    for p in pending:
        constant = value.get((p.row.table, p.row.quantity))
        rows.append(replace(p.row, baseline=constant * p.basis if constant is not None and p.basis else None))
    return rows, constants


def _groups(rows: Sequence[ScoredRow]) -> list[Group]:
    """Groups by everything that tells rows apart, those of most rows first; a grouping into one group says nothing."""
    out = []
    for by in GROUPINGS:
        names: dict[str, list[ScoredRow]] = {}
        for row in rows:
            name = getattr(row, by)
            if name:
                names.setdefault(name, []).append(row)
        for name, members in sorted(names.items(), key=lambda item: (-len(item[1]), item[0])):
            out.append(Group(by, name, score(members), score_baseline(members)))
    return out


def _notes(rows: Sequence[ScoredRow], fitted: Sequence[ScoredRow]) -> list[str]:
    out = []
    if fitted:
        uses: dict[str, int] = {}
        for row in fitted:
            uses[row.fitted] = uses.get(row.fitted, 0) + 1
        most = sorted(uses.items(), key=lambda item: (-item[1], item[0]))
        said = ", ".join(f"{n} for {use}" for use, n in most[:MOST_USES]) + ", ..." * (len(most) > MOST_USES)
        out.append(
            f"{len(fitted)} of the scored rows were used in the profiles' fits ({said}): held_out leaves them out"
        )
    read = sum(r.interval_fitted and r.interval is not None and not r.fitted for r in rows)
    if read:
        out.append(
            f"the interval of uncalibrated steps was read from {read} of these very rows: they test nothing of it"
        )
    if len({r.unit for r in rows}) > 1:
        out.append("rows of several units: a rank correlation over all of them is not one; see the groups by quantity")
    return out
