"""From a job to its work: the distinct pieces of the model, how often each pipeline stage runs them, their parameters.

A piece is a layer kind, the embedding, the head (final norm, logits, loss) or an MTP module. Equal layers are computed
once and counted, so that a forecast costs the same for 4 layers and for 400.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simulator.job.job import Job, RematPolicy
from simulator.job.layout import Chunk
from simulator.job.model import Layer, Model, Moe
from simulator.job.rules import Degrees
from simulator.numbers import Number, largest, minimum, where
from simulator.workload.attention import attention_work, lstm_work
from simulator.workload.feedforward import ffn_work, moe_work, slots_of
from simulator.workload.habits import Habits
from simulator.workload.ops import Comm, LayerWork, product, stream
from simulator.workload.parameters import layer_parameters, norm_parameters
from simulator.workload.routing import Slots
from simulator.workload.saved import saved_bytes
from simulator.workload.shards import Shards
from simulator.workload.tensors import layer_tensors, norm_tensors


@dataclass(slots=True)
class Piece:
    """One kind of work: its ops for a microbatch on a device, and the parameters that device holds before sharding.

    `is_gathered`, `is_reduced`: whether FSDP gathers its weights whole, and sums its gradients over the shard ranks.
    `dense_calls`, `expert_calls`: by how many calls it does either.
    """

    name: str
    work: LayerWork
    dense_parameters: Number
    expert_parameters: Number
    is_layer: bool = True
    moe: Moe | None = None
    slots: Slots | None = None
    routed_tokens: Number = 0.0
    largest_matrix: Number = 0.0
    is_gathered: bool = True
    is_reduced: bool = True
    dense_calls: int = 1
    expert_calls: int = 1


@dataclass(slots=True)
class Workload:
    """All pieces, and how many of each every stage runs per microbatch: `counts[stage][piece]`.

    `chunk_counts[stage][chunk][piece]` has them for each virtual stage.
    """

    pieces: list[Piece]
    counts: list[list[int]] = field(default_factory=list)
    chunk_counts: list[list[list[int]]] = field(default_factory=list)

    def held_counts(self, stage: int, schedule: str) -> tuple[tuple[int, ...], ...]:
        """How many of each piece `stage` holds; under DualPipe also those of its mirrored twin."""
        own = tuple(self.counts[stage])
        mirrored = schedule == "dualpipe" and len(self.counts) > 1
        return (own, tuple(self.counts[-1 - stage])) if mirrored else (own,)


def recompute_names(job: Job) -> set[str] | None:
    """Names of forward results that the backward pass makes again; None for all of them (full recomputation).

    `selective` is Megatron-LM's default: the core attention only.
    """
    remat = job.training.remat
    if isinstance(remat, RematPolicy):
        if remat.save:
            every = {
                "norms", "qkv", "mla_up_proj", "core_attention", "attention_output", "ffn", "ffn_activation", "router",
                "dispatch", "experts", "expert_activation", "shared_expert",
            }  # fmt: skip
            return every - set(remat.save) - set(remat.offload)
        return set(remat.recompute)
    return {"none": set(), "selective": {"core_attention"}, "full": None}[remat]


def offload_names(job: Job) -> set[str]:
    """Names of forward results that wait in host memory."""
    remat = job.training.remat
    return set(remat.offload) if isinstance(remat, RematPolicy) else set()


class _Builder:
    """Makes the pieces of one job; holds what all of them need."""

    def __init__(self, job: Job, degrees: Degrees, habits: Habits) -> None:
        self.job, self.model, self.degrees, self.habits = job, job.model, degrees, habits
        self.sequences = degrees.microbatch_sequences

    def tokens(self, length: int) -> Number:
        """Tokens a device computes attention for."""
        return self.sequences * length / self.degrees.context

    def stream_tokens(self, length: int) -> Number:
        """Tokens of the residual stream a device holds."""
        split = self.degrees.tensor if self.job.plan.sequence_parallel else 1
        return self.tokens(length) / split

    def layer(self, name: str, layer: Layer, length: int, keys: int) -> Piece:
        """One layer of the kind `layer` over sequences of `length` tokens (cross-attention over `keys`)."""
        d, h, model, habits = self.degrees, self.model.hidden, self.model, self.habits
        work = LayerWork()
        tokens, stream_tokens = self.tokens(length), self.stream_tokens(length)
        work.boundary_bytes = stream_tokens * h * habits.activation_bytes
        common = {"hidden": h, "sequences": self.sequences, "length": length, "tensor": d.tensor, "context": d.context}
        prefix = name.partition("[")[0]
        if layer.attention is not None:
            attention_work(
                work, f"{prefix}.attention", layer.attention, habits, keys=length, causal=layer.causal, cross=False,
                stream_tokens=stream_tokens,
                document=self.job.batch.document_length if layer.causal else None, **common,
            )  # fmt: skip
            if layer.cross_attention:
                attention_work(
                    work, f"{prefix}.cross_attention", layer.attention, habits, keys=keys, causal=False, cross=True,
                    stream_tokens=stream_tokens,
                document=None, **common,
                )  # fmt: skip
        if layer.lstm is not None:
            lstm_work(work, f"{prefix}.lstm", layer.lstm, habits, hidden=h, tokens=tokens, sequences=self.sequences)
        if layer.ffn is not None:
            ffn_work(
                work,
                f"{prefix}.ffn",
                layer.ffn,
                habits,
                tokens=tokens,
                stream_tokens=stream_tokens,
                hidden=h,
                tensor=d.tensor,
                last=layer.moe is None,
            )
        p = layer_parameters(layer, model)
        split = (p.mixer + p.cross_attention + p.ffn + p.shared) / d.tensor + p.router + p.norms
        piece = Piece(name, work, split, p.routed / (d.expert * d.expert_tensor))
        widths: list[Number] = [layer.ffn.hidden / d.tensor] if layer.ffn else []
        if layer.moe is not None:
            self._moe(piece, prefix, layer, length, tokens, stream_tokens)
            widths.append(layer.moe.expert.hidden * layer.moe.experts / (d.expert * d.expert_tensor))
        if habits.own:
            # Ranks that split the sequence each have a part of the gradients of what all of them hold.
            copied = p.norms + p.router if self.job.plan.sequence_parallel else p.router
            split = self.job.plan.sequence_parallel or d.expert_tensor < d.tensor
            a = layer.attention
            if a is not None and a.mla is None:
                copied = copied + where(a.kv % d.tensor != 0, 2 * h * a.kv * a.head_dim, 0)
            work.comms.append(Comm(f"{prefix}.attention.norm", "all_reduce", "tensor", 4 * copied * split, 0, 1))
        if habits.each_array:
            piece.dense_calls, piece.expert_calls = layer_tensors(layer, model)
            # XLA:CPU clears the stacks of what a scan over layers saves before it fills them, and copies them out. Of
            # the stacked weights it copies a layer's each way, and clears the stacks of their gradients.
            kept = saved_bytes(piece, recompute_names(self.job), offload_names(self.job))
            shards = Shards.of(d) if self.job.plan.shard == "parameters" else Shards(1, 1)
            weights = habits.parameter_bytes * (
                piece.dense_parameters / shards.dense + piece.expert_parameters / shards.expert
            )
            work.ops.append(stream("layers.saved", "layer_input", 2 * (kept + weights), kept + 3 * weights))
            work.ops[-1].dead_on_recompute = True
        piece.largest_matrix = h * largest([*widths, h / d.tensor])
        return piece

    def _moe(self, piece: Piece, prefix: str, layer: Layer, length: int, tokens: Number, stream_tokens: Number) -> None:
        d, moe = self.degrees, layer.moe
        assert moe is not None
        # Tensor ranks that do not split the experts' hidden size split the tokens instead (Megatron's folding).
        token_split = d.tensor if self.job.plan.sequence_parallel else d.tensor / minimum(d.tensor, d.expert_tensor)
        routed = tokens / token_split
        whole = self.sequences * length * d.data
        arriving = whole * moe.top_k / (d.expert * d.expert_data)
        slots = slots_of(self.job, moe, length, self.sequences * length)
        piece.moe, piece.slots, piece.routed_tokens = moe, slots, routed
        moe_work(
            piece.work, f"{prefix}.moe", moe, self.job, self.habits, layout=d.layout, slots=slots, tokens=tokens,
            stream_tokens=stream_tokens, routed_tokens=routed, assignments_here=arriving,
            experts_here=moe.experts / d.expert,
            hidden=self.model.hidden, tensor=d.tensor, expert_tensor=d.expert_tensor,
            router_copies=d.tensor / token_split, split_tokens=token_split,
        )  # fmt: skip

    def _tensor_end(self, work: LayerWork, scope: str, size: Number, forward: int, backward: int) -> None:
        """A collective over the vocabulary's ranks at an end of the model, in one pass only.

        The table's partial rows are summed in the forward pass, the gradient of the logits' input in the backward one
        (Megatron-LM's VocabParallelEmbedding and ColumnParallelLinear); the other pass needs nothing, or under sequence
        parallelism the gather that is the scatter's counterpart.
        """
        if self.job.plan.sequence_parallel:
            work.comms.append(Comm(scope, "reduce_scatter", "tensor", size, forward, backward))
            work.comms.append(Comm(scope, "all_gather", "tensor", size, backward, forward))
        else:
            work.comms.append(Comm(scope, "all_reduce", "tensor", size, forward, backward))

    def embedding(self, lengths: list[int]) -> Piece:
        """Lookup of the token embeddings (and learnt positions) of both stacks."""
        work, h, m = LayerWork(), self.model.hidden, self.model
        moved = sum(self.stream_tokens(x) for x in lengths) * h * self.habits.activation_bytes
        work.ops.append(stream("embedding.lookup", "layer_input", 2 * moved, 3 * moved))
        whole = sum(self.tokens(x) for x in lengths) * h * self.habits.activation_bytes
        self._tensor_end(work, "embedding.tensor_reduce", whole, 1, 0)
        if self.habits.own and self.job.plan.shard == "parameters":
            # Every rank looks its columns up for all ranks' tokens (whose numbers have 4 bytes), and they exchange what
            # they found.
            numbers = 4 * moved / (h * self.habits.activation_bytes) * self.degrees.data * self.degrees.context
            work.comms.append(Comm("embedding.exchange", "all_gather", "replica", numbers, 1, 0))
            work.comms.append(Comm("embedding.exchange", "all_to_all", "replica", moved, 1, 1))
        rows = m.vocab * m.embedding_tables + (m.position_count or 0 if m.positions == "learned" else 0)
        piece = Piece("embedding", work, rows * h / self.degrees.tensor, 0.0, is_layer=False)
        # A table split over D is looked up in place; the result is exchanged. Tied, ours is gathered for the logits.
        piece.is_gathered = self.habits.own and m.tied_embeddings
        piece.is_reduced = not self.habits.own or m.tied_embeddings or self.job.plan.shard != "parameters"
        return piece

    def head(self, length: int, *, tied: bool) -> Piece:
        """Final norm, logits over the vocabulary (or the sampled classes), softmax cross-entropy."""
        work, m, habits = LayerWork(), self.model, self.habits
        tokens, h = self.tokens(length), m.hidden
        classes = m.sampled_softmax or m.vocab
        per_device = classes / self.degrees.tensor
        residual = self.stream_tokens(length) * h * habits.activation_bytes
        work.ops.append(stream("logits.norm", "norms", 2 * residual, 4 * residual, saved=residual))
        logits = tokens * per_device * habits.activation_bytes
        # The output projection stays in 16 bits under the 8-bit recipes.
        work.ops.append(
            product(
                "logits.product", "logits", tokens, h, per_device, width=habits.activation_bytes,
                weight_width=habits.activation_bytes, dtype=habits.attention_dtype,
            )
        )  # fmt: skip
        work.ops.append(stream("logits.loss", "logits", 3 * logits, 2 * logits))
        self._tensor_end(work, "logits.tensor_reduce", tokens * h * habits.activation_bytes, 0, 1)
        if habits.own:
            # Largest logit, sum of exponentials and the target's logit of every token, joined in fp32.
            work.comms.append(Comm("logits.loss", "all_reduce", "tensor", 3 * 4 * tokens, 1, 0))
        table = 0.0 if tied else m.vocab * h / self.degrees.tensor
        piece = Piece("logits", work, table + norm_parameters(m), 0.0, is_layer=False)
        if habits.each_array:
            piece.dense_calls = norm_tensors(m) + (0 if tied else 1)
        return piece

    def mtp(self, length: int) -> Piece:
        """One multi-token prediction module: projection 2D -> D, a decoder layer, and the shared head once more."""
        piece = self.layer("mtp", self.model.decoder_layers[-1], length, length)
        h, habits, tokens = self.model.hidden, self.habits, self.tokens(length)
        kw: dict[str, Any] = {
            "width": habits.activation_bytes,
            "weight_width": habits.weight_bytes,
            "dtype": habits.matmul_dtype,
        }
        split = self.degrees.tensor
        piece.work.ops.append(
            product(
                "mtp.projection", "qkv", tokens, 2 * h, h / split, saved=2 * tokens * h * habits.activation_bytes, **kw
            )
        )
        head = self.head(length, tied=True)
        piece.work.ops.extend(head.work.ops)
        piece.work.comms.extend(head.work.comms)
        piece.dense_parameters += 2 * h * h / split + 3 * norm_parameters(self.model)
        return piece


def build_workload(job: Job, degrees: Degrees, habits: Habits) -> Workload:
    """All pieces of `job` and their counts per stage; degrees in columns have no chunks, and get no counts."""
    model: Model = job.model
    builder = _Builder(job, degrees, habits)
    encoder, decoder = job.batch.encoder_length, job.batch.decoder_length
    pieces: list[Piece] = []
    for stack, layers, length in (
        ("encoder", model.encoder_layers, encoder),
        ("decoder", model.decoder_layers, decoder),
    ):
        for i, layer in enumerate({id(x): x for x in layers}.values()):
            pieces.append(builder.layer(f"{stack}[{i}]" if i else stack, layer, length, encoder or length))
    pieces.append(builder.embedding([x for x in (encoder, decoder) if x]))
    pieces.append(builder.head(decoder, tied=model.tied_embeddings and not degrees.pipelined))
    if model.mtp_layers:
        pieces.append(builder.mtp(decoder))
    chunk_counts = count_pieces(model, degrees.chunks)
    counts = [[sum(each) for each in zip(*chunks, strict=True)] for chunks in chunk_counts]
    return Workload(pieces, counts, chunk_counts)


def count_pieces(model: Model, chunks: tuple[tuple[Chunk, ...], ...]) -> list[list[list[int]]]:
    """How many of each piece every chunk of every stage runs: kinds of layers, embedding, head, MTP modules."""
    kinds: dict[int, int] = {}
    order = [kinds.setdefault(id(x), len(kinds)) for x in (*model.encoder_layers, *model.decoder_layers)]
    every = range(len(kinds) + (3 if model.mtp_layers else 2))
    return [[[_count(c, order, i, len(kinds)) for i in every] for c in own] for own in chunks]


def _count(chunk: Chunk, order: list[int], piece: int, embedding: int) -> int:
    if piece == embedding:
        return int(chunk.embedding)
    if piece == embedding + 1:
        return int(chunk.logits)
    if piece == embedding + 2:
        return chunk.mtp
    return order[chunk.first : chunk.first + chunk.layers].count(piece)
