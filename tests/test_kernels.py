"""The roofline of one op: limits, tile fill, curves, numbers and arrays alike."""

from __future__ import annotations

import numpy as np
import pytest

from hw_profiles.loader import chip_names, load_chip
from simulator.kernels.roofline import Kernels
from simulator.workload.ops import product, stream


def square(n: int, dtype: str = "bf16", groups: int = 1) -> object:
    return product("x", "ffn", n, n, n, width=2, weight_width=2, dtype=dtype, groups=groups)


def test_products_and_streams_by_hand() -> None:
    """8192 cubed in bf16 on one v5p chip, and a gigabyte through its memory."""
    chip = load_chip("tpu-v5p")
    kernels = Kernels(chip)
    flops = 2 * 8192**3
    top = chip.efficiency.matmul["bf16"].points[-1][1]
    expected = flops / (459e12 * top) + chip.kernel_overhead_us.value * 1e-6
    assert kernels.forward_s(square(8192)) == pytest.approx(expected, rel=1e-3)  # type: ignore[arg-type]
    moved = kernels.forward_s(stream("x", "norms", 1e9, 2e9))
    assert moved == pytest.approx(1e9 / (2765e9 * chip.efficiency.memory.value) + chip.kernel_overhead_us.value * 1e-6)


def test_padding_to_the_tile_costs() -> None:
    kernels = Kernels(load_chip("tpu-v3"))
    assert kernels.fill(8, 128, 128) == 1
    assert kernels.fill(8, 129, 128) == pytest.approx(129 / 256)
    assert kernels.fill(1, 128, 64) == pytest.approx(1 / 8 / 2)


@pytest.mark.parametrize("name", chip_names())
def test_no_product_beats_the_peak_and_time_grows_with_size(name: str) -> None:
    kernels = Kernels(load_chip(name))
    for dtype in ("fp32", "bf16", "fp8", "fp8_block", "fp4", "int8"):
        last = 0.0
        for n in (64, 128, 512, 1024, 4096, 16384):
            op = square(n, dtype)
            seconds = kernels.forward_s(op)  # type: ignore[arg-type]
            assert seconds >= 2 * n**3 / kernels.peak(dtype)
            assert seconds > last
            last = seconds


def test_arrays_give_the_scalars() -> None:
    kernels = Kernels(load_chip("h100-sxm"))
    sizes = np.array([100.0, 1000.0, 5000.0, 20000.0])
    many = kernels.forward_s(product("x", "ffn", sizes, 4096, sizes, width=2, weight_width=2, dtype="bf16"))
    back = kernels.backward_s(product("x", "ffn", sizes, 4096, sizes, width=2, weight_width=2, dtype="bf16"))
    for i, n in enumerate(sizes.tolist()):
        op = product("x", "ffn", n, 4096, n, width=2, weight_width=2, dtype="bf16")
        assert many[i] == pytest.approx(kernels.forward_s(op), rel=1e-12)
        assert back[i] == pytest.approx(kernels.backward_s(op), rel=1e-12)


def test_what_a_chip_lacks_it_runs_in_the_next_best_format() -> None:
    assert Kernels(load_chip("v100")).runs_as("bf16") == "fp16"
    assert Kernels(load_chip("a100-80")).runs_as("fp8") == "bf16"
    assert Kernels(load_chip("tpu-v3")).runs_as("fp32") == "bf16"
    assert Kernels(load_chip("k40")).runs_as("bf16") == "fp32"
    assert Kernels(load_chip("h100-sxm")).runs_as("fp8_block") == "fp8_block"
