"""How long an MoE layer takes beside a dense feed-forward layer of the same FLOPs, on one CPU device.

Both are layers of the trainer as its step runs them: in `shard_map`, under the remat policy, in float32, with norm and
residual sum; the MoE layer also sums its router's losses and telemetry. Top-1 with capacity factor 1 has the products
of the dense layer, top-2 those of a dense layer of twice its hidden size. The two run in turn, so that a busy machine
slows both: prints the medians of their times, of the ratio of neighbours, each with its quartiles, and of the parts of
a forward pass on their own. For slots and top-1 at d_model 512 the ratio is to be at most 1.3.

`--threads one` is XLA without its thread pool for products; since others' work does not lengthen it much, processor
time is printed too. `--threads many` is XLA as it comes.

Usage: python benchmarks/bench_moe_layer.py [--threads one|many|both] [--tokens N] [--runs N] [--all]

Letters: B sequences, S tokens of a sequence, D hidden, F ffn hidden, E experts, N tokens of a routing group.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

S, TARGET = 512, 1.3
SINGLE = "--xla_cpu_multi_thread_eigen=false"


@dataclass(frozen=True)
class Case:
    """One comparison: an MoE layer, and the dense layer that computes as much."""

    activation: str
    group: int
    top_k: int = 1
    layout: str = "slots"
    hidden: int = 512
    ffn: int = 2048
    experts: int = 8

    def __str__(self) -> str:
        sizes = f"D {self.hidden} F {self.ffn} E {self.experts} N {self.group}"
        return f"{sizes} {self.activation} top-{self.top_k} {self.layout}"

    @property
    def judged(self) -> bool:
        """Whether the target is for this case."""
        return (self.layout, self.top_k, self.hidden, self.experts) == ("slots", 1, 512, 8)


CASES = (
    *(Case(a, n) for a in ("relu", "swiglu") for n in (512, 1024, 4096)),
    Case("relu", 1024, top_k=2),
    Case("relu", 512, layout="one_hot"),
    Case("relu", 1024, layout="one_hot"),
    Case("swiglu", 512, top_k=2, hidden=128, ffn=256, experts=32),
)


class Layers:
    """The two layers of a case, compiled, with their inputs."""

    def __init__(self, case: Case, tokens: int) -> None:
        import jax
        import jax.numpy as jnp

        from hw_profiles import resolve_cluster
        from simulator.job.load import job_from_mapping
        from simulator.job.rules import resolve
        from trainer.step import Trainer

        self.case = case
        ffn = {"hidden": case.ffn * case.top_k, "activation": case.activation}
        expert = {"hidden": case.ffn, "activation": case.activation}
        moe = {"experts": case.experts, "top_k": case.top_k, "expert": expert, "dense_ffn": True}
        stack = {"layers": 1, "attention": {"heads": 8, "head_dim": 64}, "ffn": ffn, "moe": moe}
        job = job_from_mapping({
            "model": {"name": "bench", "hidden": case.hidden, "vocab": 256, "decoder": stack},
            "cluster": {"chip": "cpu-host", "devices": 1},
            "batch": {"sequences": tokens // S, "length": S},
            "training": {
                "precision": "fp32", "dispatch": {"layout": case.layout},
                "capacity": {"factor": 1.0, "basis": "assignments", "group_tokens": case.group},
            },
        })  # fmt: skip
        self.trainer = Trainer.of(job, resolve(job, resolve_cluster(job.cluster)), jax.devices()[:1])
        layer = self.trainer.init().params["decoder"]["segments"][0][0]
        self.params: dict[str, Any] = jax.tree.map(lambda w: w[0], {k: layer[k] for k in ("ffn", "moe")})
        keys = jax.random.split(jax.random.key(0))
        self.x_BSD = jax.random.normal(keys[0], (tokens // S, S, case.hidden), jnp.float32)
        self.weight_BSD = jax.random.normal(keys[1], self.x_BSD.shape, jnp.float32)

    def compiled(self, name: str, *, gradients: bool) -> Callable[[], Any]:
        """The layer `ffn` or `moe`, forward, or forward and backward to its weights and input."""
        import jax

        from trainer.layers import ffn_layer
        from trainer.losses import finish, weighted
        from trainer.moe import moe_layer
        from trainer.remat import checkpointed

        t = self.trainer
        s, stack = t.setting(), t.job.model.decoder
        how = t.job.training.learning.router
        ffn, moe = stack.ffn, stack.moe
        assert ffn is not None and moe is not None

        def layer(x: Any, p: Any) -> Any:
            if name == "ffn":
                return ffn_layer(s, x, p, ffn, None), {}, {}
            return moe_layer(s, moe, x, p, None)

        def loss(p: Any, x: Any, weight: Any) -> Any:
            y, sums, seen = checkpointed(s, layer, scanned=True)(x, p)
            router = weighted(finish(sums, how), how) if sums else 0.0
            return (y * weight).sum() + router, seen

        run = jax.grad(loss, (0, 1), has_aux=True) if gradients else lambda p, x, _: layer(x, p)
        return self._ready(run, self.params[name], self.x_BSD, self.weight_BSD)

    def _ready(self, run: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
        import jax
        from jax.sharding import PartitionSpec

        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            run, mesh=self.trainer.mesh, in_specs=(everywhere,) * len(inputs), out_specs=everywhere, check_vma=True
        )
        program = jax.jit(mapped).lower(*inputs).compile()
        inputs = jax.device_put(inputs, program.input_shardings[0])
        return lambda: jax.block_until_ready(program(*inputs))

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The parts of the forward pass of slots, each compiled alone, on what the parts before it give."""
        import jax
        import jax.numpy as jnp

        from trainer import dispatch, gate, routing
        from trainer.layers import norm
        from trainer.moe import run_experts

        s, p = self.trainer.setting(), self.params["moe"]
        moe = s.job.model.decoder.moe
        assert moe is not None
        n, e, d = self.case.group, self.case.experts, self.case.hidden
        groups, capacity = self.x_BSD.shape[0] * S // n, n * moe.top_k // e

        def logits(x: Any, kernel: Any) -> Any:
            return routing.softmax_choices(gate.logits_of(x, kernel), moe)

        def seats(choices: Any) -> Any:
            return routing.assign_slots(choices, e, capacity)

        def observed(choices: Any, assignment: Any, x: Any) -> Any:
            return gate.observe(s, gate.Routed(x[..., :e], choices, assignment), S, self.x_BSD.shape[0])

        x = norm(self.x_BSD, p["norm"], s.job.model).reshape(groups, n, d)
        choices = jax.jit(logits)(x, p["router"]["kernel"])
        assignment = jax.jit(seats)(choices)
        rows = jax.jit(dispatch.slots_dispatch)(x, assignment).reshape(e, groups * capacity, d)
        gates = jax.jit(dispatch.gates)(choices.gate_GNK, assignment).reshape(e, groups * capacity)
        back = rows.reshape(e, groups, capacity, d)
        none = jnp.zeros(groups, jnp.int32)

        def moved(x: Any, choices: Any, assignment: Any) -> Any:
            return dispatch.slots_dispatch(x, assignment), dispatch.gates(choices.gate_GNK, assignment)

        return {
            "norm": self._ready(lambda x: norm(x, p["norm"], s.job.model), self.x_BSD),
            "router": self._ready(logits, x, p["router"]["kernel"]),
            "seats": self._ready(seats, choices),
            "losses and telemetry": self._ready(observed, choices, assignment, x),
            "dispatch": self._ready(moved, x, choices, assignment),
            "experts": self._ready(lambda r, g, w: run_experts(s, moe, r, g, w, None, none), rows, gates, p["experts"]),
            "combine": self._ready(dispatch.slots_combine, back, assignment),
        }


