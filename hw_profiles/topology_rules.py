"""Which axes of a TPU slice close into a ring, by generation."""

from __future__ import annotations

from collections.abc import Sequence

# Optical switches join the faces of 4x4x4 cubes: a slice of whole cubes is a torus on every axis, a smaller one a mesh.
CUBE_CHIPS_PER_AXIS = 4
OPTICAL = ("tpu-v4", "tpu-v5p", "tpu7x")

# Without optical switches the wrap cables are at the ends of a full pod's axis, so only a full-length axis has them.
# v5e and v6e follow MaxText's flags; v2 and v3 are our reading of 16x16 and 32x32 pods (no source states small slices).
FULL_AXIS_CHIPS = {"tpu-v2": 16, "tpu-v3": 32, "tpu-v5e": 16, "tpu-v6e": 16}


def wrap_flags(chip: str, dims: Sequence[int]) -> tuple[bool, ...]:
    """Whether each axis of a slice of `dims` chips closes into a ring; KeyError for a chip without a torus."""
    if chip in OPTICAL:
        whole_cubes = all(n % CUBE_CHIPS_PER_AXIS == 0 for n in dims)
        return (whole_cubes,) * len(dims)
    full = FULL_AXIS_CHIPS[chip]
    return tuple(n == full for n in dims)
