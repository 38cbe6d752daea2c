"""Time of one op on one device: the slower of arithmetic and memory traffic, plus the kernel's own overhead.

time = max(FLOPs / (peak x efficiency x tile fill), bytes / (bandwidth x efficiency)) + overhead, with the efficiency
curve over FLOPs, and the memory efficiency, from the chip's profile (Williams et al. 2009, roofline; tile fill is the
share of the padded product that is asked for).
"""

from __future__ import annotations

from bisect import bisect_right
from math import ceil as _ceil
from math import log10 as _log10
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.schema import Chip, Curve, OpClass
from simulator.job.scopes import STACKS
from simulator.numbers import Number, ceil, log10, maximum, where
from simulator.workload.ops import Op

# Where a chip has no peak for a format, the one it runs instead: TPUs multiply fp32 in one bf16 pass by default
# (jax_default_matmul_precision), chips without fp8 or int8 units run those recipes in bf16, older GPUs bf16 as fp16.
FALLBACK = {
    "fp8_block": ("fp8", "bf16", "fp16", "fp32"),
    "fp4": ("fp8", "bf16", "fp16", "fp32"),
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp32": ("bf16",),
}
PEAK_OF = {"fp8_block": "fp8"}


class CurveTable:
    """An efficiency curve made ready for scalar (bisection) and array (np.interp) lookups."""

    __slots__ = ("x", "y")

    def __init__(self, curve: Curve) -> None:
        self.x = [_log10(flops) for flops, _ in curve.points]
        self.y = [fraction for _, fraction in curve.points]

    def at(self, flops: Number) -> Number:
        """Fraction of the peak for kernels of `flops`."""
        if isinstance(flops, (int, float)):
            return self._scalar(_log10(flops) if flops > 1 else 0.0)
        import numpy as np

        return np.interp(log10(maximum(flops, 1.0)), self.x, self.y)

    def _scalar(self, x: float) -> float:
        xs, ys = self.x, self.y
        if x <= xs[0]:
            return ys[0]
        if x >= xs[-1]:
            return ys[-1]
        i = bisect_right(xs, x)
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"


def class_of(scope: str) -> str:
    """The class of an op: its scope without the stack (`decoder.moe.experts.up` and the encoder's are one)."""
    stack, _, rest = scope.partition(".")
    return rest if stack in STACKS else scope


