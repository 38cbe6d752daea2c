"""How much every number of chip and model weighs in a step: central differences in logarithms, and doubling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hw_profiles.cluster_spec import ClusterSpec
from hw_profiles.errors import QuestionError
from hw_profiles.loader import cluster_mapping, load_chip, resolve_cluster
from hw_profiles.overrides import apply_overrides, quantities
from hw_profiles.schema import Chip, Curve
from hw_profiles.validation import validate
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.kernels.roofline import Kernels
from simulator.planner.table import get
from simulator.planner.what_if import Question
from simulator.results.whatif import Sensitivity, Weight
from simulator.workload.habits import habits_of

STEP = 0.01
# Whole numbers of a model cannot change by a per cent: the nearest of these pairs that the rules allow.
PAIRS = ((7 / 8, 9 / 8), (0.75, 1.25), (0.5, 1.5), (0.5, 2.0), (1.0, 2.0), (0.5, 1.0))
MODEL = (
    "model.hidden", "model.vocab", "model.decoder.layers", "model.decoder.moe.experts", "model.decoder.moe.top_k",
    "model.decoder.moe.expert.hidden", "model.encoder.layers", "model.encoder.moe.experts", "model.encoder.moe.top_k",
    "batch.length", "batch.length.decoder", "batch.length.encoder", "batch.sequences", "training.capacity.factor",
)  # fmt: skip
CURVE = "efficiency.matmul."


def kind_of(name: str) -> str:
    """rate, latency, efficiency, slowdown or size, from the unit in the name of a chip's number."""
    last = name.rpartition(".")[2]
    if name.startswith("peak_tflops.") or last.endswith("gb_per_s"):
        return "rate"
    if last.endswith("_us"):
        return "latency"
    if last.endswith("slowdown"):
        return "slowdown"
    return "efficiency" if "efficiency" in name else "size"


def sensitivity(
    question: Question, step: float = STEP, progress: Callable[[int, int], None] | None = None
) -> Sensitivity:
    """Elasticities of the closed form's step time; `step` is the relative change of a chip's number to either side."""
    job = question.job()
    spec = cluster_mapping(job.cluster) if isinstance(job.cluster, str) else job.cluster
    asked = validate(ClusterSpec, spec, "", "cluster")
    profile = question.chip or load_chip(asked.chip_name)
    chip = apply_overrides(profile, asked.chip_changes)
    base = question.forecast()

    def of_numbers(changes: dict[str, float]) -> float:
        cluster = resolve_cluster(job.cluster, changes, profile)
        return forecast_on(job, cluster, "sensitivity").step_time_s

    def of_curve(dtype: str, factor: float) -> float:
        cluster = resolve_cluster(job.cluster, chip=with_curve(profile, dtype, factor))
        return forecast_on(job, cluster, "sensitivity").step_time_s

    numbers = [(name, q.value) for name, q in quantities(chip) if q.value]
    fields = [(name, value) for name in MODEL if (value := _number(job, name)) is not None]
    out, total = [], len(numbers) + len(fields) + 1
    for name, value in numbers:
        out.append(_of_chip(name, value, base.step_time_s, step, lambda v, n=name: of_numbers({n: v})))  # type: ignore[misc]
        _tell(progress, len(out), total)
    kernels = Kernels(chip)
    dtype = kernels.runs_as(habits_of(job, chip.kind).matmul_dtype)
    top = max(y for _, y in kernels.curve(dtype).points)
    out.append(_of_chip(CURVE + dtype, top, base.step_time_s, step, lambda v: of_curve(dtype, v / top)))
    for name, value in fields:
        out.append(_of_model(name, value, lambda v, n=name: question.forecast([f"{n}={v!r}"]).step_time_s))  # type: ignore[misc]
        _tell(progress, len(out), total)

    def total_of(kind: str) -> float:
        return sum(w.elasticity or 0.0 for w in out if w.kind == kind)

    out.sort(key=lambda w: (w.elasticity is None, -abs(w.elasticity or 0.0), w.name))
    where = base.job.name, base.job.cluster
    return Sensitivity(*where, base.step_time_s, tuple(out), total_of("rate"), total_of("latency"))


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def with_curve(chip: Chip, dtype: str, factor: float) -> Chip:
    """`chip` with its curve of products in `dtype` scaled; QuestionError above the peak."""
    curves: dict[str, Curve] = dict(chip.efficiency.matmul)  # type: ignore[arg-type]
    if dtype not in curves:
        raise QuestionError(f"{chip.name} has no curve of its own for {dtype}")
    points = tuple((x, y * factor) for x, y in curves[dtype].points)
    if any(y > 1 for _, y in points):
        raise QuestionError(f"{CURVE}{dtype}: a fraction of the peak, at most 1")
    curves[dtype] = curves[dtype].model_copy(update={"points": points})
    return chip.model_copy(update={"efficiency": chip.efficiency.model_copy(update={"matmul": curves})})


def _number(job: Job, name: str) -> float | None:
    value = get(job, name)
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else value


def _try(time: Callable[[float], float], value: float) -> tuple[float | None, str]:
    try:
        return time(value), ""
    except QuestionError as error:
        return None, str(error).removeprefix(": ")


def _of_chip(name: str, value: float, base_s: float, step: float, time: Callable[[float], float]) -> Weight:
    """A number of the chip: a difference to both sides, to one where the other is impossible, and twice as good."""
    kind = kind_of(name)
    low, why = _try(time, value * (1 - step))
    high, other = _try(time, value * (1 + step))
    down, up = (1.0 if low is None else 1 - step), (1.0 if high is None else 1 + step)
    if low is None and high is None:
        return Weight(name, kind, value, down, up, None, refused=why or other)
    slope = math.log((high or base_s) / (low or base_s)) / math.log(up / down)
    better = {"latency": value / 2, "slowdown": 1 + (value - 1) / 2, "efficiency": min(2 * value, 1.0)}.get(kind)
    better = 2 * value if better is None else better
    fast, _ = _try(time, better)
    return Weight(name, kind, value, down, up, slope, better, None if fast is None else base_s / fast)


def _of_model(name: str, value: float, time: Callable[[float], float]) -> Weight:
    """A number of the model or the batch: the nearest pair of values that the rules allow."""
    why = ""
    whole = isinstance(value, int)
    for down, up in ((1 - STEP, 1 + STEP), *PAIRS) if not whole else PAIRS:
        ends = [value * down, value * up]
        if whole:
            ends = [round(e) for e in ends]
        if ends[0] >= ends[1] or ends[0] <= 0:
            continue
        times: Sequence[tuple[float | None, str]] = [_try(time, e) for e in ends]
        low, high = times[0][0], times[1][0]
        if low is not None and high is not None:
            slope = math.log(high / low) / math.log(ends[1] / ends[0])
            return Weight(name, "model", value, ends[0] / value, ends[1] / value, slope)
        why = why or times[0][1] or times[1][1]
    return Weight(name, "model", value, 1.0, 1.0, None, refused=why or "no other value of it is near")
