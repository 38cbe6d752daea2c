"""A job that another trainer cannot run."""

from __future__ import annotations

from typing import Never

from hw_profiles.errors import QuestionError
from simulator.job.job import Job


def cannot(job: Job, trainer: str, field: str, rule: str) -> Never:
    """QuestionError: the trainer cannot run this model, by which field and rule."""
    raise QuestionError(f"{field}: {trainer} cannot run {job.model.name}: {rule}")
