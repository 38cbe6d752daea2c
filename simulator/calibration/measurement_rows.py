"""Rows of our own measurement tables as questions: steps, ops and memory of jobs; kernels and collectives by shape.

A row of a job is asked of the whole forecast of that job, which the table carries; forecasts are made once per job.
The forecast knows the passes of a collective together, so its passes are one quantity: their sum, less the time that
they waited for other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hw_profiles.cluster_spec import plain_spec
from hw_profiles.errors import QuestionError
from hw_profiles.loader import canonical_chip_name, load_chip, resolve_cluster
from hw_profiles.schema import Chip
from simulator.analysis.forecast import forecast
from simulator.analysis.spread import class_interval
from simulator.calibration.collective_rows import port_seconds, residuals
from simulator.calibration.fit_ops import home
from simulator.calibration.kernel_rows import ops_answer
from simulator.calibration.observations import observed
from simulator.calibration.questions import Answer, Question
from simulator.job.load import load_job
from simulator.kernels.roofline import class_of
from simulator.network.collectives import PASSES, collective_rate, merged_starts
from simulator.results.forecast import Forecast
from simulator.results.measurement import NETWORK, Measurement, MeasurementTable, arrays_of
from simulator.workload.ops import Op, stream

KINDS = (*PASSES, "all_to_all", "permute")
WIDTHS = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int8": 1.0, "fp4": 0.5625}
PRODUCT_SIZES = 4
MEMORY = ("peak", "arguments", "allocated")
# A row that another row already holds says so and is left out of the score.
Outcome = Question | QuestionError


@dataclass(frozen=True, slots=True)
class _Job:
    """A job of the table: its name, its chip's profile, and its forecast by profile and engine, made once."""

    model: str
    chip: str
    ask: Callable[[Chip | None, str], Forecast]


def measurement_questions(table: MeasurementTable) -> list[Outcome]:
    """For every row of `table`, in order, its question, or the QuestionError that says why it has none."""
    asked = _Asked(table)
    out: list[Outcome] = []
    for row in table.rows:
        try:
            out.append(asked.question(row))
        except QuestionError as error:
            out.append(error)
    return out


