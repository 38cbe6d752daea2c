"""Pipeline schedules in closed form: idle time, and microbatches whose activations a stage keeps.

f, b, w: seconds of forward, backward for inputs, and backward for weights of one microbatch on a stage (b and w
together are the backward pass); M microbatches, P stages, V virtual stages, c seconds of a hop between stages.

- GPipe (arXiv:1811.06965) and 1F1B (arXiv:2006.09503): (P-1)(f+b+w) idle on equal stages. With unequal stages the
  slowest paces all: (M-1) max + sum (an approximation up to 36 % high, docs/model.md). A hop that blocks adds
  2c[(P-1)M/P + P-2] under 1F1B (derived by the longest path), 2c(P-1) under GPipe.
- Interleaved (arXiv:2104.04473): the bubble divided by V, hops multiplied by V.
- ZB-H1 (arXiv:2401.10241): (P-1)(f+b-w), at the activation memory of 1F1B.
- DualPipe (arXiv:2412.19437, table 2): (P/2-1)(F&B + b_full - 3w), two copies of the parameters, P+1 activations.
  F&B is a forward and a backward run together; their all-to-alls hide each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.numbers import Number, maximum


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
    return float(min(microbatches, stages - stage))


def pipeline_time(schedule: str, times: list[StageTimes], microbatches: Number, virtual: int, hop: Number) -> Number:
    """Seconds from the first forward to the end of the last backward, gradient reduction excluded."""
    stages = len(times)
    slowest = times[0].total
    for t in times[1:]:
        slowest = maximum(slowest, t.total)
    if stages == 1:
        return microbatches * slowest
    if schedule == "zb-h1":
        f = max_of(times, "forward")
        b = max_of(times, "backward_input")
        w = max_of(times, "backward_weight")
        bubble = maximum((stages - 1) * (f + b - w), 0.0)
        return microbatches * slowest + bubble + _hops(stages, microbatches, hop)
    if schedule == "dualpipe":
        # F&B: forward and backward of two microbatches run together without gain in arithmetic.
        mean = [sum(getattr(t, n) for t in times) / stages for n in ("forward", "backward_input", "backward_weight")]
        f, full, w = mean[0], mean[1] + mean[2], mean[2]
        # Each device holds stages p and P-1-p: pairs even out unequal stages.
        pair = times[0].total + times[-1].total
        for i in range(1, stages // 2):
            pair = maximum(pair, times[i].total + times[stages - 1 - i].total)
        bubble = maximum((stages / 2 - 1) * (f + full + full - 3 * w), 0.0)
        return microbatches * pair / 2 + bubble + 2 * hop * (stages / 2)
    total = times[0].total
    for t in times[1:]:
        total = total + t.total
    fill = total - slowest
    if schedule == "interleaved":
        return microbatches * slowest + fill / virtual + virtual * _hops(stages, microbatches, hop)
    if schedule == "gpipe":
        return microbatches * slowest + fill + 2 * hop * (stages - 1)
    return microbatches * slowest + fill + _hops(stages, microbatches, hop)


def _hops(stages: int, microbatches: Number, hop: Number) -> Number:
    return 2 * hop * ((stages - 1) * microbatches / stages + stages - 2)


def max_of(times: list[StageTimes], name: str) -> Number:
    """Largest value of one field over the stages."""
    out = getattr(times[0], name)
    for t in times[1:]:
        out = maximum(out, getattr(t, name))
    return out
