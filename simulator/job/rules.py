"""The rules between the fields of a job and its cluster, and the degrees that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.job.job import Capacity, Job, Placement
from simulator.job.layout import Chunk, lay_out
from simulator.job.model import Model, Moe
from simulator.numbers import Number, maximum, minimum, some, where

# Far beyond any model, and few enough that loops over layers or experts end while somebody waits.
MOST_LAYERS, MOST_EXPERTS, DEEPEST_FFN = 10_000, 262_144, 100
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


@dataclass(frozen=True, slots=True)
class Degrees:
    """The plan with every default filled in. All counts are JAX devices, sequences or microbatches.

    `layout` is how rows lie at their experts: that of `training.dispatch`, but `blocks` where a CPU is asked for
    `ragged`.
    Of one plan; or of many, the numbers in columns, whose chunks are counted elsewhere.
    """

    data: int
    tensor: int
    context: int
    pipeline: int
    expert: int
    expert_tensor: int
    expert_data: int
    shard: int
    microbatch_sequences: int
    microbatches: int
    layout: str
    chunks: tuple[tuple[Chunk, ...], ...]
    strides: dict[str, int]
    virtual_stages: int

    @property
    def pipelined(self) -> bool:
        """Whether there is more than one stage; rows of columns agree on it."""
        return some(self.pipeline > 1)

    @property
    def devices(self) -> int:
        """All devices of the job."""
        return self.data * self.tensor * self.context * self.pipeline


class Refusal:
    """What happens to a plan that breaks a rule: here QuestionError, one line with field, value and rule.

    `simulator.planner.validity` counts and drops rows instead, where plans are columns.
    """

    def need(self, ok: Number, field: str, value: object, rule: str, *numbers: object) -> None:
        """Refuse what is not `ok`; `rule` is a text with a place for each of `numbers`."""
        if not ok:
            raise QuestionError(f"{field} = {value}: {rule.format(*numbers)}")


REFUSAL = Refusal()


def _axes(p: Any, cluster: Cluster, refuse: Refusal) -> Number:
    """The data degree; the degrees make up the cluster."""
    others = p.tensor * p.context * p.pipeline
    refuse.need(
        cluster.devices % others == 0,
        "plan",
        _Text("tensor {} x context {} x pipeline {}", p.tensor, p.context, p.pipeline),
        "their product {} must divide the {} devices of {}", others, cluster.devices, cluster.name,
    )  # fmt: skip
    data = p.data if p.data is not None else maximum(cluster.devices // others, 1)
    refuse.need(
        data * others == cluster.devices,
        "plan.data", data,
        "data x tensor x context x pipeline is {}; {} has {} devices", data * others, cluster.name, cluster.devices,
    )  # fmt: skip
    inner, experts = data * p.context * p.tensor, p.expert * p.expert_tensor
    rule = "expert x expert_tensor ({}) must divide data x context x tensor ({})"
    refuse.need(inner % experts == 0, "plan.expert", p.expert, rule, experts, inner)
    return data


class _Text:
    """A text that is made only where it is printed."""

    def __init__(self, text: str, *values: object) -> None:
        self.text, self.values = text, values

    def __str__(self) -> str:
        return self.text.format(*self.values)


def _check_model(job: Job, p: Any, refuse: Refusal) -> None:
    model, need = job.model, refuse.need
    at_most = f"must be at most {MOST_LAYERS:,}"
    need(model.mtp_layers <= MOST_LAYERS, "model.mtp_layers", model.mtp_layers, at_most)
    stacks = [(n, s) for n, s in (("encoder", model.encoder), ("decoder", model.decoder)) if s is not None]
    for name, stack in stacks:
        need(stack.layers <= MOST_LAYERS, f"model.{name}.layers", stack.layers, at_most)
        for part, ffn in (("ffn", stack.ffn), ("moe.expert", stack.moe.expert if stack.moe else None)):
            if ffn is not None:
                field = f"model.{name}.{part}.depth"
                need(ffn.depth <= DEEPEST_FFN, field, ffn.depth, f"must be at most {DEEPEST_FFN}")
        layers = model.encoder_layers if name == "encoder" else model.decoder_layers
        for kind in {id(x): x for x in layers}.values():
            a = kind.attention
            if a is not None:
                rule = "must divide the {} attention heads of the {}"
                need(a.heads % p.tensor == 0, "plan.tensor", p.tensor, rule, a.heads, name)
                shared = (a.mla is not None) | (a.kv % p.tensor == 0) | (p.tensor % a.kv == 0)
                rule = "must divide, or be a multiple of, the {} key/value heads of the {}"
                need(shared, "plan.tensor", p.tensor, rule, a.kv, name)
            if kind.ffn is not None:
                rule = "must divide the feed-forward hidden size {} of the {}"
                need(kind.ffn.hidden % p.tensor == 0, "plan.tensor", p.tensor, rule, kind.ffn.hidden, name)
        if stack.lstm is not None:
            need(
                p.tensor * p.context * p.pipeline == 1,
                "plan",
                _Text("tensor {}, context {}, pipeline {}", p.tensor, p.context, p.pipeline),
                "an LSTM is split over data and experts only",
            )
        if stack.moe is not None:
            _check_moe(job, p, name, stack.moe, refuse)
    if not model.moes:
        need(p.expert * p.expert_tensor == 1, "plan.expert", p.expert, "{} has no experts", model.name)


def _check_moe(job: Job, p: Any, stack: str, moe: Moe, refuse: Refusal) -> None:
    need, hidden = refuse.need, moe.expert.hidden
    need(moe.experts <= MOST_EXPERTS, f"model.{stack}.moe.experts", moe.experts, f"must be at most {MOST_EXPERTS:,}")
    rule = "must divide the {} experts of {}"
    need(moe.experts % p.expert == 0, "plan.expert", p.expert, rule, moe.experts, job.model.name)
    rule = "must divide the expert hidden size {}"
    need(hidden % p.expert_tensor == 0, "plan.expert_tensor", p.expert_tensor, rule, hidden)
    rule = "must divide the shared experts' hidden size {}"
    need(moe.shared_hidden % p.tensor == 0, "plan.tensor", p.tensor, rule, moe.shared_hidden)
    layout, capacity = job.training.dispatch.layout, job.training.capacity
    fixed = capacity == "dropless" and layout in ("one_hot", "slots")
    need(not fixed, "training.dispatch.layout", layout, "needs training.capacity; dropless jobs use ragged")


def _check_batch(job: Job, p: Any, data: Number, refuse: Refusal) -> tuple[Number, Number]:
    """(sequences per microbatch and data rank, microbatches)."""
    batch, need = job.batch, refuse.need
    encoder, name = job.model.encoder, job.model.name
    rule = "{} has an encoder: give {{encoder: ..., decoder: ...}}"
    need(encoder is None or batch.encoder_length > 0, "batch.length", batch.length, rule, name)
    rule = "{} has no encoder: give one number"
    need(encoder is not None or batch.encoder_length == 0, "batch.length", "encoder and decoder", rule, name)
    for stack, length in (("encoder", batch.encoder_length), ("decoder", batch.decoder_length)):
        need(length % p.context == 0, "plan.context", p.context, "must divide the {} length {}", stack, length)
        split = p.context * p.tensor
        rule = "context x tensor ({}) must divide the {} length {}"
        whole = (not p.sequence_parallel) | (length % split == 0)
        need(whole, "plan.sequence_parallel", "true", rule, split, stack, length)
    document = batch.document_length
    fits = document is None or document <= batch.decoder_length
    need(fits, "batch.document_length", document, "must not exceed the length {}", batch.decoder_length)
    rule = "must be a multiple of the data degree {}"
    need(batch.sequences % data == 0, "batch.sequences", batch.sequences, rule, data)
    per_rank = maximum(batch.sequences // data, 1)
    asked = p.microbatch_sequences or 0 if _is_plain(p.microbatch_sequences) else p.microbatch_sequences
    micro = where(asked > 0, asked, where(p.pipeline == 1, per_rank, 1))
    field = "plan.microbatch_sequences"
    need(per_rank % micro == 0, field, micro, "must divide the {} sequences of a data rank", per_rank)
    return micro, maximum(per_rank // micro, 1)


def _is_plain(number: object) -> bool:
    return number is None or isinstance(number, int)


def _check_schedule(job: Job, p: Any, microbatches: Number, refuse: Refusal) -> None:
    need, layers = refuse.need, len(job.model.encoder_layers) + len(job.model.decoder_layers)
    field, virtual = "plan.virtual_stages", p.virtual_stages
    rule = "needs schedule interleaved, not {}"
    need((virtual == 1) | (p.schedule == "interleaved"), field, virtual, rule, p.schedule)
    need((virtual == 1) | (p.pipeline > 1), field, virtual, "needs pipeline > 1")
    rule = "x virtual_stages {} exceeds the {} layers of {} and its two ends"
    fits = p.pipeline * p.virtual_stages <= layers + 2
    need(fits, "plan.pipeline", p.pipeline, rule, p.virtual_stages, layers, job.model.name)
    rule = "needs microbatches ({}) to be a multiple of pipeline {}"
    whole = (virtual == 1) | (microbatches % p.pipeline == 0)
    need(whole, "plan.schedule", "interleaved", rule, microbatches, p.pipeline)
    if p.schedule == "dualpipe":
        even = (p.pipeline == 1) | (p.pipeline % 2 == 0)
        need(even, "plan.pipeline", p.pipeline, "dualpipe needs an even number of stages")
        rule = "needs an even number of microbatches, at least 2 x pipeline; there are {}"
        enough = (p.pipeline == 1) | (microbatches % 2 == 0) & (microbatches >= 2 * p.pipeline)
        need(enough, "plan.schedule", "dualpipe", rule, microbatches)


def chunks_of(
    model: Model, stages: tuple[int, ...] | str | None, pipeline: int, virtual: int
) -> tuple[tuple[Chunk, ...], ...]:
    """Chunks of each stage: stage s runs chunks s, s + P, s + 2P, ...; under DualPipe also those of stage P - 1 - s."""
    layers = len(model.encoder_layers) + len(model.decoder_layers)
    flat = lay_out(stages, layers, model.mtp_layers, pipeline * virtual)
    return tuple(flat[s::pipeline] for s in range(pipeline))


def _order(p: Any) -> tuple[str, ...]:
    """Mesh axes over device indices, the fastest first."""
    return tuple((p.placement or Placement()).order)


def _check_placement(p: Any, data: Number, refuse: Refusal) -> None:
    """The axes that experts lie over are neighbours: their groups have one stride each."""
    order = _order(p)
    degree = {"data": data, "tensor": p.tensor, "context": p.context}
    at = order.index("pipeline")
    inner: Number = 1
    outer: Number = 1
    for axis in order[:at]:
        inner = inner * degree[axis]
    for axis in order[at + 1 :]:
        outer = outer * degree[axis]
    apart = (p.pipeline > 1) & (inner > 1) & (outer > 1)
    rule = "experts lie over data, context and tensor, which must be neighbours: put pipeline first or last"
    refuse.need((apart == 0), "plan.placement.order", ", ".join(order), rule)


def _strides(p: Any, data: Number) -> dict[str, Number]:
    """Distance in device index between neighbours on each axis; the expert axes subdivide data x context x tensor."""
    degree = {"data": data, "tensor": p.tensor, "context": p.context, "pipeline": p.pipeline}
    strides: dict[str, Number] = {}
    here: Number = 1
    for axis in _order(p):
        strides[axis] = here
        here = here * degree[axis]
    base = minimum(minimum(strides["data"], strides["tensor"]), strides["context"])
    strides["expert_tensor"] = base
    strides["expert"] = base * p.expert_tensor
    strides["expert_data"] = base * p.expert_tensor * p.expert
    # Gradients of what is not an expert are reduced over data and context together.
    strides["replica"] = where(p.context > 1, minimum(strides["data"], strides["context"]), strides["data"])
    return strides


def resolve(job: Job, cluster: Cluster, plan: Any = None, refuse: Refusal = REFUSAL) -> Degrees:
    """All degrees of `job` on `cluster`; QuestionError, one line, for the first rule that does not hold.

    `plan` replaces the job's: a record with the same fields, in which degrees and sequences of a microbatch may be
    columns of plans that share everything else; `refuse` then says what happens to rows, and `chunks` stay empty.
    """
    p = job.plan if plan is None else plan
    data = _axes(p, cluster, refuse)
    _check_model(job, p, refuse)
    micro, microbatches = _check_batch(job, p, data, refuse)
    _check_schedule(job, p, microbatches, refuse)
    if job.model.moes:
        _check_placement(p, data, refuse)
    replicas = data * p.context
    asked = p.shard_degree
    shard = 1 if p.shard == "none" else (replicas if asked is None else where(asked > 0, asked, replicas))
    refuse.need(replicas % shard == 0, "plan.shard_degree", shard, "must divide data x context ({})", replicas)
    if p.shard == "none" and asked is not None:
        rule = "needs plan.shard: optimizer, gradients or parameters"
        refuse.need(asked == 0, "plan.shard_degree", asked, rule)
    layout: str = job.training.dispatch.layout or ("ragged" if job.training.capacity == "dropless" else "slots")
    if layout == "ragged" and cluster.chip.kind == "cpu":
        # XLA:CPU has no ragged all-to-all (docs/trainer.md).
        layout = "blocks"
    return Degrees(
        data=data,
        tensor=p.tensor,
        context=p.context,
        pipeline=p.pipeline,
        expert=p.expert,
        expert_tensor=p.expert_tensor,
        expert_data=replicas * p.tensor // (p.expert * p.expert_tensor),
        shard=shard,
        microbatch_sequences=micro,
        microbatches=microbatches,
        layout=layout,
        chunks=chunks_of(job.model, p.stages, p.pipeline, p.virtual_stages) if plan is None else (),
        strides=_strides(p, data),
        virtual_stages=p.virtual_stages,
    )


def rows_per_block(mean: Number) -> Number:
    """Rows of a block of the layout `blocks` where an expert has `mean` rows: that many, as a power of 2, 8 to 128.

    Few, so that little is rounded up; enough that products run at full speed (the trainer's experts on CPU).
    """
    rows: Number = SMALLEST_BLOCK
    for power in (16, 32, 64, LARGEST_BLOCK):
        rows = where(mean >= power, power, rows)
    return rows


def group_tokens(capacity: Capacity, sequence_tokens: int, microbatch_tokens: int) -> int:
    """Tokens over which capacity is counted; the job's, or one sequence, never more than one microbatch has."""
    return min(capacity.group_tokens or sequence_tokens, microbatch_tokens)


def slots_per_expert(capacity: Capacity, top_k: int, experts: int, group: int, *, evaluation: bool = False) -> int:
    """Slots an expert has for a group of N tokens: factor x N (x k with basis assignments) / E, rounded.

    At least `minimum`, at most N. `evaluation` takes the factor for evaluation, where there is one. MaxText's
    `int(max(ceil(N k / E) CF, CF))` differs by its own ceil before the factor: at most one slot in N k / E.
    """
    factor = (capacity.eval_factor if evaluation else None) or capacity.factor
    wanted = factor * group * (top_k if capacity.basis == "assignments" else 1) / experts
    # A billionth absorbs binary fractions: 1.1 x 10 is 11 slots, not 12 or 10.
    if capacity.rounding == "ceil":
        rounded = math.ceil(wanted - 1e-9)
    else:
        rounded = math.floor(wanted + (0.5 if capacity.rounding == "round" else 1e-9))
    return min(group, max(capacity.minimum, rounded))
