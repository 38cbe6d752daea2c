"""One host's process: joins the others, then measures what the run asks for, one line of JSON at a time.

`python -m benchmarks.netlab.worker PROCESS PROCESSES HOST:PORT` within the host's namespace. A request names a file
that its table is written to; the answer is one line on standard output. Every host gets the same requests in the same
order, since collectives need all of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hw_profiles.loader import load_chip, resolve_cluster
from simulator.calibration.tables import write_table
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.results.measurement import Measurement, MeasurementTable

if TYPE_CHECKING:
    from trainer.hosts import Hosts
    from trainer.others import Others

# The longest that a request may take; the run's own bound on an answer is shorter.
LONGEST_S = 600.0
# Four hosts share two cores, and may be silent for longer than those of a cluster.
SILENT_S = 120


def main(process: int, processes: int, coordinator: str) -> None:
    """Serve requests until there are no more; exits with 4 where the work fails."""
    from moecast.train import prepare
    from trainer import processes as others

    # gloo greets on standard output, which is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    prepare(resolve_cluster({"chip": "cpu-host", "devices": processes, "nodes": processes}), 1)
    watch = others.Watch(os.getppid())
    try:
        others.join(others.parse_address(coordinator), process, processes, SILENT_S)
        from trainer.others import Others

        host = _Host(process, Others(watch))
        for line in sys.stdin:
            with watch.waiting("a measurement with the other hosts", LONGEST_S):
                answer = host.serve(json.loads(line))
            print(json.dumps(answer), file=answers, flush=True)
        others.leave()
    except Exception as error:
        # Whatever it is: JAX's own way out would wait for the other hosts.
        traceback.print_exc()
        others.give_up(f"host {process}: {type(error).__name__}: {others.short(error)}")


def _say(text: str) -> None:
    print(f"{time.monotonic():.1f} {text}", file=sys.stderr, flush=True)


class _Host:
    """The jobs and collectives that this process has compiled."""

    def __init__(self, process: int, others: Others) -> None:
        self.process, self.others = process, others
        self._ready: dict[str, Any] = {}
        self._serves: dict[str, Callable[[dict[str, Any], Job], tuple[Measurement, ...]]] = {
            "collectives": self._collectives, "steps": self._steps,
        }  # fmt: skip

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measure, write the table, and say how many rows it has; of steps the first host has the rows of all."""
        job = load_job(request["job"])
        rows = self._serves[request["do"]](request, job)
        jobs = {job.hash: job.model_dump(mode="json")}
        write_table(MeasurementTable(rows, jobs), Path(request["out"]))
        return {"rows": len(rows)}

    def _steps(self, request: dict[str, Any], job: Job) -> tuple[Measurement, ...]:
        import jax

        from trainer.measure import Asked, Ready

        # A job on other links is the same program.
        if job.name not in self._ready:
            _say(f"{job.name}: compiling")
            self._ready[job.name] = Ready(Asked(job, Path.cwd()), jax.devices(), self.others).compile()
        _say(f"{job.name}: measuring {request['case']}")
        ready = self._ready[job.name]
        rows: tuple[Measurement, ...] = ready.measured(
            ready.sample(request["steps"], request["traced"]), request["case"], job
        ).rows
        return rows

    def _collectives(self, request: dict[str, Any], job: Job) -> tuple[Measurement, ...]:
        import jax

        from trainer.hosts import hosts_of
        from trainer.measured import software, today
        from trainer.timing import timed

        devices = tuple(jax.devices())
        hosts = hosts_of(self.others, load_chip("cpu-host"), len(devices))
        common: dict[str, Any] = {
            "source": "netlab", "date": today(), "chip": "cpu-host", "software": software(), "kind": "collective",
            "dtype": "fp32", "devices": len(devices), "nodes": hosts.nodes, "job_hash": job.hash,
        }  # fmt: skip
        out = []
        for kind, size, stride, size_bytes, repeats in request["list"]:
            run, x, exact = _program(devices, hosts, self.others, kind, size, stride, size_bytes)
            seconds = [timed(run, x, np.int32(repeats)) / repeats for _ in range(request["samples"] + 1)][1:]
            low, middle, high = (float(q) for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
            out.append(
                Measurement(
                    id=f"bench#{request['case']}:{kind}.{size}x{stride}.{size_bytes}@{self.process}", name=kind,
                    seconds=middle, p10_s=low, p90_s=high, samples=len(seconds), bytes=exact, group_size=size,
                    stride=stride, level=hosts.level(size, stride), device=self.process, **common,
                )
            )  # fmt: skip
        return tuple(out)


@cache
def _program(
    devices: tuple[Any, ...], hosts: Hosts, others: Others, kind: str, size: int, stride: int, size_bytes: int
) -> tuple[Any, Any, float]:
    """A collective repeated as often as its second argument says, its input, and its exact bytes."""
    import jax.numpy as jnp

    from trainer.bench import collective_body
    from trainer.timing import Timer

    timer = Timer.of(devices, "cpu-host", 0.0, others, hosts).grouped(size, stride)
    elements = max(size, size_bytes // 4 // size * size)
    return timer.program(collective_body(kind, size)), timer.ones((elements,), jnp.float32), elements * 4.0


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
