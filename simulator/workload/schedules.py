"""Pipeline schedules in closed form: step time, and microbatches whose activations a stage keeps.

f, b, w: seconds of forward, backward for inputs, and backward for weights of one microbatch on a stage (b and w
together are the backward pass, t all three); M microbatches, P stages, V virtual stages, c seconds of a hop.

The orders behind the formulas are in `simulator.engine.orders`; tests/test_orders.py compares both. Hop costs were
found as the longest path through those orders and are exact there for equal stages.

- GPipe (arXiv:1811.06965): sum f + (M-1) max f, and the same for the backward passes: exact. Hops 2c(P-1).
- 1F1B (arXiv:2006.09503): the longest of two paths through each stage p: busy from its first forward on
  (sum of t before p, plus M t_p), or waiting for the first microbatch's round trip (sum of all t, then the M - P + p
  microbatches it has not begun, and the P - p - 1 backwards that remain). A lower bound; exact on equal stages, at most
  4 % low when stages differ by up to 40 %. Hops 2c[(P-1)M/P + P-2].
- Interleaved (arXiv:2104.04473): M max + (sum - max)/V, within 9 % when chunks differ by 20 %. Hops 2c(PV-1).
- ZB-H1 (arXiv:2401.10241): (P-1)(f+b-w) idle. Hops 4c(P-1).
- DualPipe (arXiv:2412.19437, table 2): (P/2-1)(F&B + b + w - 3w) idle, F&B a forward and a backward run together; with
  unequal stages see `_dualpipe` (5 % low to 7 % high at 30 % spread). Two copies of the parameters.
  Hops c[(P-1)M/P + max(1, 3P/2-3)].
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.numbers import Number, maximum, minimum


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one microbatch on one stage (all its virtual stages): forward, input gradient, weight gradient."""

    forward: Number
    backward_input: Number
    backward_weight: Number

    @property
    def total(self) -> Number:
        """Seconds of a microbatch, forward and backward."""
        return self.forward + self.backward_input + self.backward_weight


def in_flight(schedule: str, stage: int, stages: int, microbatches: int, virtual: int) -> float:
    """Microbatches (of the whole stage) whose activations stage `stage` keeps at its fullest.

    Interleaved counts chunks: (P - p - 1) 2 + (V - 1) P + 1 of M V chunks, each 1/V of the stage
    (Megatron-LM's warm-up).
    """
    if stages == 1:
        return 1.0
    if schedule == "gpipe":
        return float(microbatches)
    if schedule == "interleaved":
        return min(microbatches * virtual, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1) / virtual
    if schedule == "dualpipe":
        return float(min(microbatches, stages + 1))
    if schedule == "zb-h1":
        # Weight gradients run late: a stage keeps what 1F1B's first stage does.
        return float(min(microbatches, stages))
    return float(min(microbatches, stages - stage))


def pipeline_time(schedule: str, times: list[StageTimes], microbatches: Number, virtual: int, hop: Number) -> Number:
    """Seconds from the first forward to the end of the last backward, gradient reduction excluded."""
    stages = len(times)
    if stages == 1:
        return microbatches * times[0].total
    forwards, backwards = [t.forward for t in times], [t.backward_input + t.backward_weight for t in times]
    totals = [t.total for t in times]
    if schedule == "gpipe":
        flow = (
            sum(forwards) + (microbatches - 1) * _max(forwards) + sum(backwards) + (microbatches - 1) * _max(backwards)
        )
        return flow + 2 * hop * (stages - 1)
    if schedule == "1f1b":
        return _one_forward_one_backward(totals, backwards, microbatches) + 2 * hop * (
            (stages - 1) * microbatches / stages + stages - 2
        )
    if schedule == "interleaved":
        slowest = _max(totals)
        return microbatches * slowest + (sum(totals) - slowest) / virtual + 2 * hop * (stages * virtual - 1)
    if schedule == "zb-h1":
        weights, inputs = [t.backward_weight for t in times], [t.backward_input for t in times]
        bubble = maximum((stages - 1) * (_max(forwards) + _max(inputs) - _max(weights)), 0.0)
        return microbatches * _max(totals) + bubble + 4 * hop * (stages - 1)
    return _dualpipe(times, totals, microbatches) + hop * (
        (stages - 1) * microbatches / stages + max(1.0, 1.5 * stages - 3)
    )


def _dualpipe(times: list[StageTimes], totals: list[Number], microbatches: Number) -> Number:
    """Devices n and P-1-n hold the same pair of stages and must idle n times (F&B + b - 2w): the slowest such path.

    Or the mean pair with the innermost device's idle time: where pairs differ little, waiting evens them out.
    """
    stages = len(times)
    f = sum(t.forward for t in times) / stages
    full = sum(t.backward_input + t.backward_weight for t in times) / stages
    w = sum(t.backward_weight for t in times) / stages
    idle = maximum(f + 2 * full - 3 * w, 0.0)
    longest = microbatches * sum(totals) / stages + (stages / 2 - 1) * idle
    for n in range(stages // 2):
        pair = totals[n] + totals[stages - 1 - n]
        longest = maximum(longest, microbatches * pair / 2 + n * idle)
    return longest


def _one_forward_one_backward(totals: list[Number], backwards: list[Number], microbatches: Number) -> Number:
    stages, everything = len(totals), sum(totals)
    longest: Number = 0.0
    before: Number = 0.0
    for p, total in enumerate(totals):
        begun = minimum(microbatches, stages - p)
        round_trip = everything + (microbatches - begun) * total + (begun - 1) * backwards[p]
        longest = maximum(longest, maximum(before + microbatches * total, round_trip))
        before = before + total
    return longest


def _max(values: list[Number]) -> Number:
    out = values[0]
    for value in values[1:]:
        out = maximum(out, value)
    return out
