"""Asks the TPU compiler, with no TPU there, how long the benchmarks' products and streams would take.

XLA:TPU writes into the scheduled program, for each fusion, how many cycles it expects (`estimated_cycles` in the
`window_config` of `backend_config`): the number by which it chose the fusion's windows. Collectives and kernels written
by hand carry none. A cycle is worth what `hw_profiles/cycles.py` says. Nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from hw_profiles.cycles import clock_hz
from hw_profiles.loader import load_chip
from simulator.results.measurement import Measurement
from trainer.bench import DTYPES, KINDS, LARGE_PRODUCTS, LARGE_STREAMS, PRODUCTS, STREAMS, collective_body
from trainer.hlo_text import HloError, Module, parse_module
from trainer.measured import today
from trainer.targets import Target
from trainer.timing import Array, Say

Shape4 = tuple[int, int, int, int]
# [groups, rows, depth, columns], as in trainer/bench.py: what layers of training steps multiply, which would take a
# benchmark too long. Widths of models from 1 to 7 thousand, blocks of 2 to 64 thousand tokens, experts in one product.
LAYERS: tuple[Shape4, ...] = (
    (1, 2048, 1024, 4096), (1, 4096, 2048, 8192), (1, 8192, 8192, 8192), (1, 4096, 7168, 2048), (1, 16384, 2048, 1408),
    (1, 8192, 4096, 14336), (1, 16384, 7168, 18432), (1, 65536, 4096, 4096), (1, 16384, 16384, 16384),
    (8, 1024, 4096, 14336), (8, 8192, 4096, 14336), (16, 512, 5120, 8192), (32, 256, 2048, 1408),
    (64, 2048, 7168, 2048), (128, 128, 2048, 768),
)  # fmt: skip
# The compiler writes a number near 2^64 where it has no estimate.
MOST_CYCLES = 2**62
# Programs of so many benchmarks: few enough to show progress, and that all operands together fit the smallest memory.
IN_A_PROGRAM = 7
# Everything stays in the large memory. By default XLA brings an operand into VMEM before the kernel starts where there
# is room: which one depends on what else is in the program (tried: 4096 cubed on v6e, 0.60 or 0.88 of the peak).
OPTIONS = {"xla_msa_enable": "false"}
COLLECTIVE_BYTES = 2**20
# Instructions that take no time; and what marks VMEM in a layout.
FREE = ("parameter", "bitcast", "constant", "tuple", "get-tuple-element")
FAST = "S(1)"
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Asked:
    """One benchmark: the row it becomes but for its seconds, and what is compiled for it."""

    key: str
    row: Mapping[str, Any]
    body: Callable[..., Array]
    operands: tuple[jax.ShapeDtypeStruct, ...]


@dataclass(frozen=True)
class Answer:
    """Rows of the table, and what the compiler has no cycles for: keys of benchmarks, opcodes of collectives."""

    rows: tuple[Measurement, ...]
    without: tuple[str, ...]


def estimate(target: Target, say: Say) -> Answer:
    """Compile every benchmark for `target` and read the cycles; `say` is told what is being compiled.

    HloError where the program cannot be read. The kernels are of one device; only the collectives need the slice.
    """
    assert target.slice is not None
    chip, devices = load_chip(target.slice.chip), target.jax_devices()
    clock = clock_hz(chip)
    rows: list[Measurement] = []
    without: list[str] = []
    common: dict[str, Any] = {
        "source": f"moecast bench --target {target.name}", "date": today(), "chip": chip.name, "statistic": "estimate",
        "software": f"jax {jax.__version__}, XLA:TPU of libtpu {version('libtpu')}", "kind": "compiler-estimate",
    }  # fmt: skip
    for program in programs():
        say(program[0].key)
        found = read_estimates(parse_module(compiled(program, devices[0])))
        for one in program:
            if one.key not in found:
                without.append(one.key)
                continue
            note = f"{found[one.key]} cycles at {clock * 1e-6:.6g} MHz"
            rows.append(Measurement(id=one.key, seconds=found[one.key] / clock, note=note, **common, **one.row))
    if len(devices) > 1:
        say("collectives")
        without += silent_collectives(parse_module(_compiled_collectives(devices)))
    return Answer(tuple(rows), tuple(without))


def count(target: Target) -> int:
    """How many programs `estimate` compiles."""
    return len(list(programs())) + (target.devices > 1)


def programs() -> Iterator[tuple[Asked, ...]]:
    """The benchmarks, some to a program."""
    todo = [*_products(), *(_stream(size) for size in STREAMS + LARGE_STREAMS), _launch()]
    for first in range(0, len(todo), IN_A_PROGRAM):
        yield tuple(todo[first : first + IN_A_PROGRAM])


def _products() -> Iterator[Asked]:
    for dtype in DTYPES:
        for shape in PRODUCTS + LARGE_PRODUCTS + (LAYERS if dtype == "bf16" else ()):
            yield _product(dtype, shape)


def _product(dtype: str, shape: Shape4) -> Asked:
    g, rows, depth, columns = shape
    kind = DTYPES[dtype]
    moved = float(g * (rows * depth + depth * columns + rows * columns) * kind(0).itemsize)
    row = {
        "name": "product" if g == 1 else "grouped_product", "shape": shape, "dtype": dtype, "bytes": moved,
        "flops": 2.0 * g * rows * depth * columns,
    }  # fmt: skip
    operands = (jax.ShapeDtypeStruct((g, rows, depth), kind), jax.ShapeDtypeStruct((g, depth, columns), kind))
    key = f"product.{dtype}.{'x'.join(map(str, shape))}"
    return Asked(key, row, lambda x, w: jnp.einsum("grd,gdc->grc", x, w), operands)


def _stream(size: int) -> Asked:
    row = {"name": "stream", "shape": (size // 4,), "dtype": "fp32", "bytes": 2.0 * size}
    operands = (jax.ShapeDtypeStruct((size // 4,), jnp.float32),)
    return Asked(f"stream.{size}", row, lambda y: y * 0.5 + 0.5, operands)


def _launch() -> Asked:
    """One small instruction within a program."""
    operands = (jax.ShapeDtypeStruct((8, 8), jnp.float32),) * 2
    return Asked("launch.instruction", {"name": "launch", "dtype": "fp32"}, lambda x, w: x @ w, operands)


def compiled(program: Sequence[Asked], device: Any) -> str:
    """The scheduled program of benchmarks that share nothing, each under its own name, as text."""
    place = SingleDeviceSharding(device)
    operands = [[jax.ShapeDtypeStruct(o.shape, o.dtype, sharding=place) for o in one.operands] for one in program]

    def run(given: list[list[Array]]) -> list[Array]:
        out = []
        for one, own in zip(program, given, strict=True):
            with jax.named_scope(one.key):
                out.append(one.body(*own))
        return out

    return str(jax.jit(run).trace(operands).lower().compile(compiler_options=OPTIONS).as_text())


def _compiled_collectives(devices: Sequence[Any]) -> str:
    """One collective of each kind over all devices, as text."""
    size = len(devices)
    mesh = Mesh(devices, ("group",), axis_types=(AxisType.Auto,))
    part, elements = PartitionSpec("group"), COLLECTIVE_BYTES // 4 // size * size
    given = jax.ShapeDtypeStruct((elements * size,), jnp.float32, sharding=NamedSharding(mesh, part))

    def run(arrays: list[Array]) -> list[Array]:
        return [collective_body(kind, size)(x) for kind, x in zip(KINDS, arrays, strict=True)]

    whole = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=part, out_specs=part, check_vma=False))
    return str(whole.trace([given] * len(KINDS)).lower().compile().as_text())


def cycles_of(backend_config: str) -> int | None:
    """`estimated_cycles` of an instruction, or None where it has none or a number that stands for none."""
    try:
        found = json.loads(backend_config or "{}").get("window_config", {}).get("estimated_cycles")
        cycles = int(found) if found is not None else 0
    except (ValueError, AttributeError, TypeError):
        raise HloError(f"backend_config is not as XLA:TPU writes it: {backend_config!r:.80}") from None
    return cycles if 0 < cycles < MOST_CYCLES else None


def read_estimates(module: Module) -> dict[str, int]:
    """Cycles by name: the part of an instruction's path that follows the program's.

    All instructions of a name are added up; a name is left out if one of them has no estimate. HloError where an
    operand is in fast memory, whose time is another.
    """
    entry = module.computation(module.entry)
    found: dict[str, list[int | None]] = {}
    for one in entry.instructions.values():
        path = one.op_name.split("/")
        if len(path) < 2 or one.opcode in FREE:
            continue
        found.setdefault(path[1], []).append(cycles_of(one.attributes.get("backend_config", "")))
        if any(FAST in s.layout for s in entry.operand_shapes(one)):
            raise HloError(f"{one.name}: the compiler put an operand of {path[1]} into VMEM, though told not to")
    return {key: sum(c for c in all_ if c is not None) for key, all_ in found.items() if None not in all_}


def silent_collectives(module: Module) -> list[str]:
    """Opcodes of collectives, anywhere in the program, that carry no cycles; HloError where one does.

    Rows of collectives would then be due, and nobody has seen what such cycles count.
    """
    silent = set()
    for computation in module.computations.values():
        for one in computation.instructions.values():
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                if cycles_of(one.attributes.get("backend_config", "")) is not None:
                    raise HloError(f"{one.name}: this compiler states cycles of a collective, which are not read here")
                silent.add(one.opcode.removesuffix("-start"))
    return sorted(silent)