class _Asked:
    """The questions of one table; remembers its jobs, and what one question has taken together."""

    def __init__(self, table: MeasurementTable) -> None:
        self.table = table
        self._jobs: dict[str, _Job] = {}
        self._observed: dict[tuple[str, str], Mapping[tuple[str, str], float]] | None = None
        self._first: dict[tuple[str, ...], str] = {}
        self._together: dict[tuple[Any, ...], list[Measurement]] = {}
        self._networked = {(row.job_hash, row.name) for row in table.rows if row.level == NETWORK}
        for row in table.rows:
            if row.kind == "op":
                self._together.setdefault(self._scope(row), []).append(row)

    @staticmethod
    def _scope(row: Measurement) -> tuple[Any, ...]:
        made = row.source, row.software, row.devices, row.device, row.statistic, row.level
        return row.job_hash, row.taking, row.name, *made

    def question(self, row: Measurement) -> Question:
        """The question of `row`; QuestionError with the reason where there is none."""
        if row.kind in ("step", "op", "memory"):
            return {"step": self._step, "op": self._op, "memory": self._memory}[row.kind](row)
        assert row.seconds is not None
        if row.kind == "collective":
            return self._collective(row)
        return self._kernel(row)

    def _job(self, row: Measurement) -> _Job:
        if not row.job_hash:
            raise QuestionError("job_hash is empty: whose row it is, is not said")
        if row.job_hash not in self.table.jobs:
            raise QuestionError("the table does not carry the row's job (a CSV table carries none: use Parquet)")
        if row.job_hash not in self._jobs:
            self._jobs[row.job_hash] = _as_job(self.table.jobs[row.job_hash])
        return self._jobs[row.job_hash]

    def _step(self, row: Measurement) -> Question:
        job = self._job(row)

        def ask(chip: Chip | None, engine: str) -> Answer:
            found = job.ask(chip, engine)
            work = found.flops.model_per_step / found.job.devices
            ideal = work / found.evidence.peak_flops_per_s
            return Answer(found.step_time_s, ideal, found.step_time_interval_s, work_flops=work)

        assert row.seconds is not None
        return Question(row.id, "step_time", "s", job.chip, job.model, "step", row.kind, row.seconds, ask, row.job_hash)

    def _op(self, row: Measurement) -> Question:
        job = self._job(row)
        shipped = job.ask(None, "closed-form")
        assert row.seconds is not None
        computed = any(o.scope == row.name and o.phase == row.phase for o in shipped.ops)
        phase = f" ({row.phase})" if row.phase else ""
        sent = any(c.scope == row.name for c in shipped.collectives)
        # Where a table tells the network's part of a scope, the rest of it is copies, which the forecast does not have.
        apart = (row.job_hash, row.name) in self._networked
        if row.level == NETWORK or (sent and not computed and not apart):
            # The forecast has the way back of a dispatch under a name of its own; a trace has it as another pass.
            scopes = row.name, f"{row.name}_backward"
            kinds = sorted({c.kind for c in shipped.collectives if c.scope in scopes})
            if not kinds:
                raise QuestionError(f"the forecast has no collective {row.name}{phase}")
            peers = self._together[self._scope(row)]
            if peers[0] is not row:
                raise QuestionError(
                    "counted with the first pass of its collective: the forecast knows all passes together"
                )
            seconds = sum((p.seconds or 0.0) - p.waited_s for p in peers)
            if seconds <= 0:
                raise QuestionError(f"all of {row.name} was waiting for other devices")

            def ask_collective(chip: Chip | None, engine: str) -> Answer:
                rows = [c for c in job.ask(chip, engine).collectives if c.scope in scopes]
                return Answer(sum(c.time_s for c in rows))

            name = ", ".join(kinds).replace("_", " ")
            return Question(
                row.id, "time", "s", job.chip, job.model, name, row.kind, seconds, ask_collective, row.job_hash
            )
        if not computed:
            raise QuestionError(f"the forecast has no op {row.name}{phase}")
        key = (class_of(row.name), row.phase)
        shares = self._compute(row, shipped)
        if shares and row.id != self._first[row.job_hash, row.taking, *key]:
            raise QuestionError("counted with the first device's row: op classes are means over devices and stacks")
        seconds = shares.get(key, row.seconds)

        def ask(chip: Chip | None, engine: str) -> Answer:
            found, used = job.ask(chip, engine), chip or load_chip(job.chip)
            ops = [o for o in found.ops if o.phase == row.phase and (shares or o.scope == row.name)]
            ops = [o for o in ops if class_of(o.scope) == key[0]]
            time_s = sum(o.time_s for o in ops)
            ideal = sum(
                max(o.flops / found.evidence.peak_flops_per_s, o.bytes / used.device_memory_bytes_per_s) for o in ops
            )
            return Answer(time_s, ideal or None, class_interval(ops, used))

        part = row.name.partition(".")[2] or row.name
        return Question(row.id, "time", "s", job.chip, job.model, part, row.kind, seconds, ask, row.job_hash)

    def _compute(self, row: Measurement, shipped: Forecast) -> Mapping[tuple[str, str], float]:
        """What the fit takes for the seconds of each class and pass of the row's measurement; empty without a trace.

        A trace says how a step divides, the timed steps how long it is (observations.py).
        """
        if self._observed is None:
            self._observed = {(o.job_hash, o.name): o.compute_s for o in observed([self.table], {})}
            for other in self.table.rows:
                if other.kind == "op" and other.level != NETWORK:
                    self._first.setdefault((other.job_hash, other.taking, class_of(other.name), other.phase), other.id)
        # As in the fit, what the roofline has as a part of the backward pass counts there.
        known = {(class_of(o.scope), o.phase) for o in shipped.ops}
        out: dict[tuple[str, str], float] = {}
        for key, seconds in self._observed.get((row.job_hash, row.taking), {}).items():
            there = home(key, known) if key[1] == "recompute" else key
            out[there] = out.get(there, 0.0) + seconds
        return out

    def _memory(self, row: Measurement) -> Question:
        job = self._job(row)
        if row.name not in MEMORY:
            raise QuestionError(f"name = {row.name!r:.40}: memory rows are {', '.join(MEMORY)}")
        # XLA:CPU's peak leaves temporaries out (docs/compile.md): what it then holds are the arguments.
        only_arguments = row.name == "arguments" or (row.name == "peak" and load_chip(job.chip).kind == "cpu")

        def ask(chip: Chip | None, engine: str) -> Answer:
            memory = job.ask(chip, engine).memory
            if only_arguments:
                return Answer(memory.argument_bytes)
            return Answer(memory.peak_bytes, memory.argument_bytes)

        assert row.bytes is not None
        if not row.bytes:
            raise QuestionError("bytes is 0: an error against nothing is not a number")
        return Question(
            row.id, row.name, "bytes", job.chip, job.model, row.name, row.kind, row.bytes, ask, row.job_hash
        )

    def _kernel(self, row: Measurement) -> Question:
        chip_name, ops = canonical_chip_name(row.chip), [_kernel_op(row)]
        assert row.seconds is not None
        name = row.name.replace("_", " ") + (f" {row.dtype}" if ops[0].kind == "matmul" else "")
        return Question(
            row.id, "time", "s", chip_name, "", name, row.kind, row.seconds,
            lambda chip, engine: ops_answer(chip or load_chip(chip_name), ops), row.job_hash,
        )  # fmt: skip

    def _collective(self, row: Measurement) -> Question:
        chip_name = canonical_chip_name(row.chip)
        if row.name not in KINDS:
            raise QuestionError(f"name = {row.name!r:.40}: collectives are {', '.join(KINDS)}")
        if not row.bytes:
            raise QuestionError("bytes is empty: a collective needs its size")
        if row.group_size < 2:
            raise QuestionError("group_size = 1: nothing is sent")
        carried = self.table.jobs.get(row.job_hash) if row.job_hash else None
        spec = carried["cluster"] if carried else _cluster(row, load_chip(chip_name))
        size, stride, bytes_ = row.group_size, row.stride, row.bytes

        def ask(chip: Chip | None, engine: str) -> Answer:
            cluster = resolve_cluster(spec, chip=chip)
            starts = float(merged_starts(cluster, arrays_of(row)))
            seconds = starts * float(collective_rate(cluster, row.name, size, stride).seconds(bytes_ / starts))
            spread = residuals(cluster, row.name, size * stride)
            interval = None if spread is None else (seconds * spread["p10"], seconds * spread["p90"])
            return Answer(seconds, port_seconds(cluster, row.name, size, bytes_), interval)

        assert row.seconds is not None
        name = row.name.replace("_", " ")
        return Question(row.id, "time", "s", chip_name, "", name, row.kind, row.seconds, ask, row.job_hash)


