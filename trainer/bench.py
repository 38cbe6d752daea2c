"""Measures this machine's devices apart from any job: products, streams, launches, collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simulator.results.measurement import Measurement
from trainer.hosts import Hosts
from trainer.timing import Array, Body, Say, Timer

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
# [groups, rows, depth, columns]: dense products from one token block to a large layer, products per expert, and thin
# ones as routers and attention heads make them.
PRODUCTS = (
    (1, 64, 64, 64), (1, 256, 64, 256), (1, 256, 256, 256), (1, 512, 128, 512), (1, 512, 512, 512),
    (1, 1024, 512, 1024), (1, 1024, 1024, 1024), (4, 128, 64, 256), (8, 64, 128, 256), (8, 256, 128, 512),
    (16, 128, 64, 128), (32, 64, 64, 64), (32, 128, 16, 128), (64, 128, 128, 16), (1, 1024, 128, 8), (1, 2048, 64, 16),
)  # fmt: skip
LARGE_PRODUCTS = (
    (1, 2048, 2048, 2048), (1, 4096, 4096, 4096), (1, 8192, 4096, 8192), (8, 2048, 2048, 4096), (64, 512, 2048, 1024),
)  # fmt: skip
STREAMS = tuple(2**n for n in range(14, 25, 2))
LARGE_STREAMS = (2**26, 2**28)
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute")
MESSAGES = (2**10, 2**14, 2**18, 2**22)
LARGE_MESSAGES = (2**25, 2**28)
# Between hosts only groups of one device each tell about the links alone: their sizes have to be enough for a fit.
MORE_BETWEEN = (2**12, 2**16, 2**20)
SMALL_IN_A_ROW, LAUNCHES = 16, 50


def bench(timer: Timer, dtypes: Sequence[str], *, large: bool, say: Say, collectives: bool = True) -> list[Measurement]:
    """All benchmarks; `large` adds the sizes that fill an accelerator. `say` is told what runs.

    Of several processes each runs all of it, and the rows of process 0 are those of all.
    """
    out = []
    for name in dtypes:
        for shape in PRODUCTS + (LARGE_PRODUCTS if large else ()):
            say(f"product {name} {'x'.join(map(str, shape))}")
            out.append(_product(timer, name, shape))
    for size in STREAMS + (LARGE_STREAMS if large else ()):
        say(f"stream of {size:,} bytes")
        out.append(_stream(timer, size))
    say("launches")
    out += _launches(timer)
    for size, stride in groups(timer.hosts) if collectives else ():
        for kind in KINDS:
            for bytes_ in messages(timer.hosts, size, stride, large=large):
                say(f"{kind} of {bytes_:,} bytes over {size}, {stride} apart")
                out.append(_collective(timer.grouped(size, stride), kind, size, stride, bytes_))
    return out


def count(hosts: Hosts, dtypes: Sequence[str], *, large: bool, collectives: bool = True) -> int:
    """How many benchmarks `bench` runs."""
    products = len(PRODUCTS) + (len(LARGE_PRODUCTS) if large else 0)
    streams = len(STREAMS) + (len(LARGE_STREAMS) if large else 0)
    sizes = sum(len(messages(hosts, *group, large=large)) for group in groups(hosts)) if collectives else 0
    return len(dtypes) * products + streams + 1 + len(KINDS) * sizes


def messages(hosts: Hosts, size: int, stride: int, *, large: bool) -> tuple[int, ...]:
    """Bytes of the messages to measure in groups of `size` that are `stride` apart."""
    more = MORE_BETWEEN if hosts.nodes > 1 and size <= hosts.nodes and stride % hosts.local == 0 else ()
    return tuple(sorted(MESSAGES + more)) + (LARGE_MESSAGES if large else ())


def groups(hosts: Hosts) -> list[tuple[int, int]]:
    """(size, stride) of the groups to measure: all devices, then halves of them as neighbours and as far apart.

    Of several nodes also each alone, and one device of each together.
    """
    out, size = [], hosts.devices
    while size > 1:
        out.append((size, 1))
        if size < hosts.devices:
            out.append((size, hosts.devices // size))
        size = size // 2 if size % 2 == 0 else 1
    if hosts.nodes > 1:
        out += [g for g in ((hosts.local, 1), (hosts.nodes, hosts.local)) if g[0] > 1 and g not in out]
    return out


def _product(timer: Timer, dtype: str, shape: tuple[int, int, int, int]) -> Measurement:
    g, rows, depth, columns = shape
    kind = DTYPES[dtype]

    def there_and_back(x: Array) -> Array:
        """Two products of the same FLOPs; means of means, so that ones stay ones and no number is denormal."""
        y = jnp.einsum("grd,gdc->grc", x, jnp.full((g, depth, columns), 1 / depth, kind))
        return jnp.einsum("grc,gcd->grd", y, jnp.full((g, columns, depth), 1 / columns, kind))

    seconds = [s / 2 for s in timer.seconds(there_and_back, timer.ones((g, rows, depth), kind))]
    moved = float(g * (rows * depth + depth * columns + rows * columns) * kind(0).itemsize)
    name = "product" if g == 1 else "grouped_product"
    key = f"product.{dtype}.{'x'.join(map(str, shape))}"
    flops = 2.0 * g * rows * depth * columns
    return timer.row("kernel", name, seconds, key, shape=shape, dtype=dtype, flops=flops, bytes=moved)


def _stream(timer: Timer, size: int) -> Measurement:
    """Read and written once: XLA makes one pass of a multiplication and an addition."""
    seconds = timer.seconds(lambda y: y * 0.5 + 0.5, timer.ones((size // 4,), jnp.float32))
    more = {"shape": (size // 4,), "dtype": "fp32", "bytes": 2.0 * size}
    return timer.row("kernel", "stream", seconds, f"stream.{size}", **more)


def _launches(timer: Timer) -> list[Measurement]:
    """Of a whole program, from Python's call to its end; and of one small instruction within a program."""
    x = timer.ones((16,), jnp.float32)
    program = timer.program(lambda y: y + 1.0)
    jax.block_until_ready(program(x, 1))
    whole = timer.each(program, x, 1, times=LAUNCHES)
    tiny = timer.ones((8, 8), jnp.float32)
    small = [s / SMALL_IN_A_ROW for s in timer.seconds(_small_ones, tiny)]
    return [
        timer.row("kernel", "program_launch", whole, "launch.program", dtype="fp32"),
        timer.row("kernel", "launch", small, "launch.instruction", dtype="fp32"),
    ]


