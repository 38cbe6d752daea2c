"""Which results wait for the backward pass, and where: what remat keeps, makes again, or sends to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.numbers import Number
from simulator.workload.ops import Op

if TYPE_CHECKING:
    from simulator.workload.stages import Piece


def is_recomputed(op: Op, names: set[str] | None) -> bool:
    """Whether the policy makes the result of `op` again; None names everything."""
    return names is None or op.remat in names


def saved_bytes(piece: Piece, names: set[str] | None, offload: set[str]) -> Number:
    """Bytes of a piece that wait on the device for its backward pass, one microbatch."""
    if not piece.is_layer:
        return sum(op.saved_bytes for op in piece.work.ops)
    kept: Number = 0.0 if "layer_input" in offload else piece.work.boundary_bytes
    for op in piece.work.ops:
        if not is_recomputed(op, names) and op.remat not in offload:
            kept = kept + op.saved_bytes
    return kept


def offloaded_bytes(piece: Piece, offload: set[str]) -> Number:
    """Bytes of a piece that wait in host memory, one microbatch."""
    out = sum(op.saved_bytes for op in piece.work.ops if op.remat in offload)
    return out + (piece.work.boundary_bytes if "layer_input" in offload and piece.is_layer else 0.0)