class Kernels:
    """The time model of one device of a chip; a calibrated one knows what classes of ops really take."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        e = chip.efficiency
        self.overhead_s = chip.kernel_overhead_us.value * 1e-6
        self.bytes_per_s = chip.device_memory_bytes_per_s * e.memory.value
        self.tile = (e.tile.rows, e.tile.columns, e.tile.depth)
        self.grouped = e.grouped_slowdown.value
        self.attention = (e.attention_forward.value, e.attention_backward.value)
        self._ready: dict[str, tuple[float, CurveTable]] = {}
        self._classes = chip.op_classes
        self._caches = ([_log10(x) for x, _ in e.caches], [y for _, y in e.caches]) if e.caches else None

    def runs_as(self, dtype: str) -> str:
        """The number format in which the chip runs `dtype`."""
        names: tuple[str, ...] = (dtype, *FALLBACK.get(dtype, ()))
        for name in names:
            if name in self.chip.efficiency.matmul and PEAK_OF.get(name, name) in self.chip.peak_tflops:
                return name
        for name in names:
            if PEAK_OF.get(name, name) in self.chip.peak_tflops:
                return name
        formats = ", ".join(self.chip.peak_tflops)
        raise QuestionError(f"training.precision: {self.chip.name} cannot run {dtype}; its formats: {formats}")

    def curve(self, dtype: str) -> Curve:
        """The profile's curve for `dtype` as run; another format's where the profile has none of its own."""
        curves: dict[Any, Curve] = dict(self.chip.efficiency.matmul)
        name = self.runs_as(dtype)
        return curves.get(name) or curves.get("bf16") or next(iter(curves.values()))

    def peak(self, dtype: str) -> float:
        """Dense peak of one device for `dtype` as the chip runs it, FLOP/s."""
        name = self.runs_as(dtype)
        return self.chip.device_peak_flops_per_s(PEAK_OF.get(name, name))

    def _table(self, dtype: str) -> tuple[float, CurveTable]:
        ready = self._ready.get(dtype)
        if ready is None:
            ready = self._ready[dtype] = (self.peak(dtype), CurveTable(self.curve(dtype)))
        return ready

    def fill(self, rows: Number, columns: Number, depth: Number) -> Number:
        """Share of the matrix unit's padded product that is asked for, in (0, 1]."""
        r, c, k = self.tile
        if isinstance(rows, (int, float)) and isinstance(columns, (int, float)) and isinstance(depth, (int, float)):
            padded = _ceil(rows / r) * r * _ceil(columns / c) * c * _ceil(depth / k) * k
        else:
            padded = ceil(rows / r) * r * ceil(columns / c) * c * ceil(depth / k) * k
        return rows * columns * depth / padded

    def arithmetic_s(self, op: Op, flops: Number, backward: bool = False) -> Number:
        """Seconds of arithmetic of `flops` of `op`, done by kernels of the op's own size."""
        peak, table = self._table(op.dtype)
        if op.kind == "attention":
            return flops / (peak * self.attention[1 if backward else 0])
        efficiency = table.at(op.flops) * self.fill(op.rows, op.columns, op.depth)
        slow = where(op.groups > 1, self.grouped, 1.0)
        return flops * slow / (peak * efficiency)

    def memory_s(self, bytes_: Number) -> Number:
        """Seconds to move `bytes_` of one op, from a cache where the profile says that they fit."""
        seconds = bytes_ / self.bytes_per_s
        if self._caches is None:
            return seconds
        import numpy as np

        faster = np.interp(log10(maximum(bytes_, 1.0)), *self._caches)
        return seconds / (float(faster) if isinstance(bytes_, (int, float)) else faster)

    def forward_s(self, op: Op) -> Number:
        """Seconds of the forward pass of `op`."""
        if self._classes:
            known = self._classes.get(f"{class_of(op.scope)}:{FORWARD}")
            if known is not None:
                return self._classed(known, *self.terms(op, FORWARD))
        memory = self.memory_s(op.bytes)
        if op.kind == "memory":
            return memory + self.overhead_s
        return maximum(self.arithmetic_s(op, op.flops), memory) + self.overhead_s

    def recompute_s(self, op: Op) -> Number:
        """Seconds of the forward pass of `op` when the backward pass makes its result again."""
        known = self._classes.get(f"{class_of(op.scope)}:{RECOMPUTE}") if self._classes else None
        return self.forward_s(op) if known is None else self._classed(known, *self.terms(op, RECOMPUTE))

    def backward_s(self, op: Op) -> Number:
        """Seconds of the backward pass of `op`; a product runs one kernel per gradient."""
        if self._classes:
            known = self._classes.get(f"{class_of(op.scope)}:{BACKWARD}")
            if known is not None:
                return self._classed(known, *self.terms(op, BACKWARD))
        memory = self.memory_s(op.backward_bytes)
        if op.kind == "memory":
            return memory + self.overhead_s
        kernels = op.backward if op.kind == "matmul" else 1.0
        return maximum(self.arithmetic_s(op, op.flops * op.backward, True), memory) + kernels * self.overhead_s

    def terms(self, op: Op, phase: str) -> tuple[Number, Number, Number]:
        """What a pass of `op` is made of: seconds of launches, of arithmetic alone, of memory traffic alone."""
        back = phase == BACKWARD
        kernels = op.backward if back and op.kind == "matmul" else 1.0
        flops = op.flops * op.backward if back else op.flops
        arithmetic = 0.0 if op.kind == "memory" else self.arithmetic_s(op, flops, back)
        return kernels * self.overhead_s, arithmetic, self.memory_s(op.backward_bytes if back else op.bytes)

    @staticmethod
    def _classed(known: OpClass, launches: Number, arithmetic: Number, traffic: Number) -> Number:
        return known.launches * launches + known.arithmetic * arithmetic + known.traffic * traffic

    def stream_s(self, bytes_: Number, scope: str = "") -> Number:
        """Seconds to move `bytes_` to or from device memory; `scope` names what does it."""
        known = self._classes.get(f"{class_of(scope)}:{FORWARD}") if self._classes else None
        traffic = self.memory_s(bytes_)
        return traffic + self.overhead_s if known is None else self._classed(known, self.overhead_s, 0.0, traffic)

    def bound(self, op: Op, backward: bool = False) -> str:
        """What limits a pass: compute, memory or overhead."""
        memory = self.memory_s(op.backward_bytes if backward else op.bytes)
        flops = op.flops * op.backward if backward else op.flops
        arithmetic = 0.0 if op.kind == "memory" else self.arithmetic_s(op, flops, backward)
        longest = max(memory, arithmetic)
        if self.overhead_s > longest:
            return "overhead"
        return "compute" if arithmetic >= memory else "memory"
