"""Rows of published kernels (columns of kernels.csv) as questions to the roofline: products, streams, expert layers.

What a row's time holds, and what it is asked as:
- gemm_*: one product. TensorRT-LLM's 8-bit and 4-bit rows time a layer that casts its input first (in 16 bits, out in
  8 or 4): a stream more. DeepGEMM's fp8 has block scales. fp16 runs at the peak and with the kernels of bf16.
- hbm_*: a stream at the published rate; of 1 GiB where bytes are not stated, so that its launch weighs nothing.
- small_kernel_*_cudagraph: one kernel of a graph that moves 16 bytes an element.
- moe_layer_local_experts: what one rank of `ep` runs for `m` tokens of all ranks: a permutation, up and gate in one
  grouped product, activation, down, weighted sum. Balanced routing gives every rank the same. power_law_x is the
  source's own law: loads of experts drawn with a density falling as load^-x from 1 to 0.8 m (0.01 to 2 where there are
  fewer assignments than experts), scaled to their sum, and the busiest rank is timed; taken is the median of draws.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from hw_profiles.errors import QuestionError
from hw_profiles.loader import load_chip
from hw_profiles.schema import Chip
from simulator.calibration.questions import Answer, Question
from simulator.kernels.roofline import Kernels
from simulator.workload.ops import Op, stream

CHIPS = {
    "A100-40 SXM": "a100-40", "A100-80 SXM": "a100-80", "A100-80": "a100-80", "NVIDIA A100 SXM": "a100-80",
    "B200": "b200", "NVIDIA B200 SXM": "b200", "B300": "b300", "NVIDIA B300 SXM": "b300",
    "Blackwell proxy (unnamed; 275 GB and 1100 W => B300-class)": "b300", "GB200": "gb200",
    "NVIDIA GB200 SXM": "gb200", "GB300": "gb300", "H100 SXM": "h100-sxm", "NVIDIA H100 SXM": "h100-sxm",
    "H200": "h200", "H200 SXM": "h200", "H800": "h800", "AMD MI300X": "mi300x", "AMD MI355X": "mi355x",
    "TPU v6e (page does not name chip; >v5p peak)": "tpu-v6e", "TPU7x (per chip)": "tpu7x",
    "TPU7x (per JAX device = half chip)": "tpu7x", "V100": "v100",
}  # fmt: skip
FORMATS = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "fp4"}
# nvfp4 carries a scale of one byte for 16 values.
OPERAND_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "fp4": 0.5625}
RESULT_BYTES = 2.0
CASTING = "TensorRT-LLM"
STREAM_BYTES = float(2**30)
SMALL_KERNEL_BYTES = 16.0
# Products of fewer rows are not among those that curves are fitted on (docs/profiles.md).
FITTED_ROWS = 64
DRAWS = 64

Row = Mapping[str, str]


def kernel_question(row: Row) -> Question:
    """The question of a row; QuestionError with the reason where the roofline has no answer to it."""
    kind = row["kind"]
    if kind.startswith(("nccl_", "p2p_", "nvbandwidth_device_to_device")):
        raise QuestionError("a link between devices, not a kernel: collectives.csv has such rows")
    if kind.startswith("model_constant"):
        raise QuestionError("a constant of somebody's simulator, not a measurement")
    if kind.startswith("kernel_launch_back_to_back"):
        raise QuestionError("repeats the smallest size of the small_kernel rows")
    if kind == "small_kernel_throughput_stream":
        raise QuestionError("bare launches in a queue: profiles hold those of a framework")
    chip = CHIPS.get(row["chip"])
    if chip is None:
        raise QuestionError(f"no profile of {row['chip']}")
    if kind.startswith("gemm_"):
        return _product(row, chip)
    if kind == "moe_layer_local_experts":
        return _experts(row, chip)
    if kind.startswith("hbm_"):
        return _stream(row, chip)
    if kind.startswith("nvbandwidth_"):
        return _host_link(row, chip)
    if kind == "small_kernel_throughput_cudagraph":
        bytes_ = SMALL_KERNEL_BYTES * _number(row, "m")
        return _question(row, chip, "launch", bytes_ / (_number(row, "gbps") * 1e9), [stream("", "", bytes_, 0.0)])
    raise QuestionError(f"{kind}: not a kernel that the table says enough of")


def number_format(row: Row) -> str:
    """Our name of the row's number format, or an empty string; DeepGEMM's fp8 has block scales."""
    if row["dtype"] == "fp8" and "DeepGEMM" in row["library"]:
        return "fp8_block"
    return FORMATS.get(row["dtype"], "")


def product_op(rows: float, columns: float, depth: float, dtype: str, groups: float = 1) -> Op:
    """`groups` products side by side, each [rows, depth] x [depth, columns], results in 16 bits."""
    bytes_ = OPERAND_BYTES[dtype] * (rows * depth + depth * columns) + RESULT_BYTES * rows * columns
    flops = 2.0 * rows * columns * depth * groups
    return Op("", "", "matmul", flops, flops, bytes_ * groups, rows, columns, depth, groups, dtype)


def _number(row: Row, name: str) -> float:
    if not row[name]:
        raise QuestionError(f"{name} is not stated")
    return float(row[name])


def _question(row: Row, chip_name: str, op_class: str, seconds: float, ops: list[Op]) -> Question:
    """The time of `ops` one after another; an interval only where one product, bound by arithmetic, is all of it."""

    def ask(chip: Chip | None, engine: str) -> Answer:
        used = chip or load_chip(chip_name)
        return ops_answer(used, ops)

    return Question(row["id"], "time", "s", chip_name, "", op_class, row["kind"], seconds, ask)


def ops_answer(chip: Chip, ops: list[Op]) -> Answer:
    """Seconds of `ops` one after another; the basis is the data sheet's roofline.

    The interval is that of the efficiency curve's residuals (p10 and p90 of measured over modelled, fitted rows),
    stated for one product (and its cast) of 64 rows or more that is bound by arithmetic: what curves are fitted on.
    """
    kernels = Kernels(chip)
    seconds = sum(float(kernels.forward_s(op)) for op in ops)
    basis = 0.0
    for op in ops:
        memory = float(op.bytes) / chip.device_memory_bytes_per_s
        basis += max(memory, float(op.flops) / kernels.peak(op.dtype) if op.kind == "matmul" else 0.0)
    interval = None
    last = ops[-1]
    one = last.kind == "matmul" and len(ops) <= 2 and last.groups == 1 and last.rows >= FITTED_ROWS
    if one and kernels.bound(last) == "compute" and kernels.runs_as(last.dtype) == last.dtype:
        spread = kernels.curve(last.dtype).residuals
        if spread is not None:
            interval = (seconds * spread["p10"], seconds * spread["p90"])
    return Answer(seconds, basis or None, interval)


def _product(row: Row, chip: str) -> Question:
    dtype = number_format(row)
    if not dtype:
        raise QuestionError(f"number format {row['dtype']!r}: not known")
    m, n, k, groups = (_number(row, name) for name in ("m", "n", "k", "groups"))
    if row["time_us"]:
        seconds = _number(row, "time_us") * 1e-6
    elif row["tflops"]:
        seconds = 2 * m * n * k * groups / (_number(row, "tflops") * 1e12)
    else:
        raise QuestionError("neither time nor rate is stated")
    grouped = "grouped" in row["kind"]
    ops = [product_op(m, n, k, dtype, groups)]
    if CASTING in row["library"] and dtype != "bf16":
        ops.insert(0, stream("", "", (RESULT_BYTES + OPERAND_BYTES[dtype]) * m * k, 0.0))
    return _question(row, chip, f"{'grouped ' if grouped else ''}product {dtype}", seconds, ops)


def _stream(row: Row, chip: str) -> Question:
    rate = _number(row, "gbps") * 1e9
    if "per chip" in row["chip"]:
        rate /= load_chip(chip).devices_per_chip
    bytes_ = float(row["bytes"]) if row["bytes"] else STREAM_BYTES
    return _question(row, chip, "stream", bytes_ / rate, [stream("", "", bytes_, 0.0)])


def _host_link(row: Row, chip_name: str) -> Question:
    bytes_ = STREAM_BYTES
    if load_chip(chip_name).host_link_gb_per_s is None:
        raise QuestionError(f"{chip_name} has no host link in its profile")

    def ask(chip: Chip | None, engine: str) -> Answer:
        link = (chip or load_chip(chip_name)).host_link_gb_per_s
        if link is None:
            raise QuestionError(f"{chip_name} has no host link in its profile")
        return Answer(bytes_ / (link.value * 1e9))

    measured = bytes_ / (_number(row, "gbps") * 1e9)
    return Question(row["id"], "time", "s", chip_name, "", "host link", row["kind"], measured, ask)


def _experts(row: Row, chip: str) -> Question:
    dtype = number_format(row)
    if not dtype:
        raise QuestionError(f"number format {row['dtype']!r}: not known")
    m, width, hidden, total, k, ep, tp = (_number(row, x) for x in ("m", "n", "k", "groups", "topk", "ep", "tp"))
    width /= tp
    rows, experts = rank_load(row["routing"], int(m), int(total), int(k), int(ep))
    each = rows / experts
    moved = RESULT_BYTES * hidden
    kept = OPERAND_BYTES[dtype] if dtype != "bf16" else RESULT_BYTES
    # Permuted rows and activations are written in the format of the product that reads them.
    ops = [
        stream("", "", rows * (moved + kept * hidden), 0.0),
        product_op(each, 2 * width, hidden, dtype, experts),
        stream("", "", rows * width * (2 * RESULT_BYTES + kept), 0.0),
        product_op(each, hidden, width, dtype, experts),
        stream("", "", rows * moved * (1 + 1 / k), 0.0),
    ]
    seconds = _number(row, "time_us") * 1e-6
    return _question(row, chip, f"experts {dtype} {row['routing'].replace('_', ' ')}", seconds, ops)


@cache
def rank_load(routing: str, tokens: int, experts: int, top_k: int, ranks: int) -> tuple[float, float]:
    """Rows that the timed rank works on, and how many of its experts have any; QuestionError for an unknown law."""
    here, all_rows = experts / ranks, tokens * top_k
    if routing == "balanced":
        rows = max(1.0, all_rows / ranks)
        return rows, max(1.0, min(here, rows))
    law = re.fullmatch(r"power_law_(\d+(?:\.\d+)?)", routing)
    if law is None or float(law.group(1)) == 1 or experts % ranks:
        raise QuestionError(f"routing {routing!r}: not a law that the source states")
    import numpy as np

    rng = np.random.default_rng(0)
    x = 1 - float(law.group(1))
    low, high = (1.0, 0.8 * tokens) if all_rows > experts else (0.01, 2.0)
    if high <= low:
        raise QuestionError(f"routing {routing!r}: {tokens} tokens are too few for the source's law")
    u = rng.random((DRAWS, experts))
    loads = ((high**x - low**x) * u + low**x) ** (1 / x)
    loads *= all_rows / loads.sum(axis=1, keepdims=True)
    by_rank = np.round(loads).reshape(DRAWS, ranks, experts // ranks)
    busiest = by_rank.sum(axis=2).argmax(axis=1)
    chosen = by_rank[np.arange(DRAWS), busiest]
    return max(1.0, float(np.median(chosen.sum(axis=1)))), max(1.0, float(np.median((chosen > 0).sum(axis=1))))
