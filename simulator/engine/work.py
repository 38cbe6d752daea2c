"""What each device class does in one action, from the same times that the closed form adds up.

An action (a forward of a chunk, say) is compute in series with exposed collectives, and overlapped collectives beside
it. Equal layers of a chunk are merged: events exist only where somebody may have to wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from simulator.costs.piece_times import CommTime, PieceTime
from simulator.costs.reductions import StateCosts
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.workload.habits import Habits, overlap_of
from simulator.workload.saved import saved_bytes
from simulator.workload.shards import Shards
from simulator.workload.stages import Workload, offload_names, recompute_names


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective of one action: its group, the bytes of all its calls together, and how many calls there are.

    `out_bytes` of an all-to-all go to the experts, the others come back; `hot` says whether busy ranks have more.
    """

    name: str
    kind: str
    size: int
    stride: int
    bytes: float
    calls: float = 1.0
    between: float = 1.0
    overlapped: bool = False
    out_bytes: float = 0.0
    hot: bool = False


@dataclass(slots=True)
class PassWork:
    """One pass of a chunk: seconds of compute, of collectives in tensor and context groups, of exposed host traffic.

    `hot_s` is what a load of twice the mean on the busiest rank would add to the compute of the layers with experts,
    `hot_network_s` to their all-to-alls. `kernels` are what the host launches for the pass.
    """

    compute_s: float = 0.0
    serial_s: float = 0.0
    host_s: float = 0.0
    hot_s: float = 0.0
    hot_network_s: float = 0.0
    kernels: float = 0.0
    transfers: list[Transfer] = field(default_factory=list)

    def add(self, new: Transfer) -> None:
        """Add a transfer; calls over the same group become one, since nothing happens between them."""
        for i, t in enumerate(self.transfers):
            if replace(t, bytes=0, calls=0, out_bytes=0) == replace(new, bytes=0, calls=0, out_bytes=0):
                self.transfers[i] = replace(
                    t, bytes=t.bytes + new.bytes, calls=t.calls + new.calls, out_bytes=t.out_bytes + new.out_bytes
                )
                return
        self.transfers.append(new)


@dataclass(slots=True)
class ChunkWork:
    """A chunk (virtual stage): its passes, and the bytes that one microbatch keeps on the device until its backward."""

    forward: PassWork
    input: PassWork
    weight: PassWork
    kept_bytes: float
    layers: int


@dataclass(slots=True)
class DeviceWork:
    """A device class: its chunks, and what happens once a step.

    `reductions` start layer by layer during the last backward pass, `gathers` of updated weights (ZeRO 1) must be there
    layer by layer in the first forward pass; `buckets` is the number of such parts.
    """

    chunks: list[ChunkWork]
    reductions: list[Transfer]
    gathers: list[Transfer]
    update_s: float
    buckets: int


