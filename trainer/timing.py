"""Times what all devices do at once: a jitted program that repeats one thing until its launch is drowned.

Every benchmark runs on all devices at the same time, as a training step does: what shares cores or memory shows. All
processes begin each timing together, and it lasts until the slowest has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simulator.results.measurement import Measurement
from trainer.hosts import Hosts
from trainer.measured import software, today
from trainer.others import Others
from trainer.processes import agree

Array = Any
Say = Callable[[str], None]
Body = Callable[[Array], Array]
FEW, MOST_REPEATS = 4, 20_000


@dataclass(frozen=True)
class Timer:
    """A mesh of all devices, the chip they are of, the seconds of all samples of one timing; processes and hosts."""

    mesh: Any
    chip: str
    budget_s: float
    others: Others
    hosts: Hosts
    samples: int = 7

    @classmethod
    def of(cls, devices: Sequence[Any], chip: str, budget_s: float, others: Others, hosts: Hosts) -> Timer:
        """All devices in one group."""
        return cls(_mesh(devices, len(devices), 1), chip, budget_s, others, hosts)

    def grouped(self, size: int, stride: int) -> Timer:
        """The same devices, in groups of `size` that are `stride` apart (the mesh's axis `group`)."""
        return replace(self, mesh=_mesh(self.mesh.devices.ravel(), size, stride))

    @property
    def count(self) -> int:
        """How many devices there are."""
        return int(self.mesh.size)

    def ones(self, shape: Sequence[int], dtype: Any) -> Array:
        """Ones, a part of `shape` on every device, joined along the first dimension."""
        whole = (shape[0] * self.count, *shape[1:])
        part = np.ones(tuple(shape), dtype)
        return jax.make_array_from_callback(whole, NamedSharding(self.mesh, self._spec), lambda _: part)

    def seconds(self, body: Body, x: Array) -> list[float]:
        """Seconds of one `body` (from a device's part of `x` to the like) in each sample.

        The data passes from one repeat to the next, so that XLA can leave none out.
        """
        program = self.program(body)
        with self.others.working("a benchmark, compiled and run once"):
            jax.block_until_ready(program(x, FEW))
        each = min(self.each(program, x, FEW, times=3)) / FEW
        # Processes that repeat a collective unequally often would wait for each other for ever.
        repeats = agree(int(np.clip(self.budget_s / self.samples / max(each, 1e-7), FEW, MOST_REPEATS)))
        return [s / repeats for s in self.each(program, x, repeats, times=self.samples)]

    def each(self, program: Any, x: Array, repeats: int, *, times: int) -> list[float]:
        """Seconds of each of `times` calls of `program`, begun by all processes together, of the slowest."""
        out = []
        for _ in range(times):
            self.others.barrier("a benchmark to begin")
            with self.others.working("a benchmark"):
                out.append(timed(program, x, repeats))
        return self.others.slowest(out, "seconds of a benchmark")

    def program(self, body: Body) -> Any:
        """`body` on every device, as often as the second argument says: one program for any number of repeats."""

        def run(x: Array, repeats: Array) -> Array:
            return lax.fori_loop(0, repeats, lambda _, y: body(y), x)

        specs = (self._spec, PartitionSpec())
        return jax.jit(jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=self._spec, check_vma=False))

    def row(self, kind: str, name: str, seconds: Sequence[float], key: str, **more: Any) -> Measurement:
        """A row of the table."""
        low, middle, high = (float(q) for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
        return Measurement(
            id=f"bench:{self.count}:{key}", source="moecast bench", date=today(), chip=self.chip,
            software=software(), kind=kind, name=name, seconds=middle, p10_s=low, p90_s=high,
            samples=len(seconds), devices=self.count, note=self.hosts.note(kind),
            nodes=self.hosts.nodes if kind == "collective" else self.hosts.machines, **more,
        )  # fmt: skip

    @property
    def _spec(self) -> PartitionSpec:
        return PartitionSpec(self.mesh.axis_names)


def _mesh(devices: Sequence[Any], size: int, stride: int) -> Any:
    parts = np.array(devices).reshape(-1, size, stride)
    return Mesh(parts, ("outer", "group", "inner"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def timed(run: Any, *arguments: Any) -> float:
    """Seconds of one call, waited for."""
    begun = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - begun
