"""Seconds of one piece of work for one microbatch on one device, by kind of time and pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from hw_profiles.cluster import Cluster
from hw_profiles.schema import Chip, Sharing
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.network.collectives import Network, Rate
from simulator.numbers import Number, maximum, minimum, some, where
from simulator.workload.habits import Habits
from simulator.workload.ops import Comm, Op
from simulator.workload.routing import distinct_domains
from simulator.workload.saved import is_recomputed, offloaded_bytes
from simulator.workload.stages import Piece, offload_names, recompute_names


@dataclass(slots=True)
class OpTime:
    """One compute op: seconds and FLOPs of each pass of one microbatch."""

    scope: str
    bound: str
    backward_bound: str
    forward_s: Number
    backward_s: Number
    recompute_s: Number
    forward_flops: Number
    backward_flops: Number
    recompute_flops: Number
    bytes: Number
    backward_bytes: Number


@dataclass(slots=True)
class CommTime:
    """One collective: group, bytes per call, calls of one microbatch, seconds a call.

    A call may be of `parts`, one after the other, that share its bytes and whose seconds it has; `merged` ones are one
    call of the program.
    `hot_s` is what a load of twice the mean on the busiest rank adds to a call.
    """

    scope: str
    kind: str
    size: Number
    bytes: Number
    forward: float
    backward: float
    seconds: Number
    level: str
    stride: Number = 1
    between: Number = 1.0
    hot_s: Number = 0.0
    to_experts: tuple[bool, bool] = (True, True)
    parts: Number = 1.0
    merged: bool = False


@dataclass(slots=True)
class PieceTime:
    """All of a piece. Seconds are at balanced load; `hot_unit_s` is what a load of twice the mean would add to compute.

    It is of both passes together; `hot_forward_s` and `hot_backward_s` are the same for the all-to-alls of each pass.
    `..._kernels` are what the host launches for each pass, collectives included.
    """

    piece: Piece
    ops: list[OpTime] = field(default_factory=list)
    comms: list[CommTime] = field(default_factory=list)
    forward_s: Number = 0.0
    backward_input_s: Number = 0.0
    backward_weight_s: Number = 0.0
    forward_all_to_all_s: Number = 0.0
    backward_all_to_all_s: Number = 0.0
    forward_other_s: Number = 0.0
    backward_other_s: Number = 0.0
    hot_unit_s: Number = 0.0
    hot_forward_s: Number = 0.0
    hot_backward_s: Number = 0.0
    host_s: Number = 0.0
    forward_kernels: Number = 0.0
    input_kernels: Number = 0.0
    weight_kernels: Number = 0.0
    model_flops: Number = 0.0
    executed_flops: Number = 0.0

    @property
    def compute_s(self) -> Number:
        """Seconds of compute, forward and backward, recompute included."""
        return self.forward_s + self.backward_input_s + self.backward_weight_s


class Timer:
    """Turns pieces into times for one job on one cluster.

    Of one plan, or with degrees in columns of many that share their flags; then `network` gives its lines in columns,
    and `detail`, the rows of single ops, is off.
    """

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        degrees: Degrees,
        habits: Habits,
        kernels: Kernels,
        busiest: Number,
        network: Network | None = None,
        detail: bool = True,
    ) -> None:
        self.job, self.cluster, self.degrees, self.habits, self.kernels = job, cluster, degrees, habits, kernels
        self.busiest, self.detail = busiest, detail
        self.network = network or Network(cluster)
        self.names = recompute_names(job)
        self.offload = offload_names(job)
        self.sharing = cluster.chip.sharing[0] if cluster.chip.sharing else None
        host = cluster.chip.host_link_gb_per_s
        self.host_bytes_per_s = host.value * 1e9 if host is not None else None

    def rate(self, axis: str, kind: str, between: Number = 1.0) -> tuple[Number, Rate]:
        """Group size and cost line of a collective over a mesh axis."""
        d = self.degrees
        size = {
            "tensor": d.tensor,
            "context": d.context,
            "expert": d.expert,
            "expert_tensor": d.expert_tensor,
            "replica": d.data * d.context,
            "expert_data": d.expert_data,
            "pipeline": d.pipeline,
        }[axis]
        return size, self.network.rate(kind, size, d.strides[axis], between)

    def rate_of(self, kind: str, size: Number, axis: str, apart: Number = 1) -> Rate:
        """Cost line of a collective over `size` members of an axis, every `apart`-th of them."""
        return self.network.rate(kind, size, self.degrees.strides[axis] * apart)

    def time(self, piece: Piece) -> PieceTime:
        """All times of `piece`."""
        out = PieceTime(piece)
        for op in piece.work.ops:
            self._op(out, op)
        for comm in piece.work.comms:
            self._comm(out, comm)
        if self.sharing is not None:
            _share_cores(out, self.sharing)
        if self.offload and piece.is_layer:
            self._offload(out)
        return out

    def _op(self, out: PieceTime, op: Op) -> None:
        k = self.kernels
        forward, backward = k.forward_s(op), k.backward_s(op)
        again = out.piece.is_layer and is_recomputed(op, self.names) and not op.dead_on_recompute
        recompute = k.recompute_s(op) if again else 0.0
        out.forward_s = out.forward_s + forward
        out.forward_kernels += 1
        out.input_kernels += 2 if again else 1
        if op.kind == "matmul":
            out.weight_kernels += 1
            out.backward_input_s = out.backward_input_s + backward / 2 + recompute
            out.backward_weight_s = out.backward_weight_s + backward / 2
        else:
            out.backward_input_s = out.backward_input_s + backward + recompute
        if op.hot:
            out.hot_unit_s = out.hot_unit_s + forward + backward + recompute
        flops = op.flops
        again_flops = flops if again else 0.0
        out.model_flops = out.model_flops + 3 * op.model_flops
        out.executed_flops = out.executed_flops + flops * (1 + op.backward) + again_flops
        if not self.detail:
            return
        out.ops.append(
            OpTime(
                op.scope,
                k.bound(op),
                k.bound(op, True),
                forward,
                backward,
                recompute,
                flops,
                flops * op.backward,
                again_flops,
                op.bytes,
                op.backward_bytes,
            )
        )

    def _comm(self, out: PieceTime, comm: Comm) -> None:
        kinds = self._kinds(comm)
        between = self._between(comm)
        repeated = comm.recompute if out.piece.is_layer and self.names is None else 0.0
        forward, backward = comm.forward, comm.backward + repeated
        for kind in kinds:
            size, rate = self.rate(comm.axis, kind, between)
            if not some(size > 1):
                return
            runs = where(size > 1, 1, 0)
            seconds = rate.seconds(comm.bytes)
            if kind == "permute":
                # Keys and values go round a ring of n ranks in n - 1 steps.
                seconds = (size - 1) * rate.seconds(comm.bytes)
            steps = size - 1 if kind == "permute" else runs
            out.forward_kernels = out.forward_kernels + steps * forward
            out.input_kernels = out.input_kernels + steps * backward
            stride = self.degrees.strides[comm.axis]
            more = minimum(seconds, comm.bytes * rate.seconds_per_byte) if comm.hot and kind == "all_to_all" else 0.0
            out.comms.append(
                CommTime(
                    comm.scope, kind, size, comm.bytes, forward, backward, seconds, rate.level, stride, between, more,
                    comm.to_experts,
                )
            )  # fmt: skip
            if kind == "all_to_all":
                out.forward_all_to_all_s = out.forward_all_to_all_s + forward * seconds
                out.backward_all_to_all_s = out.backward_all_to_all_s + backward * seconds
                out.hot_forward_s = out.hot_forward_s + forward * more
                out.hot_backward_s = out.hot_backward_s + backward * more
            else:
                out.forward_other_s = out.forward_other_s + forward * seconds
                out.backward_other_s = out.backward_other_s + backward * seconds

    def _kinds(self, comm: Comm) -> tuple[str, ...]:
        if comm.kind == "sum":
            return ("all_gather", "reduce_scatter") if self.job.plan.sequence_parallel else ("all_reduce",)
        if comm.kind == "tensor":
            return (
                ("all_gather", "reduce_scatter")
                if self.job.plan.sequence_parallel or comm.axis == "expert_tensor"
                else ("all_reduce",)
            )
        if comm.kind == "context_exchange":
            return ("permute",)
        return (comm.kind,)

    def _between(self, comm: Comm) -> Number:
        """Share of all-to-all bytes that leaves a node when a token is sent there once (DeepEP, HybridEP)."""
        if (
            comm.transport not in ("deepep", "hybridep")
            or self.cluster.torus is not None
            or len(self.cluster.levels) < 2
        ):
            return 1.0
        moe = self.job.model.moes[0]
        per_node = maximum(1, self.cluster.levels[0].devices // self.degrees.strides["expert"])
        nodes = maximum(1.0, self.degrees.expert / per_node)
        return distinct_domains(moe, nodes) / moe.top_k

    def _offload(self, out: PieceTime) -> None:
        """Moving saved results to the host and back beside the compute; what does not fit behind it is exposed."""
        if self.host_bytes_per_s is None:
            return
        each_way = offloaded_bytes(out.piece, self.offload) / self.host_bytes_per_s
        out.host_s = maximum(each_way - out.forward_s, 0.0) + maximum(
            each_way - out.backward_input_s - out.backward_weight_s, 0.0
        )


def _share_cores(out: PieceTime, sharing: Sharing) -> None:
    """Shorten compute by what the cores do of it while other groups of the host are in calls.

    No further than to what compute takes where the devices of one group are at work alone.
    """
    there = [(c, filled(c, sharing.devices)) for c in out.comms]
    most: Number = 0.0
    for _, share in there:
        most = maximum(most, share)
    forward = sharing.filled * sum(share * c.forward * c.seconds for c, share in there)
    backward = sharing.filled * sum(share * c.backward * c.seconds for c, share in there)
    kept_f = 1 - minimum(most, forward / maximum(out.forward_s, 1e-30))
    kept_b = 1 - minimum(most, backward / maximum(out.backward_input_s + out.backward_weight_s, 1e-30))
    out.forward_s = out.forward_s * kept_f
    out.backward_input_s = out.backward_input_s * kept_b
    out.backward_weight_s = out.backward_weight_s * kept_b
    for op in out.ops:
        op.forward_s = op.forward_s * kept_f
        op.backward_s, op.recompute_s = op.backward_s * kept_b, op.recompute_s * kept_b


def filled(c: CommTime, devices: int) -> Number:
    """The share of a call's time that the host's other devices can fill, of `devices` at work."""
    return 1 - minimum(c.size, devices) / devices


def launch_s(job: Job, chip: Chip, habits: Habits) -> float:
    """Seconds that the host needs to launch one kernel; 0 where one launch starts a whole graph or XLA program."""
    if job.software.graphs or habits.xla or chip.host_launch_us is None:
        return 0.0
    return chip.host_launch_us.value * 1e-6