class WorkBuilder:
    """Turns the times of pieces into the work of device classes."""

    def __init__(
        self, job: Job, degrees: Degrees, habits: Habits, workload: Workload, times: list[PieceTime], costs: StateCosts
    ) -> None:
        self.job, self.degrees, self.habits = job, degrees, habits
        self.overlap = overlap_of(job, costs.cluster.chip.kind)
        self.workload, self.times, self.costs = workload, times, costs
        self.shards = Shards.of(degrees)
        self.names, self.offload = recompute_names(job), offload_names(job)

    def devices(self) -> list[DeviceWork]:
        """The work of each pipeline rank; ranks with equal chunks share one record."""
        known: dict[tuple[tuple[int, ...], ...], DeviceWork] = {}
        out = []
        for p, own in enumerate(self.workload.chunk_counts):
            counts = own
            if self.job.plan.schedule == "dualpipe" and self.degrees.pipeline > 1:
                counts = [own[0], self.workload.chunk_counts[self.degrees.pipeline - 1 - p][0]]
            key = tuple(tuple(c) for c in counts)
            if key not in known:
                known[key] = self._device(counts)
            out.append(known[key])
        return out

    def _device(self, counts: list[list[int]]) -> DeviceWork:
        chunks = [self._chunk(c) for c in counts]
        pairs = [(t.piece, sum(c[i] for c in counts)) for i, t in enumerate(self.times)]
        # Both copies of DualPipe's parameters are reduced together with their twin on the mirrored rank.
        dense = sum(p.dense_parameters * n for p, n in pairs)
        expert = sum(p.expert_parameters * n for p, n in pairs)
        layers = max(1, sum(c.layers for c in chunks))
        overlap = self.overlap
        summed = sum(p.dense_parameters * n for p, n in pairs if p.is_reduced)
        calls = self.costs.calls(pairs)
        reductions = [_whole(c, "gradients", overlap.gradients) for c in self.costs.reductions(summed, expert, calls)]
        if self.costs.every_microbatch:
            for chunk in chunks:
                share = chunk.layers / layers
                for t in reductions:
                    chunk.input.add(replace(t, bytes=t.bytes * share, calls=t.calls * share))
            reductions = []
        reductions += [_whole(c, "gradients", overlap.gradients) for c in self.costs.own_sums(calls)]
        return DeviceWork(
            chunks=chunks,
            reductions=reductions,
            gathers=[_whole(c, "parameters", overlap.parameters) for c in self.costs.new_weights(dense, expert, calls)],
            update_s=self.costs.update_s(dense, expert),
            buckets=layers,
        )

    def _chunk(self, counts: list[int]) -> ChunkWork:
        forward, inputs, weight = PassWork(), PassWork(), PassWork()
        kept, layers = 0.0, 0
        for t, n in zip(self.times, counts, strict=True):
            if not n:
                continue
            forward.compute_s += n * t.forward_s
            inputs.compute_s += n * t.backward_input_s
            weight.compute_s += n * t.backward_weight_s
            forward.serial_s += n * t.forward_other_s
            inputs.serial_s += n * t.backward_other_s
            inputs.host_s += n * t.host_s
            if t.hot_unit_s:
                # A backward pass of experts is two products to the forward's one.
                forward.hot_s += n * t.hot_unit_s / 3
                inputs.hot_s += n * t.hot_unit_s * 2 / 3
            forward.kernels += n * t.forward_kernels
            inputs.kernels += n * t.input_kernels
            weight.kernels += n * t.weight_kernels
            forward.hot_network_s += n * t.hot_forward_s
            inputs.hot_network_s += n * t.hot_backward_s
            self._all_to_alls(forward, inputs, t, n)
            self._gathers(forward, inputs, t, n)
            kept += n * saved_bytes(t.piece, self.names, self.offload)
            layers += n if t.piece.is_layer else 0
        return ChunkWork(forward, inputs, weight, kept, layers)

    def _all_to_alls(self, forward: PassWork, inputs: PassWork, t: PieceTime, n: int) -> None:
        beside = self.overlap.all_to_all
        for c in t.comms:
            if c.kind != "all_to_all":
                continue
            ways = (forward, n * c.forward, c.to_experts[0]), (inputs, n * c.backward, c.to_experts[1])
            for one, calls, out in ways:
                if calls:
                    bytes_ = float(calls * c.bytes)
                    hot = bool(c.hot_s)
                    name = "all-to-all"
                    one.add(
                        Transfer(name, c.kind, c.size, c.stride, bytes_, calls, c.between, beside, bytes_ * out, hot)
                    )

    def _gathers(self, forward: PassWork, inputs: PassWork, t: PieceTime, n: int) -> None:
        """FSDP: a layer's weights are gathered for each pass of each microbatch, the head's only for the forward."""
        if self.job.plan.shard != "parameters" or not t.piece.is_gathered:
            return
        beside = self.overlap.parameters
        for axis, size, parameters, parts in (
            ("replica", self.shards.dense, t.piece.dense_parameters, t.piece.dense_calls),
            ("expert_data", self.shards.expert, t.piece.expert_parameters, t.piece.expert_calls),
        ):
            if size > 1 and parameters:
                # As in the closed form: our trainer gathers the output table once for all microbatches.
                once = self.habits.own and not t.piece.is_layer
                share = 1 / self.degrees.microbatches if once else 1.0
                bytes_ = float(n * parameters * self.habits.gather_bytes) * share
                stride = self.degrees.strides[axis]
                new = Transfer("parameters", "all_gather", size, stride, bytes_, n * parts * share, overlapped=beside)
                forward.add(new)
                if t.piece.is_layer:
                    inputs.add(new)


def _whole(c: CommTime, name: str, beside: bool) -> Transfer:
    return Transfer(name, c.kind, c.size, c.stride, float(c.bytes), c.parts, overlapped=beside)