def _as_job(keys: Mapping[str, Any]) -> _Job:
    job = load_job(dict(keys))
    made: dict[tuple[int, str], Forecast] = {}

    def ask(chip: Chip | None, engine: str) -> Forecast:
        key = (id(chip), engine)
        if key not in made:
            made[key] = replace(forecast(job, engine=engine, chip=chip), timeline=None)
        return made[key]

    return _Job(job.model.name, resolve_cluster(job.cluster).chip.name, ask)


def _kernel_op(row: Measurement) -> Op:
    """The op of a kernel row: a product by its shape [groups, rows, depth, columns], a stream by its bytes."""
    if row.name in ("stream", "launch"):
        return stream("", "", row.bytes or 0.0, 0.0)
    if row.name not in ("product", "grouped_product"):
        raise QuestionError(f"name = {row.name!r:.40}: kernels are product, grouped_product, stream, launch")
    if len(row.shape) != PRODUCT_SIZES or min(row.shape) < 1:
        raise QuestionError("shape: a product has [groups, rows, depth, columns]")
    width = WIDTHS.get(row.dtype)
    if width is None:
        raise QuestionError(f"dtype = {row.dtype!r:.40}: known: {', '.join(WIDTHS)}")
    groups, rows, depth, columns = (float(n) for n in row.shape)
    flops = 2 * groups * rows * depth * columns
    result = width if width > 1 else 2.0
    bytes_ = groups * (width * (rows * depth + depth * columns) + result * rows * columns)
    return Op("", "", "matmul", flops, flops, bytes_, rows, columns, depth, groups, row.dtype)


def _cluster(row: Measurement, chip: Chip) -> dict[str, Any]:
    """The cluster of a collective without a job: as many devices as were at work."""
    return plain_spec(chip, max(row.devices, row.group_size * row.stride), row.nodes)
