"""What a stage does with its weights and gradients once a step (or once a microbatch): collectives and the update."""

from __future__ import annotations

from collections.abc import Iterable

from hw_profiles.cluster import Cluster
from simulator.costs.piece_times import CommTime, Timer
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.network.collectives import merged_starts
from simulator.numbers import Number, maximum, some, where
from simulator.workload.habits import Habits
from simulator.workload.shards import Shards
from simulator.workload.stages import Piece


class StateCosts:
    """Collectives on weights and gradients of a stage, and the optimiser's update."""

    def __init__(
        self, job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, kernels: Kernels, timer: Timer
    ) -> None:
        self.job, self.cluster, self.degrees, self.habits = job, cluster, degrees, habits
        self.kernels, self.timer = kernels, timer
        self.shards = Shards.of(degrees)

    def _comm(
        self,
        scope: str,
        kind: str,
        size: Number,
        axis: str,
        bytes_: Number,
        apart: Number = 1,
        parts: Number = 1.0,
        *,
        merged: bool = False,
    ) -> CommTime:
        rate = self.timer.rate_of(kind, size, axis, apart)
        stride = self.degrees.strides[axis] * apart
        if merged:
            parts = merged_starts(self.cluster, parts)
        seconds = parts * rate.seconds(bytes_ / parts)
        return CommTime(scope, kind, size, bytes_, 0, 1, seconds, rate.level, stride, parts=parts, merged=merged)

    def calls(self, pieces: Iterable[tuple[Piece, Number]]) -> tuple[Number, Number]:
        """Calls that reduce (or gather, ZeRO 1) a stage's dense and expert weights; `pieces` with their counts.

        FSDP reduces layer by layer; otherwise the layers of a kind lie in one array of each name.
        """
        if not self.habits.each_array:
            return 1.0, 1.0
        each = self.job.plan.shard == "parameters"
        there = [(p, n if each else where(n > 0, 1, 0)) for p, n in pieces]
        dense = sum(n * p.dense_calls for p, n in there if p.is_reduced)
        expert = sum(n * p.expert_calls for p, n in there if some(p.expert_parameters > 0))
        return maximum(1.0, dense), maximum(1.0, expert)

    def reductions(self, dense: Number, expert: Number, calls: tuple[Number, Number] = (1.0, 1.0)) -> list[CommTime]:
        """The collectives that reduce a stage's gradients once; `calls` see `calls`.

        ZeRO 2 and 3 reduce-scatter within the shard group and all-reduce between its replicas; ZeRO 1 reduce-scatters
        over all replicas; otherwise an all-reduce.
        """
        d, zero = self.degrees, self.job.plan.shard
        out = []
        for axis, size, shard, parameters, what, parts in (
            ("replica", d.data * d.context, self.shards.dense, dense, "gradients", calls[0]),
            ("expert_data", d.expert_data, self.shards.expert, expert, "experts.gradients", calls[1]),
        ):
            bytes_ = parameters * self.habits.reduction_bytes
            if not some(size > 1) or not some(parameters > 0):
                continue
            with_own = what == "gradients"
            arrays = parts + self._joining(size, calls[1]) if with_own else parts
            whole = self._reduces_whole(shard)
            if zero in ("gradients", "parameters") and some(shard > 1) and some(1 - whole):
                # In columns some plans have one shard, or reduce whole: a collective that they lack carries nothing.
                split = where(whole, 0.0, bytes_)
                scatter = self._comm(f"{what}.reduce_scatter", "reduce_scatter", shard, axis, split, parts=parts)
                out.append(scatter)
                if some(size > shard):
                    between = size // shard
                    out.append(
                        self._comm(
                            f"{what}.all_reduce", "all_reduce", between, axis, split / shard, shard, arrays, merged=True
                        )
                    )
                if some(whole):
                    all_ = where(whole, bytes_, 0.0)
                    out.append(self._comm(f"{what}.all_reduce", "all_reduce", size, axis, all_, 1, arrays, merged=True))
            elif zero == "optimizer":
                scatter = self._comm(f"{what}.reduce_scatter", "reduce_scatter", size, axis, bytes_, parts=parts)
                out.append(scatter)
            else:
                out.append(self._comm(f"{what}.all_reduce", "all_reduce", size, axis, bytes_, 1, arrays, merged=True))
        return out

    @property
    def _norms(self) -> float:
        """Norms of the gradients: one is reported, another clips."""
        return 1.0 if self.job.training.learning.clip_norm is None else 2.0

    def _joining(self, size: Number, expert_arrays: Number) -> Number:
        """Arrays of the trainer's own sums that XLA:CPU merges with the gradients' all-reduce over `size` ranks.

        Those of the loss and of the routers, unless every microbatch has its own; and the squares of the experts'
        gradients, where ranks with different experts are the same group.
        """
        d = self.degrees
        if not self.habits.each_array or self.job.plan.shard != "none":
            return 0.0
        sums = where(d.microbatches > 1, 0.0, 2.0 if self.job.model.moes else 1.0)
        return sums + where(d.expert == size, self._norms * expert_arrays, 0.0)

    def own_sums(self, calls: tuple[Number, Number]) -> list[CommTime]:
        """What our trainer sums over ranks beside the gradients, in a step; `calls` see `calls`.

        Weights of the targets once where there are microbatches; loss and routers for every microbatch (once for those
        of a pipeline), as one array that may be merged with the gradients, and the largest logits. The squares of
        experts' gradients, unless merged. On XLA:CPU only: elsewhere so few numbers are lost beside the gradients.
        """
        d, alone = self.degrees, self.job.plan.shard != "none"
        if not self.habits.each_array:
            return []
        out, replicas = [], d.data * d.context
        model = self.job.model
        experts = [x.moe.experts for x in (*model.encoder_layers, *model.decoder_layers) if x.moe is not None]
        times = 1.0 if d.pipelined else d.microbatches
        sums = times if alone else where(d.microbatches > 1, times, 0.0)
        if some(replicas > 1):
            first = 0.0 if d.pipelined else where(d.microbatches > 1, 1.0, 0.0)
            bytes_ = 4.0 * (first + times * (4 + sum(2 * e + 8 for e in experts)))
            parts = first + sums + (times if experts else 0.0)
            if some(parts > 0):
                # Without any of its own in a plan, they are with the gradients.
                bytes_, parts = where(parts > 0, bytes_, 0.0), where(parts > 0, parts, 1.0)
                out.append(self._comm("step.sums", "all_reduce", replicas, "replica", bytes_, parts=parts))
        apart = where(d.expert > 1, where(d.expert == replicas, 1.0 if alone else 0.0, 1.0), 0.0)
        if some(apart):
            arrays = calls[1] * self._norms
            bytes_ = 4.0 * arrays * apart
            out.append(self._comm("optimizer.update", "all_reduce", d.expert, "expert", bytes_, 1, arrays, merged=True))
        return out

    def _reduces_whole(self, shard: Number) -> Number:
        """XLA:TPU all-reduces wide FSDP gradients (v5e, v5p, v6e, seen at 64 ways; facts/aot.md), TPU 7x does not."""
        chip = self.cluster.chip
        does = self.habits.xla and not self.habits.own and chip.kind == "tpu" and chip.name != "tpu7x"
        return does and shard > 8

    @property
    def every_microbatch(self) -> bool:
        """Whether gradients are reduced after every microbatch (ZeRO 2 and 3) and not once a step."""
        return self.job.plan.shard in ("gradients", "parameters") and some(self.degrees.microbatches > 1)

    def new_weights(self, dense: Number, expert: Number, calls: tuple[Number, Number] = (1.0, 1.0)) -> list[CommTime]:
        """ZeRO 1's gather of the updated weights, which the next forward pass needs; `calls` see `calls`."""
        out = []
        if self.job.plan.shard == "optimizer":
            for axis, size, parameters, what, parts in (
                ("replica", self.shards.dense, dense, "parameters", calls[0]),
                ("expert_data", self.shards.expert, expert, "experts.parameters", calls[1]),
            ):
                if some(size > 1) and some(parameters > 0):
                    bytes_ = parameters * self.habits.new_weight_bytes
                    out.append(self._comm(f"{what}.all_gather", "all_gather", size, axis, bytes_, parts=parts))
        return out

    def update_s(self, dense: Number, expert: Number) -> Number:
        """Seconds of the optimiser: gradients read, states and weights read and written, on this device's shard."""
        s = self.shards if self.job.plan.shard != "none" else Shards(1, 1)
        h = self.habits
        second = 0.0 if h.factored_second_moment else h.second_moment_bytes
        each = h.gradient_bytes + 2 * (h.first_moment_bytes + second + h.master_bytes) + 2 * h.parameter_bytes
        return self.kernels.stream_s(each * (dense / s.dense + expert / s.expert), "optimizer.update")
