"""The table of TPU slices: shape, size and closed axes by name or by shape."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hw_profiles.errors import QuestionError, nearest

_TABLE = Path(__file__).parent / "tpu_slices.csv"
_SHAPE = re.compile(r"\d{1,4}(x\d{1,4}){0,3}")


@dataclass(frozen=True, slots=True)
class Slice:
    """One shape that can be had: chips per axis, and which axes close into a ring."""

    name: str
    chip: str
    dims: tuple[int, ...]
    wrap: tuple[bool, ...]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.dims)

    @property
    def shape(self) -> str:
        """`4x4x8`."""
        return "x".join(map(str, self.dims))


@cache
def all_slices() -> tuple[Slice, ...]:
    """Every slice of the shipped table, small ones first within a chip."""
    lines = [line for line in _TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    out = []
    for line in lines[1:]:
        name, chip, dims, _, _, wrap = line.split(",")
        out.append(Slice(name, chip, tuple(int(n) for n in dims.split("x")), tuple(digit == "1" for digit in wrap)))
    return tuple(out)


def canonical_slice_name(text: str) -> str:
    """`v5p-128` for `TPU-v5p-128`, `v5e-16` for `v5litepod-16`, `tpu7x-64` for `v7x-64`; other text in lower case."""
    name = text.lower().removeprefix("tpu-")
    for other, ours in (("v5litepod-", "v5e-"), ("v7x-", "tpu7x-"), ("7x-", "tpu7x-")):
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


def slice_by_name(text: str) -> Slice | None:
    """The slice called `text`, with or without `tpu-` in front, or None."""
    name = canonical_slice_name(text)
    return next((s for s in all_slices() if s.name == name), None)


def find_slice(chip: str, text: str) -> Slice:
    """The slice of `chip` that `text` (4x4x8 in any order, or v5p-256) names; QuestionError with the nearest ones."""
    known = [s for s in all_slices() if s.chip == chip]
    if not known:
        raise QuestionError(f"cluster.slice = {text!r:.60}: no slices of {chip} are known")
    shape = text.lower().replace("*", "x").strip()
    if not _SHAPE.fullmatch(shape):
        named = slice_by_name(text)
        if named is None:
            hint = nearest(canonical_slice_name(text), [s.name for s in known])
            raise QuestionError(f"cluster.slice = {text!r:.60}: write chips per axis, such as {known[-1].shape}{hint}")
        if named.chip != chip:
            raise QuestionError(f"cluster.slice = {text!r:.60}: a slice of {named.chip}, not of {chip}")
        return named
    dims = [int(n) for n in shape.split("x")]
    wanted = sorted(dims)
    for candidate in known:
        if sorted(candidate.dims) == wanted:
            return candidate
    raise QuestionError(
        f"cluster.slice = {text!r:.60}: {chip} has no such slice; nearest: {_nearest(known, math.prod(dims))}"
    )


def missing_slice(text: str) -> str:
    """A hint for a name that looks like a slice (`v5p-100`) but is none, or an empty string."""
    generation, _, count = canonical_slice_name(text).rpartition("-")
    known = [s for s in all_slices() if s.name.rpartition("-")[0] == generation]
    if not known or not count.isdecimal():
        return ""
    unit = int(known[0].name.rpartition("-")[2]) / known[0].chips
    return f"no such slice; nearest: {_nearest(known, int(count[:9]) / unit)}"


def _nearest(known: list[Slice], chips: float) -> str:
    close = sorted(known, key=lambda s: (abs(math.log(s.chips / max(chips, 0.5))), s.chips))[:3]
    return ", ".join(f"{s.shape} ({s.name})" for s in sorted(close, key=lambda s: s.chips))
