"""What a row of a table asks, in the form in which all tables are scored: a measured quantity and who answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job


@dataclass(frozen=True, slots=True)
class Answer:
    """A forecast in the unit of the measurement; the interval that it states; what the baseline's constant multiplies.

    `basis` is the same quantity if the data sheet's peak were reached (or the plain count that a factor goes with).
    """

    forecast: float
    basis: float | None = None
    interval: tuple[float, float] | None = None
    work_flops: float | None = None


# The profile to use instead of the shipped one (None: the shipped one), and the engine that times steps.
Ask = Callable[[Chip | None, str], Answer]


@dataclass(frozen=True, slots=True)
class Question:
    """One measured quantity of a row; `chip` is the profile's name, `quantity` tells those of one row apart."""

    id: str
    quantity: str
    unit: str
    chip: str
    model: str
    op_class: str
    kind: str
    measured: float
    ask: Ask
    job_hash: str = ""


def step_question(
    row_id: str, job_keys: Mapping[str, Any], measured_s: float, model: str, kind: str, job_hash: str = ""
) -> Question:
    """The step time of a job; QuestionError where the job cannot be said, or its cluster not built."""
    job = load_job(dict(job_keys))
    chip_name = resolve_cluster(job.cluster).chip.name

    def ask(chip: Chip | None, engine: str) -> Answer:
        answer = forecast(job, engine=engine, chip=chip)
        work = answer.flops.model_per_step / answer.job.devices
        return Answer(
            answer.step_time_s, work / answer.evidence.peak_flops_per_s, answer.step_time_interval_s, work_flops=work
        )

    return Question(row_id, "step_time", "s", chip_name, model, "step", kind, measured_s, ask, job_hash)