def _small_ones(y: Array) -> Array:
    """Products too small to take time themselves, which XLA does not fuse with each other."""
    mean = jnp.full((8, 8), 1 / 8, y.dtype)
    for _ in range(SMALL_IN_A_ROW):
        y = y @ mean
    return y


def _collective(timer: Timer, kind: str, size: int, stride: int, bytes_: int) -> Measurement:
    """Bytes are nccl-tests' size (docs/job.md)."""
    elements = max(size, bytes_ // 4 // size * size)
    seconds = timer.seconds(collective_body(kind, size), timer.ones((elements,), jnp.float32))
    key = f"{kind}.{size}x{stride}.{bytes_}"
    level = timer.hosts.level(size, stride)
    more = {"dtype": "fp32", "bytes": elements * 4.0, "group_size": size, "stride": stride, "level": level}
    return timer.row("collective", kind, seconds, key, **more)


def collective_body(kind: str, size: int) -> Body:
    """From an array of S bytes to one of S bytes, by a collective whose nccl-tests size is S; ones stay ones."""

    def gather(x: Array) -> Array:
        return lax.all_gather(lax.dynamic_slice_in_dim(x, 0, x.shape[0] // size), "group", tiled=True)

    def scatter(x: Array) -> Array:
        part = lax.psum_scatter(x, "group", tiled=True) * (1 / size)
        return lax.dynamic_update_slice_in_dim(x, part, 0, 0)

    bodies: dict[str, Callable[[Array], Any]] = {
        "all_gather": gather,
        "reduce_scatter": scatter,
        "all_reduce": lambda x: lax.psum(x, "group") * (1 / size),
        "all_to_all": lambda x: lax.all_to_all(x, "group", 0, 0, tiled=True),
        "permute": lambda x: lax.ppermute(x, "group", [(i, (i + 1) % size) for i in range(size)]),
    }
    return bodies[kind]
