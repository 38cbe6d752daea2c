"""The rules between the fields of a job and its cluster, and the degrees that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from simulator.job.job import Capacity, Job, Placement
from simulator.job.layout import Chunk, lay_out
from simulator.job.model import Moe

# Far beyond any model, and few enough that loops over layers or experts end while somebody waits.
MOST_LAYERS, MOST_EXPERTS, DEEPEST_FFN = 10_000, 262_144, 100


@dataclass(frozen=True, slots=True)
class Degrees:
    """The plan with every default filled in. All counts are JAX devices, sequences or microbatches."""

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

    @property
    def devices(self) -> int:
        """All devices of the job."""
        return self.data * self.tensor * self.context * self.pipeline


def _fail(field: str, value: object, rule: str) -> None:
    raise QuestionError(f"{field} = {value}: {rule}")


def _axes(job: Job, cluster: Cluster) -> int:
    """The data degree; QuestionError where the degrees do not make up the cluster."""
    p = job.plan
    others = p.tensor * p.context * p.pipeline
    if cluster.devices % others:
        _fail(
            "plan",
            f"tensor {p.tensor} x context {p.context} x pipeline {p.pipeline}",
            f"their product {others} must divide the {cluster.devices} devices of {cluster.name}",
        )
    data = p.data if p.data is not None else cluster.devices // others
    if data * others != cluster.devices:
        _fail(
            "plan.data",
            data,
            f"data x tensor x context x pipeline is {data * others}; {cluster.name} has {cluster.devices} devices",
        )
    inner = data * p.context * p.tensor
    if inner % (p.expert * p.expert_tensor):
        _fail(
            "plan.expert",
            p.expert,
            f"expert x expert_tensor ({p.expert * p.expert_tensor}) must divide data x context x tensor ({inner})",
        )
    return data


def _check_model(job: Job) -> None:
    p, model = job.plan, job.model
    if model.mtp_layers > MOST_LAYERS:
        _fail("model.mtp_layers", model.mtp_layers, f"must be at most {MOST_LAYERS:,}")
    stacks = [(n, s) for n, s in (("encoder", model.encoder), ("decoder", model.decoder)) if s is not None]
    for name, stack in stacks:
        if stack.layers > MOST_LAYERS:
            _fail(f"model.{name}.layers", stack.layers, f"must be at most {MOST_LAYERS:,}")
        for part, ffn in (("ffn", stack.ffn), ("moe.expert", stack.moe.expert if stack.moe else None)):
            if ffn is not None and ffn.depth > DEEPEST_FFN:
                _fail(f"model.{name}.{part}.depth", ffn.depth, f"must be at most {DEEPEST_FFN}")
        layers = model.encoder_layers if name == "encoder" else model.decoder_layers
        for layer in dict.fromkeys(id(x) for x in layers):
            kind = next(x for x in layers if id(x) == layer)
            a = kind.attention
            if a is not None:
                if a.heads % p.tensor:
                    _fail("plan.tensor", p.tensor, f"must divide the {a.heads} attention heads of the {name}")
                if a.mla is None and a.kv % p.tensor and p.tensor % a.kv:
                    _fail(
                        "plan.tensor",
                        p.tensor,
                        f"must divide, or be a multiple of, the {a.kv} key/value heads of the {name}",
                    )
            if kind.ffn is not None and kind.ffn.hidden % p.tensor:
                _fail(
                    "plan.tensor", p.tensor, f"must divide the feed-forward hidden size {kind.ffn.hidden} of the {name}"
                )
        if stack.lstm is not None and p.tensor * p.context * p.pipeline > 1:
            _fail(
                "plan",
                f"tensor {p.tensor}, context {p.context}, pipeline {p.pipeline}",
                "an LSTM is split over data and experts only",
            )
        if stack.moe is not None:
            _check_moe(job, name, stack.moe)
    if not model.moes and p.expert * p.expert_tensor > 1:
        _fail("plan.expert", p.expert, f"{model.name} has no experts")


def _check_moe(job: Job, stack: str, moe: Moe) -> None:
    p = job.plan
    if moe.experts > MOST_EXPERTS:
        _fail(f"model.{stack}.moe.experts", moe.experts, f"must be at most {MOST_EXPERTS:,}")
    if moe.experts % p.expert:
        _fail("plan.expert", p.expert, f"must divide the {moe.experts} experts of {job.model.name}")
    if moe.expert.hidden % p.expert_tensor:
        _fail("plan.expert_tensor", p.expert_tensor, f"must divide the expert hidden size {moe.expert.hidden}")
    if moe.shared_hidden % p.tensor:
        _fail("plan.tensor", p.tensor, f"must divide the shared experts' hidden size {moe.shared_hidden}")
    layout, capacity = job.training.dispatch.layout, job.training.capacity
    if capacity == "dropless" and layout in ("one_hot", "slots"):
        _fail("training.dispatch.layout", layout, "needs training.capacity; dropless jobs use ragged")


def _check_batch(job: Job, data: int) -> tuple[int, int]:
    """(sequences per microbatch and data rank, microbatches)."""
    p, batch = job.plan, job.batch
    if job.model.encoder is not None and batch.encoder_length == 0:
        _fail("batch.length", batch.length, f"{job.model.name} has an encoder: give {{encoder: ..., decoder: ...}}")
    if job.model.encoder is None and batch.encoder_length:
        _fail("batch.length", "encoder and decoder", f"{job.model.name} has no encoder: give one number")
    for name, length in (("encoder", batch.encoder_length), ("decoder", batch.decoder_length)):
        if length % p.context:
            _fail("plan.context", p.context, f"must divide the {name} length {length}")
        if p.sequence_parallel and length % (p.context * p.tensor):
            _fail(
                "plan.sequence_parallel",
                "true",
                f"context x tensor ({p.context * p.tensor}) must divide the {name} length {length}",
            )
    if batch.document_length is not None and batch.document_length > batch.decoder_length:
        _fail("batch.document_length", batch.document_length, f"must not exceed the length {batch.decoder_length}")
    if batch.sequences % data:
        _fail("batch.sequences", batch.sequences, f"must be a multiple of the data degree {data}")
    per_rank = batch.sequences // data
    micro = p.microbatch_sequences or (per_rank if p.pipeline == 1 else 1)
    if per_rank % micro:
        _fail("plan.microbatch_sequences", micro, f"must divide the {per_rank} sequences of a data rank")
    return micro, per_rank // micro


def _check_schedule(job: Job, microbatches: int) -> None:
    p = job.plan
    layers = len(job.model.encoder_layers) + len(job.model.decoder_layers)
    if p.virtual_stages > 1 and p.schedule != "interleaved":
        _fail("plan.virtual_stages", p.virtual_stages, f"needs schedule interleaved, not {p.schedule}")
    if p.virtual_stages > 1 and p.pipeline == 1:
        _fail("plan.virtual_stages", p.virtual_stages, "needs pipeline > 1")
    if p.pipeline * p.virtual_stages > layers + 2:
        _fail(
            "plan.pipeline",
            p.pipeline,
            f"x virtual_stages {p.virtual_stages} exceeds the {layers} layers of {job.model.name} and its two ends",
        )
    if p.virtual_stages > 1 and microbatches % p.pipeline:
        _fail(
            "plan.schedule",
            "interleaved",
            f"needs microbatches ({microbatches}) to be a multiple of pipeline {p.pipeline}",
        )
    if p.schedule == "dualpipe" and p.pipeline > 1:
        if p.pipeline % 2:
            _fail("plan.pipeline", p.pipeline, "dualpipe needs an even number of stages")
        if microbatches % 2 or microbatches < 2 * p.pipeline:
            _fail(
                "plan.schedule",
                "dualpipe",
                f"needs an even number of microbatches, at least 2 x pipeline; there are {microbatches}",
            )


def _chunks(job: Job) -> tuple[tuple[Chunk, ...], ...]:
    """Chunks of each stage: stage s runs chunks s, s + P, s + 2P, ...; under DualPipe also those of stage P - 1 - s."""
    p = job.plan
    layers = len(job.model.encoder_layers) + len(job.model.decoder_layers)
    flat = lay_out(p.stages, layers, job.model.mtp_layers, p.pipeline * p.virtual_stages)
    return tuple(flat[s :: p.pipeline] for s in range(p.pipeline))


def _strides(job: Job, data: int) -> dict[str, int]:
    """Distance in device index between neighbours on each axis; the expert axes subdivide data x context x tensor."""
    p = job.plan
    degree = {"data": data, "tensor": p.tensor, "context": p.context, "pipeline": p.pipeline}
    strides: dict[str, int] = {}
    here = 1
    for axis in (p.placement or Placement()).order:
        strides[axis] = here
        here *= degree[axis]
    base = min(strides[a] for a in ("data", "tensor", "context"))
    strides["expert_tensor"] = base
    strides["expert"] = base * p.expert_tensor
    strides["expert_data"] = base * p.expert_tensor * p.expert
    # Gradients of what is not an expert are reduced over data and context together.
    strides["replica"] = min(strides["data"], strides["context"]) if p.context > 1 else strides["data"]
    return strides


def resolve(job: Job, cluster: Cluster) -> Degrees:
    """All degrees of `job` on `cluster`; QuestionError, one line, for the first rule that does not hold."""
    p = job.plan
    data = _axes(job, cluster)
    _check_model(job)
    micro, microbatches = _check_batch(job, data)
    _check_schedule(job, microbatches)
    replicas = data * p.context
    shard = 1 if p.shard == "none" else (p.shard_degree or replicas)
    if replicas % shard:
        _fail("plan.shard_degree", shard, f"must divide data x context ({replicas})")
    if p.shard_degree and p.shard == "none":
        _fail("plan.shard_degree", p.shard_degree, "needs plan.shard: optimizer, gradients or parameters")
    layout = job.training.dispatch.layout or ("ragged" if job.training.capacity == "dropless" else "slots")
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
        chunks=_chunks(job),
        strides=_strides(job, data),
    )


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
