"""When a stage can end at the earliest because its host launches one kernel after the other."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.job.rules import Degrees
from simulator.numbers import Number, maximum
from simulator.workload.orders import BACKWARD, FORWARD, INPUT, ORDERS, WEIGHT, Action
from simulator.workload.schedules import StageTimes

PARTS = {FORWARD: (0,), BACKWARD: (1, 2), INPUT: (1,), WEIGHT: (2,)}
# Seconds and kernels of a microbatch's forward, input gradient and weight gradient.
Stage = tuple[StageTimes | None, tuple[float, float, float]]


def launch_bound(schedule: str, p: int, degrees: Degrees, copies: Sequence[Stage], each_s: float) -> Number:
    """Seconds until stage `p` has run its order when a launch takes `each_s`; 0 where launches are never waited for.

    `copies` are the stage's, and for DualPipe its mirrored twin's. Host and device are a flow shop of two machines with
    one order: the longest path launches up to some kernel and runs all from there on (Johnson 1954). Kernels of a pass
    are taken as equally long, so that the path turns at the first or the last of one.
    """
    seconds = []
    for times, _ in copies:
        assert times is not None
        seconds.append((times.forward, times.backward_input, times.backward_weight))
    launches = [tuple(each_s * k for k in kernels) for _, kernels in copies]
    pairs = [(sum(d[i] for i in own), sum(h[i] for i in own)) for d, h in zip(seconds, launches, strict=True)
             for own in ((0,), (1, 2), (1,), (2,))]  # fmt: skip
    if not each_s or all(float(host) <= float(device) for device, host in pairs):
        return 0.0
    virtual = len(degrees.chunks[0])
    chosen = schedule if degrees.pipeline > 1 else "1f1b"
    order = ORDERS[chosen](p, degrees.pipeline, degrees.microbatches, virtual)
    whole = [_of(action, seconds, launches, 1 / virtual) for action in order]
    left: Number = sum(device for device, _ in whole)
    launched: Number = 0.0
    out: Number = 0.0
    fill = (degrees.pipeline - 1 - p) * (seconds[0][0] + seconds[0][1] + seconds[0][2])
    for action, (device, host) in zip(order, whole, strict=True):
        # Under GPipe what a stage forwards goes on to the last stage and back before its own backwards.
        more = fill if chosen == "gpipe" and action.kind == FORWARD else 0.0
        out = maximum(out, launched + each_s + left + more)
        launched, left = launched + host, left - device
        out = maximum(out, launched + device * each_s / maximum(host, each_s) + left + more)
    return out


def _of(
    action: Action, seconds: Sequence[Sequence[Number]], launches: Sequence[Sequence[float]], share: float
) -> tuple[Number, Number]:
    """Seconds of an action on the device and on the host; chunks of a stage are taken as equal."""
    device: Number = 0.0
    host: Number = 0.0
    for a in (action,) if action.pair is None else (action, action.pair):
        copy = a.chunk if len(seconds) > 1 else 0
        part = share if len(seconds) == 1 else 1.0
        device = device + part * sum(seconds[copy][i] for i in PARTS[a.kind])
        host = host + part * sum(launches[copy][i] for i in PARTS[a.kind])
    return device, host
