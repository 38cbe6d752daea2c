"""FLOPs of one product of a compiled program: dots, convolutions, and custom calls that multiply.

A multiply and an add are two operations. Elementwise work is not counted (JOB's definition of executed FLOPs), nor is
a product that XLA turned into a multiplication and a sum, as it does for matrix times vector.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trainer.hlo_text import Computation, HloError, Instruction, Shape

_DOTS = {"dot", "scaled-dot"}
# XLA:CPU's library products, in builds with oneDNN: lhs, rhs -> out.
_PRODUCT_CALLS = ("__onednn$matmul",)
_LABELS = re.compile(r"(\w+)_(\w+)->(\w+)")


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis of a convolution's window."""

    size: int
    stride: int = 1
    pad_low: int = 0
    dilation_lhs: int = 1
    dilation_rhs: int = 1

    def valid_pairs(self, length: int, out: int) -> int:
        """Pairs of output place and window place that meet a true value, not padding nor a dilation's hole."""
        if (self.size, self.stride, self.pad_low, self.dilation_lhs) == (1, 1, 0, 1):
            return min(length, out)
        last = (length - 1) * self.dilation_lhs
        places = (o * self.stride - self.pad_low + k * self.dilation_rhs for o in range(out) for k in range(self.size))
        return sum(1 for at in places if 0 <= at <= last and at % self.dilation_lhs == 0)


def product_flops(inside: Computation, instruction: Instruction) -> int:
    """FLOPs of one run of one instruction, 0 if it is no product; HloError if its attributes do not fit its shapes."""
    try:
        return _product_flops(inside, instruction)
    except (IndexError, KeyError, ValueError, ZeroDivisionError):
        raise _misfit(instruction) from None


def _product_flops(inside: Computation, instruction: Instruction) -> int:
    if instruction.opcode in _DOTS:
        lhs = inside.operand_shapes(instruction)[0]
        contracted = math.prod(lhs.dims[k] for k in instruction.integers("lhs_contracting_dims"))
        return 2 * instruction.shapes[0].elements * contracted
    if instruction.opcode == "convolution":
        return _convolution(inside, instruction)
    if is_ragged_dot(instruction):
        return _ragged(inside, instruction)
    if instruction.opcode == "custom-call" and target_of(instruction).startswith(_PRODUCT_CALLS):
        return _matmul_call(inside, instruction)
    return 0


def target_of(instruction: Instruction) -> str:
    """What a custom call calls."""
    return instruction.attributes.get("custom_call_target", "").strip('"')


def is_ragged_dot(instruction: Instruction) -> bool:
    """Whether this is a grouped product, XLA's own or the kernel that XLA:TPU puts in its place."""
    is_kernel = instruction.opcode == "custom-call" and "ragged_dot_tiling" in instruction.attribute_text
    return instruction.opcode == "ragged-dot" or is_kernel


def _misfit(instruction: Instruction) -> HloError:
    return HloError(f"{instruction.opcode} {instruction.name!r:.80}: its attributes do not fit its shapes")


def _convolution(inside: Computation, instruction: Instruction) -> int:
    """XLA's HloCostAnalysis: input features of a group x output features x batch x valid places of the window.

    Exact about padding, since XLA:TPU writes batched dots as windows over holes (`lhs_dilate`, `pad`, `size=2`).
    """
    lhs, rhs = inside.operand_shapes(instruction)[:2]
    out = instruction.shapes[0]
    labels = _LABELS.match(instruction.attributes.get("dim_labels", ""))
    if labels is None or [len(text) for text in labels.groups()] != [len(s.dims) for s in (lhs, rhs, out)]:
        raise _misfit(instruction)
    left, right, result = (dict(zip(text, s.dims, strict=True)) for text, s in zip(labels.groups(), (lhs, rhs, out),
                                                                                   strict=True))  # fmt: skip
    spatial = sorted(letter for letter in left if letter.isdigit())
    axes = _axes(instruction.attributes.get("window", ""), len(spatial))
    if [axis.size for axis in axes] != [right.get(letter) for letter in spatial]:
        raise _misfit(instruction)
    valid = math.prod(axis.valid_pairs(left[k], result[k]) for axis, k in zip(axes, spatial, strict=True))
    feature_groups, batch_groups = (
        int(instruction.attributes.get(key, "1")) for key in ("feature_group_count", "batch_group_count")
    )
    return int(2 * (left["f"] // feature_groups) * right["o"] * (left["b"] // batch_groups) * valid)


def _axes(window: str, count: int) -> list[_Axis]:
    """`{size=3x3 pad=1_1x1_1 stride=2x2}` axis by axis."""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", window))

    def numbers(key: str, default: int) -> list[int]:
        values = fields.get(key, "")
        return [int(v.partition("_")[0]) for v in values.split("x")] if values else [default] * count

    columns = [numbers("size", 1), numbers("stride", 1), numbers("pad", 0), numbers("lhs_dilate", 1),
               numbers("rhs_dilate", 1)]  # fmt: skip
    return [_Axis(*row) for row in zip(*columns, strict=True)]


def _ragged(inside: Computation, instruction: Instruction) -> int:
    """Rows in all x both widths, whichever of the three arrays is the stack of G: 2 sqrt(|a| |b| |out| / G).

    The static row count: work follows the real group sizes, which no compiler knows.
    """
    reals = [s for s in inside.operand_shapes(instruction) if len(s.dims) >= 2]
    arrays = [*reals[:2], instruction.shapes[0]]
    stack = max(arrays, key=lambda s: len(s.dims))
    if len(arrays) != 3 or len(stack.dims) != 3:
        raise _misfit(instruction)
    return 2 * math.isqrt(math.prod(s.elements for s in arrays) // stack.dims[0])


def _matmul_call(inside: Computation, instruction: Instruction) -> int:
    """[.., m, k] x [.., k, n] -> [.., m, n], either transposed: 2 |out| k, with k^2 = |a| |b| / |out| / batch."""
    lhs, rhs = inside.operand_shapes(instruction)[:2]
    out = instruction.shapes[0]
    batch = math.prod(out.dims[:-2]) if len(rhs.dims) > 2 else 1
    width = math.isqrt(lhs.elements * rhs.elements // (out.elements * batch))
    if width**2 * out.elements * batch != lhs.elements * rhs.elements:
        raise _misfit(instruction)
    return 2 * out.elements * width


def widest(shapes: tuple[Shape, ...]) -> Shape:
    """The array with the most bytes; the first of equals."""
    return max(shapes, key=lambda s: s.bytes)
