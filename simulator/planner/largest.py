"""The largest microbatch, sequence or number of experts that still fits a plan on its cluster."""

from __future__ import annotations

from collections.abc import Callable

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.job.rules import resolve
from simulator.planner.space import divisors

WHAT = ("microbatch", "sequence", "experts")
# Tokens of a sequence by which it grows.
TOKENS = 1024
MOST = 1 << 24


def largest(job: Job, what: str) -> int:
    """The largest number that keeps the rules and fits in memory, all else as it is; QuestionError if there is none."""
    cluster = resolve_cluster(job.cluster)

    def fits(changed: Job) -> bool:
        try:
            return forecast_on(changed, cluster, "largest").memory.fits
        except QuestionError:
            return False

    if what == "microbatch":
        degrees = resolve(job, cluster)
        ways = sorted(divisors(job.batch.sequences // degrees.data))
        return _best([n for n in ways if fits(_with(job, "plan", microbatch_sequences=n))], what)
    if what == "sequence":
        if not isinstance(job.batch.length, int):
            raise QuestionError("--largest sequence: a model with an encoder has two lengths; vary them with whatif")
        return _grown(TOKENS, lambda n: fits(_with(job, "batch", length=n)), what)
    moe = job.model.decoder.moe
    if moe is None:
        raise QuestionError("--largest experts: the decoder has none")
    unit = max(job.plan.expert, moe.top_k)

    def with_experts(n: int) -> bool:
        stack = job.model.decoder.model_copy(update={"moe": moe.model_copy(update={"experts": n})})
        try:
            # A copy of the whole model: its layers are worked out once and kept.
            model = type(job.model).model_validate(job.model.model_dump() | {"decoder": stack.model_dump()})
        except ValueError:  # a rule of the model, such as its router's groups
            return False
        return fits(job.model_copy(update={"model": model}))

    return _grown(unit, with_experts, what)


def _with(job: Job, section: str, **changes: object) -> Job:
    return job.model_copy(update={section: getattr(job, section).model_copy(update=changes)})


def _best(values: list[int], what: str) -> int:
    if not values:
        raise QuestionError(f"--largest {what}: nothing fits, not even the smallest")
    return values[-1]


def _grown(unit: int, fits: Callable[[int], bool], what: str) -> int:
    """The largest multiple of `unit` that fits: doubled until it does not, then halved in between."""
    if not fits(unit):
        raise QuestionError(f"--largest {what}: nothing fits, not even {unit:,}")
    low, high = 1, 2
    while high * unit <= MOST and fits(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit
