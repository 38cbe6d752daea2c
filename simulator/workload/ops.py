"""The records of work: compute ops and collectives of one microbatch on one device.

An `Op` is described by its forward pass; its backward pass follows (`backward_*`). Numbers may be arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from simulator.numbers import Number


@dataclass(slots=True)
class Op:
    """One compute op of a layer, forward, on one device for one microbatch.

    `flops` are executed (padding included), `model_flops` the textbook's, both on this device; `bytes` is traffic with
    device memory. `rows`, `columns`, `depth` are the dimensions of a product, per group. Backward FLOPs are
    `backward` x `flops`. `saved_bytes` stay for the backward pass unless `remat`, the name under which a policy knows
    the result, is recomputed. `hot` marks work that grows with the load of the busiest expert rank.
    `dead_on_recompute`: its result is not needed by the backward pass (the last product of a residual branch).
    """

    scope: str
    remat: str
    kind: str
    flops: Number = 0.0
    model_flops: Number = 0.0
    bytes: Number = 0.0
    rows: Number = 1
    columns: Number = 1
    depth: Number = 1
    groups: Number = 1
    dtype: str = ""
    backward: Number = 2.0
    backward_bytes: Number = 0.0
    saved_bytes: Number = 0.0
    hot: bool = False
    dead_on_recompute: bool = False


@dataclass(slots=True)
class Comm:
    """One collective of a layer: `bytes` as nccl-tests counts, per call and rank; calls per pass of one microbatch.

    `axis` names the group (tensor, context, expert, ...). `recompute` are the calls that a recomputed forward repeats.
    `transport` names the library that carries an all-to-all; some send a token once per node. `to_experts` says for the
    forward and the backward calls of an all-to-all whether it goes to the experts (busy ranks receive) or comes back.
    """

    scope: str
    kind: str
    axis: str
    bytes: Number
    forward: float = 1.0
    backward: float = 1.0
    recompute: float = 0.0
    hot: bool = False
    transport: str = "collective"
    to_experts: tuple[bool, bool] = (True, True)


@dataclass(slots=True)
class LayerWork:
    """All ops and collectives of one layer, and the extra buffers that it needs while it runs."""

    ops: list[Op] = field(default_factory=list)
    comms: list[Comm] = field(default_factory=list)
    boundary_bytes: Number = 0.0
    dispatch_buffer_bytes: Number = 0.0


def product(
    scope: str,
    remat: str,
    rows: Number,
    depth: Number,
    columns: Number,
    *,
    width: float,
    weight_width: float,
    dtype: str,
    gradient_traffic: float = 4.0,
    groups: Number = 1,
    model_flops: Number | None = None,
    saved: Number = 0.0,
    hot: bool = False,
    dead: bool = False,
) -> Op:
    """A product [rows, depth] x [depth, columns] with weights, `groups` of them side by side.

    FLOPs 2 rows depth columns groups; forward traffic is both operands and the result once; the backward pass makes the
    gradient of the input and of the weight, each with the same FLOPs; `gradient_traffic` is the weight gradient's, in
    bytes per weight.
    """
    flops = 2.0 * rows * depth * columns * groups
    weights = depth * columns * groups
    streams = (rows * depth + rows * columns) * groups * width
    return Op(
        scope,
        remat,
        "matmul",
        flops,
        flops if model_flops is None else model_flops,
        streams + weights * weight_width,
        rows,
        columns,
        depth,
        groups,
        dtype,
        2.0,
        2 * streams + weights * (weight_width + gradient_traffic),
        saved,
        hot,
        dead,
    )


def stream(
    scope: str, remat: str, forward_bytes: Number, backward_bytes: Number, *, saved: Number = 0.0, hot: bool = False
) -> Op:
    """An elementwise or data-moving op: no counted FLOPs, traffic only."""
    return Op(scope, remat, "memory", bytes=forward_bytes, backward_bytes=backward_bytes, saved_bytes=saved, hot=hot)


def add_casts(ops: list[Op], start: int, scope: str) -> None:
    """Append the casts to 8 bits of the products in `ops[start:]`, as one op.

    Forward, each input is read in 16 bits and written twice in 8: as it is and transposed for the weight gradient,
    which the 8-bit units of Hopper need (Transformer Engine). Backward the same for each result's gradient.
    """
    forward = backward = 0.0
    hot = False
    for op in ops[start:]:
        if op.kind == "matmul" and op.dtype in ("fp8", "fp8_block", "fp4", "int8"):
            forward = forward + 4.0 * op.rows * op.depth * op.groups
            backward = backward + 4.0 * op.rows * op.columns * op.groups
            hot = hot or op.hot
    ops.append(stream(scope, "casts", forward, backward, hot=hot))
