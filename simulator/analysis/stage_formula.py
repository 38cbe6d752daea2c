"""One pipeline stage in closed form: what a microbatch takes and exposes, and what happens once a step.

Compute at balanced load, exposed communication, the wait for the busiest expert rank; then gradient reduction, the
optimiser's update and the gather of new weights. Numbers of one plan, or columns of plans that share their flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hw_profiles.cluster import Cluster
from simulator.costs.piece_times import CommTime, PieceTime, Timer
from simulator.costs.reductions import StateCosts
from simulator.job.job import Job
from simulator.job.rules import Degrees
from simulator.kernels.roofline import Kernels
from simulator.numbers import Number, maximum, minimum, some
from simulator.workload.habits import Habits, overlap_of
from simulator.workload.schedules import Beside, StageTimes, hidden
from simulator.workload.shards import Shards


@dataclass(slots=True)
class StageResult:
    """Seconds of a whole step on one device of one stage, by kind; all-to-all and other are exposed seconds.

    `room_...` is compute of a microbatch that still has room for communication beside it. `kernels` are what the host
    launches for a microbatch's forward, input and weight gradients; `hot_forward_s` and `hot_backward_s` are the
    imbalance of one microbatch's passes. `calls` are those that reduce dense and expert gradients.
    """

    compute_s: Number = 0.0
    all_to_all_s: Number = 0.0
    all_to_all_total_s: Number = 0.0
    all_to_all_bytes: Number = 0.0
    other_s: Number = 0.0
    imbalance_s: Number = 0.0
    hot_forward_s: Number = 0.0
    hot_backward_s: Number = 0.0
    host_s: Number = 0.0
    kernels: tuple[Number, Number, Number] = (0.0, 0.0, 0.0)
    dense_parameters: Number = 0.0
    expert_parameters: Number = 0.0
    layers: Number = 1
    summed_parameters: Number = 0.0
    calls: tuple[Number, Number] = (1.0, 1.0)
    room_forward_s: Number = 0.0
    room_backward_s: Number = 0.0
    tail_s: Number = 0.0
    executed_flops: Number = 0.0
    model_flops: Number = 0.0
    times: StageTimes | None = None
    piece_times: dict[str, StageTimes] = field(default_factory=dict)
    comms: list[tuple[CommTime, float, Number]] = field(default_factory=list)


@dataclass(slots=True)
class _Shown:
    """Seconds of one microbatch of a piece, each (forward, backward).

    Exposed communication, all and what is beside nothing; communication beside compute, exposed or not; what the
    busiest rank's all-to-alls add to what is exposed; and compute left to hide more behind.
    """

    all: tuple[Number, Number]
    apart: tuple[Number, Number]
    beside: tuple[Number, Number]
    hot: tuple[Number, Number]
    left: tuple[Number, Number]


class StageFormula:
    """Adds up one stage's pieces. Without `detail` it keeps what the step time needs, and no list of collectives."""

    def __init__(
        self, job: Job, cluster: Cluster, degrees: Degrees, habits: Habits, kernels: Kernels, timer: Timer
    ) -> None:
        self.job, self.degrees, self.habits, self.timer = job, degrees, habits, timer
        self.detail = timer.detail
        self.costs = StateCosts(job, cluster, degrees, habits, kernels, timer)
        self.dual = job.plan.schedule == "dualpipe" and degrees.pipelined
        self.slow = cluster.chip.overlap_slowdown.value - 1
        self.overlap = overlap_of(job, cluster.chip.kind)
        self.shards = Shards.of(degrees)

    def _hide(self, communication: Number, compute: Number, overlap: bool) -> Number:
        """Exposed seconds of communication beside compute, with what the compute loses while both run."""
        return hidden(communication, compute, self.slow) if overlap else communication

    def result(self, pieces: list[tuple[PieceTime, int]], mirrored: list[tuple[PieceTime, int]]) -> StageResult:
        """The stage's step; `mirrored` are the pieces of DualPipe's second copy."""
        out = self.passes(pieces, mirrored)
        out.tail_s = self.tail(out)
        return out

    def passes(self, pieces: list[tuple[PieceTime, int]], mirrored: list[tuple[PieceTime, int]]) -> StageResult:
        """All but what happens once a step."""
        out = StageResult()
        micro, overlap = self.degrees.microbatches, self.overlap
        # DualPipe's second copy of the parameters is reduced and updated too.
        both = (*pieces, *mirrored)
        dense = sum(n * t.piece.dense_parameters for t, n in both)
        expert = sum(n * t.piece.expert_parameters for t, n in both)
        layers = maximum(1, sum(n for t, n in both if t.piece.is_layer))
        summed = sum(n * t.piece.dense_parameters for t, n in both if t.piece.is_reduced)
        out.dense_parameters, out.expert_parameters, out.layers = dense, expert, layers
        out.summed_parameters = summed
        out.calls = self.costs.calls((t.piece, n) for t, n in both)
        reductions = self.costs.reductions(summed, expert, out.calls) if self.costs.every_microbatch else []
        each = sum(c.seconds for c in reductions)
        f = bi = bw = forward_wait = backward_wait = room_f = room_b = beside_f = beside_b = 0.0
        for t, n in pieces:
            f, bi, bw = f + n * t.forward_s, bi + n * t.backward_input_s, bw + n * t.backward_weight_s
            gathers = self._gather(out, t, n)
            reduced = each * (t.piece.dense_parameters + t.piece.expert_parameters) / maximum(dense + expert, 1e-30)
            shown = self._piece(out, t, n, gathers, reduced)
            room_f, room_b = room_f + n * shown.left[0], room_b + n * shown.left[1]
            beside_f, beside_b = beside_f + n * shown.beside[0], beside_b + n * shown.beside[1]
            # A backward pass of experts is two products to the forward's one.
            hot = t.hot_unit_s * (self.timer.busiest - 1)
            hot_f, hot_b = hot / 3 + shown.hot[0], hot * 2 / 3 + shown.hot[1]
            # Under DualPipe what is beside compute is exposed action by action (schedules.py), not here.
            exposed = shown.apart if self.dual else shown.all
            late = (hot / 3, hot * 2 / 3) if self.dual and overlap.all_to_all else (hot_f, hot_b)
            wait_f = exposed[0] + late[0] + t.forward_other_s
            wait_b = exposed[1] + late[1] + t.backward_other_s + t.host_s
            out.hot_forward_s, out.hot_backward_s = out.hot_forward_s + n * late[0], out.hot_backward_s + n * late[1]
            forward_wait, backward_wait = forward_wait + n * wait_f, backward_wait + n * wait_b
            one = StageTimes(t.forward_s + wait_f, t.backward_input_s + wait_b, t.backward_weight_s)
            out.piece_times[t.piece.name] = one
            out.other_s = out.other_s + n * micro * (t.forward_other_s + t.backward_other_s)
            out.imbalance_s = out.imbalance_s + n * micro * (hot_f + hot_b)
            out.host_s = out.host_s + n * micro * t.host_s
            before = out.kernels
            more = (t.forward_kernels, t.input_kernels, t.weight_kernels)
            out.kernels = (before[0] + n * more[0], before[1] + n * more[1], before[2] + n * more[2])
            out.executed_flops = out.executed_flops + n * micro * t.executed_flops
            out.model_flops = out.model_flops + n * micro * t.model_flops
        if self.costs.every_microbatch and self.detail:
            share = out.other_s / maximum(micro * each, 1e-30)
            out.comms += [(c, micro, minimum(share, 1.0)) for c in reductions]
        beside = Beside(beside_f, beside_b, (f, bi, bw), self.slow) if self.dual else None
        out.times = StageTimes(f + forward_wait, bi + backward_wait, bw, beside)
        out.compute_s = micro * (f + bi + bw)
        out.room_forward_s, out.room_backward_s = room_f, room_b
        return out

    def tail(self, out: StageResult) -> Number:
        """Seconds after the last backward pass: reductions, the update, new weights; adds them to `out`'s parts."""
        overlap, dense, expert, layers = self.overlap, out.dense_parameters, out.expert_parameters, out.layers
        update = self.costs.update_s(dense, expert)
        out.compute_s = out.compute_s + update
        once = [] if self.costs.every_microbatch else self.costs.reductions(out.summed_parameters, expert, out.calls)
        once = [*once, *self.costs.own_sums(out.calls)]
        gathers = self.costs.new_weights(dense, expert, out.calls)
        return (
            update
            + self._once(out, once, out.room_backward_s, overlap.gradients, layers)
            + self._once(out, gathers, out.room_forward_s, overlap.parameters, layers)
        )

    def _piece(self, out: StageResult, t: PieceTime, n: int, gathers: tuple[Number, Number], reduced: Number) -> _Shown:
        """What one microbatch of a piece exposes.

        All-to-alls, gathers and reductions use the same network cards: what runs beside the compute has to fit there
        together. DualPipe runs a forward and a backward together, so that either's communication hides behind both;
        ZB-H1 runs the weight gradient apart, and nothing hides behind that but the reductions at the end.
        """
        overlap, micro = self.overlap, self.degrees.microbatches
        forward = t.forward_s
        weight = t.backward_weight_s
        split = self.job.plan.schedule == "zb-h1" and self.degrees.pipelined
        backward = t.backward_input_s + (0.0 if split else weight)
        a2a = t.forward_all_to_all_s, t.backward_all_to_all_s
        beside = tuple(x if overlap.all_to_all else 0.0 for x in a2a)
        excess = self.timer.busiest - 1
        more = excess * t.hot_forward_s, excess * t.hot_backward_s
        states = (
            gathers[0] if overlap.parameters else 0.0,
            (gathers[1] if overlap.parameters else 0.0) + (reduced if overlap.gradients else 0.0),
        )
        alone = gathers[0] + gathers[1] + reduced - states[0] - states[1]
        hot = more if overlap.all_to_all else (0.0, 0.0)
        if self.dual:
            compute = forward + backward
            shown = self._hide(beside[0] + beside[1], compute, True)
            rest = self._hide(beside[0] + beside[1] + states[0] + states[1], compute, True) - shown
            first, second = (shown + rest) / 3, (shown + rest) * 2 / 3
            if overlap.all_to_all:
                whole = beside[0] + beside[1] + states[0] + states[1] + more[0] + more[1]
                late = self._hide(whole, compute, True) - shown - rest
                more = late / 3, late * 2 / 3
        else:
            shown_f, shown_b = self._hide(beside[0], forward, True), self._hide(beside[1], backward, True)
            first = self._hide(beside[0] + states[0], forward, True)
            second = self._hide(beside[1] + states[1], backward, True)
            shown, rest = shown_f + shown_b, first - shown_f + second - shown_b
            if overlap.all_to_all:
                more = (
                    self._hide(beside[0] + states[0] + more[0], forward, True) - first,
                    self._hide(beside[1] + states[1] + more[1], backward, True) - second,
                )
        serial = a2a[0] - beside[0], a2a[1] - beside[1]
        exposed = shown + serial[0] + serial[1]
        out.all_to_all_s = out.all_to_all_s + n * micro * exposed
        out.all_to_all_total_s = out.all_to_all_total_s + n * micro * (a2a[0] + a2a[1])
        out.other_s = out.other_s + n * micro * (rest + alone)
        share = exposed / maximum(a2a[0] + a2a[1], 1e-30) if self.detail else 0.0
        for c in t.comms if self.detail else ():
            calls = n * micro * (c.forward + c.backward)
            out.comms.append((c, calls, share if c.kind == "all_to_all" else 1.0))
            if c.kind == "all_to_all":
                out.all_to_all_bytes += calls * c.bytes
        alone_f = gathers[0] - states[0]
        left_f = maximum(forward - beside[0] - states[0], 0.0)
        left_b = maximum((weight if split else backward - beside[1] - states[1]), 0.0)
        apart = serial[0] + alone_f, serial[1] + alone - alone_f
        inside = beside[0] + states[0] + hot[0], beside[1] + states[1] + hot[1]
        return _Shown((first + apart[0], second + apart[1]), apart, inside, more, (left_f, left_b))

    def _gather(self, out: StageResult, t: PieceTime, n: int) -> tuple[Number, Number]:
        """Seconds of gathering a piece's sharded weights, forward and backward, one microbatch."""
        if self.job.plan.shard != "parameters" or not t.piece.is_gathered:
            return 0.0, 0.0
        name = t.piece.name.partition("[")[0]
        seconds: Number = 0.0
        passes = 2 if t.piece.is_layer else 1
        # XLA takes the gather of the output table, the same for every microbatch, out of our trainer's loop over them.
        often = 1 if self.habits.own and not t.piece.is_layer else self.degrees.microbatches
        for axis, size, parameters, parts in (
            ("replica", self.shards.dense, t.piece.dense_parameters, t.piece.dense_calls),
            ("expert_data", self.shards.expert, t.piece.expert_parameters, t.piece.expert_calls),
        ):
            if some(size > 1) and some(parameters > 0):
                bytes_ = parameters * self.habits.gather_bytes
                rate = self.timer.rate_of("all_gather", size, axis)
                one = parts * rate.seconds(bytes_ / parts)
                seconds = seconds + one * often / self.degrees.microbatches
                if not self.detail:
                    continue
                scope = f"{name}.{'experts' if axis == 'expert_data' else 'parameters'}.all_gather"
                comm = CommTime(scope, "all_gather", size, bytes_, 1.0, passes - 1.0, one, rate.level, parts=parts)
                hidden = self._hide(one * passes, t.compute_s, self.overlap.parameters)
                out.comms.append((comm, n * often * passes, hidden / maximum(one * passes, 1e-30)))
        return seconds, seconds if passes == 2 else 0.0

    def _once(self, out: StageResult, comms: list[CommTime], compute: Number, beside: bool, layers: int) -> Number:
        """Exposed seconds of what happens once a step: reductions at its end, or ZeRO 1's gather of new weights.

        The last layer's gradients are ready only when the backward pass ends, and the first layer's weights are needed
        when the forward pass begins: one layer's part of either stays exposed.
        """
        total = sum(c.seconds for c in comms)
        exposed = maximum(self._hide(total, compute, beside), total / layers)
        if self.detail:
            out.comms += [(c, 1, exposed / maximum(total, 1e-30)) for c in comms]
        out.other_s = out.other_s + exposed
        return exposed