def interleaved(programs: dict[str, Callable[[], Any]], runs: int) -> dict[str, Any]:
    """Seconds of each program, [2, runs]: wall and processor; they run in turn, so that they share the noise."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for program in programs.values():
        program()
    for _ in range(runs):
        for name, program in programs.items():
            begin = time.perf_counter(), time.process_time()
            program()
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {name: np.array(found).T for name, found in times.items()}


def spread(values: Any, form: str) -> str:
    low, median, high = (format(q, form) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return f"{median} [{low}, {high}]"


def compare(cases: Iterable[Case], tokens: int, runs: int, *, processor: bool) -> None:
    for case in cases:
        layers = Layers(case, tokens)
        print(f"  {case}", flush=True)
        for gradients in (False, True):
            found = interleaved({n: layers.compiled(n, gradients=gradients) for n in ("ffn", "moe")}, runs)
            (dense, dense_cpu), (moe, moe_cpu) = found["ffn"] * 1e3, found["moe"] * 1e3
            line = f"dense {spread(dense, '.1f')} ms, MoE {spread(moe, '.1f')} ms, ratio {spread(moe / dense, '.2f')}"
            if case.judged:
                line += " ok" if np.median(moe / dense) <= TARGET else f" ABOVE {TARGET}"
            if processor:
                line += f", of processor time {spread(moe_cpu / dense_cpu, '.2f')}"
            print(f"    {'forward + backward:' if gradients else 'forward:':<20}{line}", flush=True)
        if case.layout == "slots":
            clock = 1 if processor else 0
            parts = {n: float(np.median(t[clock])) for n, t in interleaved(layers.parts(), runs).items()}
            total = sum(parts.values())
            each = ", ".join(f"{n} {t * 1e3:.2f} ms ({t / total:.1%})" for n, t in parts.items())
            print(f"    forward parts alone, {'processor' if processor else 'wall'} time: {each}", flush=True)


def main() -> None:
    read = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    read.add_argument("--threads", choices=("one", "many", "both"), default="both")
    read.add_argument("--tokens", type=int, default=4096)
    read.add_argument("--runs", type=int, default=11)
    read.add_argument("--all", action="store_true", help="all cases, not only one of each kind")
    asked = read.parse_args()
    cases = [c for c in CASES if asked.all or c.group == 1024 or not c.judged]
    largest = max(case.group for case in cases)
    if asked.tokens < 1 or asked.tokens % largest:
        read.error(f"--tokens {asked.tokens}: must be a multiple of a routing group's {largest}")
    if asked.threads == "both":
        # XLA reads its flags once, at start.
        for threads in ("one", "many"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--threads", threads], check=True)
        return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {SINGLE}" if asked.threads == "one" else flags
    os.environ["JAX_PLATFORMS"] = "cpu"
    how = f"XLA_FLAGS={SINGLE}" if asked.threads == "one" else "XLA's thread pool"
    print(f"{how}: {asked.tokens} tokens, capacity factor 1, float32, {asked.runs} interleaved runs", flush=True)
    compare(cases, asked.tokens, asked.runs, processor=asked.threads == "one")


if __name__ == "__main__":
    main()
