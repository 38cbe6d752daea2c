"""Memory of one device of each pipeline stage, part by part, at its fullest instant.

Two kinds of program are modelled, because they really differ (docs/model.md, memory):

- XLA: fp32 weights in shards; copies in the compute format of all local weights, made once outside the layer scan;
  gradient stacks; what the backward pass of one layer has alive; or the logits, whichever instant is fuller. The terms
  were read off XLA:TPU's memory-usage reports of MaxText programs (benchmarks/maxtext_compiled.py compares).
- Torch (Megatron-LM and alike): resident 16-bit weights, an fp32 master copy and moments (sharded with ZeRO 1 and up),
  fp32 gradient buffers, activations of the microbatches in flight, logits in 16 and 32 bits on the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.numbers import Number, largest, maximum, minimum, where
from simulator.results.forecast import StageMemory
from simulator.workload.blocks import works_in_blocks
from simulator.workload.habits import Habits
from simulator.workload.saved import is_recomputed, saved_bytes
from simulator.workload.schedules import in_flight
from simulator.workload.shards import Shards
from simulator.workload.stages import Piece, Workload, offload_names, recompute_names


def optimizer_bytes(habits: Habits, dense: Number, expert: Number, hidden: int, shards: Shards) -> Number:
    """Master copy and moments of `dense` and `expert` parameters of a device, after sharding.

    Adafactor (arXiv:1804.04235) keeps row and column sums instead of the second moment: about 2/D of it.
    """
    # T5X and optax factor matrices with at least 128 on both sides.
    factored = habits.factored_second_moment and hidden >= 128
    second = habits.second_moment_bytes * (2 / hidden if factored else 1)
    each = habits.master_bytes + habits.first_moment_bytes + second
    return each * (dense / shards.dense + expert / shards.expert)


def ragged_buffer_factor(job: Job, degrees: Degrees, habits: Habits, experts: int, top_k: int) -> Number:
    """Rows that XLA sets aside for a ragged dispatch over the balanced count: the worst case min(EP, E/k).

    Static shapes have to hold every token on one rank (MaxText without a buffer factor; facts/aot.md). Torch allocates
    what arrived.
    """
    if works_in_blocks(job, degrees):
        # The workload has those buffers as they are.
        return 1.0
    if degrees.layout not in ("ragged", "blocks") or not habits.xla or job.training.capacity != "dropless":
        return 1.0
    return where(degrees.expert > 1, minimum(degrees.expert, experts / top_k) * 1.0, 1.0)


def _layer_workspace(piece: Piece, names: set[str] | None, habits: Habits, buffers: Number) -> Number:
    """Alive during one layer's backward pass beyond what was saved: recomputed results and the gradients in hand."""
    remade: Number = 0.0
    widest: Number = 0.0
    for op in piece.work.ops:
        size = op.saved_bytes * (buffers if op.hot or op.remat == "dispatch" else 1.0)
        if is_recomputed(op, names):
            remade = remade + size
        elif op.hot:
            remade = remade + size - op.saved_bytes
        if op.kind == "matmul" and op.remat != "router" and not habits.own:
            # The gradient of the activation between the two products of a network has the size of the second's input.
            # In our trainer's programs XLA writes it over that input (seen on v5p, docs/compile.md).
            widest = maximum(
                widest, op.rows * op.groups * op.depth * habits.activation_bytes * (buffers if op.hot else 1.0)
            )
    # Three of the stream's size: the gradient that arrives, the one that leaves, and the branch's own before the sum.
    return remade + widest + 3 * piece.work.boundary_bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a piece takes on a device, for one microbatch: bytes saved, of its workspace, and of its logits."""

    piece: Piece
    saved: Number
    workspace: Number
    logits: Number


def footprints(job: Job, degrees: Degrees, habits: Habits, workload: Workload) -> list[Footprint]:
    """The footprint of every piece of `workload`, in its order."""
    names, offload = recompute_names(job), offload_names(job)
    moe = job.model.moes[0] if job.model.moes else None
    out = []
    for p in workload.pieces:
        # The experts' rows are set aside by the first kind of experts.
        routed = moe is not None and p.moe is not None and p.slots is None
        factor = ragged_buffer_factor(job, degrees, habits, moe.experts, moe.top_k) if routed and moe else 1.0
        workspace = _layer_workspace(p, names, habits, factor) if p.is_layer else 0.0
        out.append(Footprint(p, saved_bytes(p, names, offload), workspace, _logits_bytes(p, habits)))
    return out


def _gathered_bytes(job: Job, habits: Habits, pieces: list[tuple[Footprint, Number]], shards: Shards) -> Number:
    """Compute-format copies of weights: XLA's local copies of all, and the layers gathered from other shards.

    XLA holds one whole layer and the gradient of its largest matrix; torch FSDP prefetches a second layer.
    """
    full = job.plan.shard == "parameters"
    copies: Number = 0.0
    layer: Number = 0.0
    for footprint, count in pieces:
        piece = footprint.piece
        here = piece.dense_parameters / (shards.dense if full else 1) + piece.expert_parameters / (
            shards.expert if full else 1
        )
        if habits.xla and habits.parameter_bytes > habits.gather_bytes and piece.is_layer:
            copies = copies + here * count * habits.gather_bytes
        if full and piece.is_layer:
            whole = (piece.dense_parameters + piece.expert_parameters) * habits.gather_bytes
            biggest = piece.largest_matrix * habits.gather_bytes
            layer = maximum(layer, where(count > 0, whole + biggest if habits.xla else 2 * whole, 0.0))
    return copies + where(maximum(shards.dense, shards.expert) > 1, layer, 0.0)


def stage_memory(
    job: Job,
    degrees: Degrees,
    habits: Habits,
    pieces: list[tuple[Footprint, Number]],
    stage: Number,
    reserve: float,
) -> StageMemory:
    """Memory of one device of `stage`, bytes by part; the parts add up to the peak.

    `pieces` are what the stage holds and how often. DualPipe feeds the pipeline from both ends: there a device also
    holds the mirrored stage (arXiv:2412.19437, 3.2.1). In columns a piece may be held by some rows only.
    """
    dual = job.plan.schedule == "dualpipe" and degrees.pipelined
    shards, zero = Shards.of(degrees), job.plan.shard
    dense = sum(f.piece.dense_parameters * n for f, n in pieces)
    expert = sum(f.piece.expert_parameters * n for f, n in pieces)
    none = Shards(1, 1)

    def state(width: float, split: bool) -> Number:
        s = shards if split else none
        return width * (dense / s.dense + expert / s.expert)

    layers = [(f, n) for f, n in pieces if f.piece.is_layer]
    flight = in_flight(job.plan.schedule, stage, degrees.pipeline, degrees.microbatches, degrees.virtual_stages)
    kept = sum(f.saved * n for f, n in layers)
    ends = sum(f.saved * n for f, n in pieces if not f.piece.is_layer)
    # Under DualPipe both directions share the P + 1 microbatches in flight; `kept` already counts both stages.
    activations = kept * flight / (2 if dual else 1) + ends
    gathered = _gathered_bytes(job, habits, pieces, shards)
    gradients = state(habits.gradient_bytes, zero in ("gradients", "parameters"))
    if habits.own and not degrees.pipelined:
        # The sum over microbatches, and the gradients of the one that is being added.
        added = state(habits.gradient_bytes, zero == "parameters")
        gradients = gradients + where(degrees.microbatches > 1, added, 0.0)
    layer_space = largest([where(n > 0, f.workspace, 0.0) for f, n in layers])
    head = largest([where(n > 0, f.logits, 0.0) for f, n in pieces])
    if habits.xla:
        # At the logits no layer weights are gathered and no gradients exist yet; the fuller instant counts.
        early = head - where(degrees.microbatches == 1, gradients, 0.0)
        workspace = maximum(layer_space, early)
    else:
        workspace = maximum(layer_space, head)
    boundary = largest([where(n > 0, f.piece.work.boundary_bytes, 0.0) for f, n in layers])
    full_stream = boundary * (degrees.tensor if job.plan.sequence_parallel else 1)
    buffers = (2 * boundary if degrees.pipelined else 0.0) + (full_stream if job.plan.sequence_parallel else 0.0)
    dispatch = largest([where(n > 0, f.piece.work.dispatch_buffer_bytes, 0.0) for f, n in layers])
    return StageMemory(
        stage=stage,
        layers=sum(n for _, n in layers),
        microbatches_in_flight=flight,
        parameters_bytes=state(habits.parameter_bytes, zero == "parameters"),
        gradients_bytes=gradients,
        optimizer_bytes=optimizer_bytes(habits, dense, expert, job.model.hidden, shards if zero != "none" else none),
        activations_bytes=activations,
        dispatch_bytes=where((degrees.expert > 1) | (not habits.xla), dispatch, 0.0),
        gathered_weights_bytes=gathered,
        collective_buffers_bytes=buffers,
        workspace_bytes=workspace,
        reserve_bytes=reserve,
    )


def stage_memories(
    job: Job, degrees: Degrees, habits: Habits, workload: Workload, reserve: float
) -> tuple[StageMemory, ...]:
    """Memory of every stage; stages with the same pieces and microbatches in flight are worked out once."""
    known: dict[tuple[object, ...], StageMemory] = {}
    each = footprints(job, degrees, habits, workload)
    out = []
    for stage in range(degrees.pipeline):
        flight = in_flight(job.plan.schedule, stage, degrees.pipeline, degrees.microbatches, degrees.virtual_stages)
        counts = workload.held_counts(stage, job.plan.schedule)
        key = (counts, flight)
        if key not in known:
            held = held_pieces(each, counts)
            known[key] = stage_memory(job, degrees, habits, held, stage, reserve)
        out.append(replace(known[key], stage=stage, microbatches_in_flight=round(flight)))
    return tuple(out)


def held_pieces(each: list[Footprint], counts: tuple[tuple[int, ...], ...]) -> list[tuple[Footprint, Number]]:
    """The pieces of a stage (and of DualPipe's mirrored one) and how often it holds each."""
    return [(f, n) for own in counts for f, n in zip(each, own, strict=True) if n]


def _logits_bytes(piece: Piece, habits: Habits) -> Number:
    """Logits and their gradient: two 16-bit copies under XLA (fp32 ones never exist there), 16 and 32 bits in torch."""
    each = 2 * habits.activation_bytes if habits.xla else habits.activation_bytes + 4
    logits = [op for op in piece.work.ops if op.remat == "logits" and op.kind == "matmul"]
    return largest([op.rows * op.columns * each for op in logits])


def argument_bytes(job: Job, degrees: Degrees, habits: Habits, workload: Workload, stage: int = 0) -> Number:
    """Bytes of a train step's arguments on a device: weights, optimiser state, the batch (int32 tokens).

    MaxText passes inputs, targets, positions and segment ids of both: six int32 arrays of its sequences.
    """
    pieces = [(p, n) for p, n in zip(workload.pieces, workload.counts[stage], strict=True) if n]
    shards, zero = Shards.of(degrees), job.plan.shard
    dense = sum(p.dense_parameters * n for p, n in pieces)
    expert = sum(p.expert_parameters * n for p, n in pieces)
    s = shards if zero == "parameters" else Shards(1, 1)
    parameters = habits.parameter_bytes * (dense / s.dense + expert / s.expert)
    states = optimizer_bytes(habits, dense, expert, job.model.hidden, shards if zero != "none" else Shards(1, 1))
    tokens = (
        (job.batch.encoder_length + job.batch.decoder_length) * job.batch.sequences / degrees.data / degrees.context
    )
    return parameters + states + 6 * 4 * tokens
