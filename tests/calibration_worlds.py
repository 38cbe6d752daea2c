"""Worlds in which the truth is known: measurement tables as a machine with stated numbers would have made them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hw_profiles.loader import load_chip, resolve_cluster
from hw_profiles.schema import Chip
from simulator.calibration.terms import Terms, fillable_s, terms_of
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.network.collectives import Network
from simulator.results.measurement import NETWORK, Measurement, MeasurementTable

TWO = {"chip": "cpu-host", "devices": 2}
FIT = ((64, 128, 4), (64, 256, 8), (128, 256, 4), (96, 192, 8), (160, 320, 4), (128, 512, 8))
HELD = ((80, 320, 8), (144, 288, 4), (112, 224, 8))
COMMON = {"source": "a world", "date": "2026-11-22", "chip": "cpu-host", "software": "none"}


def small_job(hidden: int, ffn: int, experts: int, devices: int = 2, degree: int = 2) -> Job:
    """A tiny mixture on CPU devices, `degree` of which share out the experts."""
    heads = {"heads": hidden // 16, "kv_heads": 1, "head_dim": 16}
    moe = {"experts": experts, "top_k": 2, "expert": {"hidden": ffn}}
    return load_job(
        {
            "name": f"h{hidden}-f{ffn}-e{experts}-d{devices}" + (f"-p{degree}" if degree != 2 else ""),
            "model": {"preset": "mixtral-8x7b", "vocab": 384, "hidden": hidden,
                      "decoder": {"layers": 2, "attention": heads, "moe": moe}},
            "cluster": {"chip": "cpu-host", "devices": devices},
            "plan": {"expert": degree},
            "batch": {"sequences": 16, "length": 128},
            "training": {"precision": "fp32", "capacity": {"factor": 1.25, "basis": "assignments"}},
            "software": {"stack": "moecast"},
        }
    )  # fmt: skip


@dataclass(frozen=True)
class World:
    """A machine: a chip, what each class of ops takes of its terms (launches, arithmetic, traffic), and noise."""

    chip: Chip
    multiples: Mapping[str, tuple[float, float, float]]
    noise: float = 0.0
    seed: int = 0

    def seconds(self, name: str, phase: str, terms: Terms) -> float:
        """What a class takes here."""
        a, b, c = self.multiples.get(name, self.multiples["other"])
        more = 1.5 if phase == "backward" else 1.0
        return more * (a * terms.launches_s + b * terms.arithmetic_s + c * terms.traffic_s)

    def step(self, job: Job) -> tuple[float, float, dict[tuple[str, str], float], list[tuple[Any, ...]]]:
        """Step seconds, those sent, compute by class and pass, and (kind, size, stride, bytes, seconds) of calls."""
        rng = np.random.default_rng([self.seed, zlib.crc32(job.name.encode())])
        compute = {k: self.seconds(*k, t) for k, t in terms_of(job, self.chip).items()}
        compute = {k: s * float(np.exp(self.noise * rng.standard_normal())) for k, s in compute.items() if s > 0}
        shared = resolve_cluster(job.cluster, chip=self.chip).chip.sharing
        whole, saved = sum(compute.values()), sum(s.filled for s in shared) * fillable_s(job, self.chip)
        compute = {k: s * (1 - saved / whole) for k, s in compute.items()}
        from simulator.analysis.forecast import forecast

        answer = forecast(job, chip=self.chip.model_copy(update={"op_classes": {}}), engine="closed-form")
        network = Network(resolve_cluster(job.cluster, chip=self.chip))
        calls, sent = [], 0.0
        for c in answer.collectives:
            rate = network.rate(c.kind, c.group_size, 1)
            # Arrays of merged all-reduces start one by one: as many as there are starts in the time.
            starts = round((c.time_s - c.bytes * float(rate.seconds_per_byte)) / float(rate.latency_s))
            calls.append((c.kind, c.group_size, 1, c.bytes / starts, c.time_s / starts))
            sent += c.time_s
        return sum(compute.values()) + sent, sent, compute, calls

    def table(self, jobs: Sequence[Job], name: str = "world.parquet") -> MeasurementTable:
        """What `moecast measure` would have written."""
        rows: list[Measurement] = []
        for job in jobs:
            step, sent, compute, calls = self.step(job)
            base = Measurement(
                f"{job.name}:step",
                **COMMON,
                kind="step",
                name="step",
                seconds=step,
                devices=job.cluster["devices"],  # type: ignore[index]
                job_hash=job.hash,
            )
            rows.append(base)
            for (scope, phase), s in compute.items():
                stack = "" if scope.startswith(("logits", "embedding", "layers", "optimizer")) else "decoder."
                rows.append(replace(base, id=f"{job.name}:{scope}.{phase}", kind="op", name=stack + scope,
                                    phase=phase, seconds=s, device=0))  # fmt: skip
            if sent:
                rows.append(replace(base, id=f"{job.name}:sent", kind="op", name="decoder.moe.combine_all_to_all",
                                    phase="forward", seconds=sent, device=0, level=NETWORK))  # fmt: skip
            for i, (kind, size, stride, each, s) in enumerate(calls):
                rows.append(replace(base, id=f"{job.name}:c{i}", kind="collective", name=kind, seconds=s, bytes=each,
                                    group_size=size, stride=stride))  # fmt: skip
        return MeasurementTable(tuple(rows), {j.hash: j.model_dump(mode="json") for j in jobs}, {}, name)


def plain_world(**changes: Any) -> World:
    """The shipped CPU, whose ops take a few times what the roofline says, each class its own."""
    multiples = {
        "attention.core": (2.0, 1.4, 0.5), "moe.experts.up": (1.0, 1.1, 0.2), "moe.experts.down": (1.0, 1.2, 0.1),
        "moe.dispatch": (3.0, 0.0, 2.0), "optimizer.update": (8.0, 0.0, 3.0), "other": (2.0, 1.3, 1.0),
    }  # fmt: skip
    return World(load_chip("cpu-host"), multiples, **changes)
