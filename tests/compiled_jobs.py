"""Compiles small jobs for eight CPU devices and prints each one's comparison with its forecast, as JSON.

Run as a process of its own, since the number of devices is fixed when JAX starts: `python -m tests.compiled_jobs`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.targets import child_environment, parse_target

if TYPE_CHECKING:
    from simulator.results.forecast import Forecast
    from trainer.hlo import CompiledProgram

SMALL = Path(__file__).parents[1] / "examples" / "small"
# Every mechanism once: job, changes.
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "replicas, adafactor": ("t5-base", ()),
    "experts over ranks": ("switch-base-128", ("training.remat=full",)),
    "dense beside experts, einsum": ("st-moe-l", ("training.remat=none",)),
    "fsdp": ("mixtral-8x7b", ("plan.expert=8",)),
    "fsdp, microbatches": ("mixtral-8x7b", ("plan.microbatch_sequences=1", "plan.expert=4", "training.remat=none")),
    "zero 1, latent attention": ("deepseek-v3", ()),
    "sequence parallel": ("qwen3-235b-a22b", ("plan.pipeline=1", "plan.data=4", "plan.microbatch_sequences=null")),
    "tensor, sliced experts": (
        "mixtral-8x7b",
        (
            "plan={data: 4, tensor: 2, expert: 4, expert_tensor: 2}", "training.dispatch.layout=slots",
            "training.capacity.group_tokens=64", "model.decoder.attention.kv_heads=4",
        ),
    ),
    "lstm": ("moe-32", ()),
}  # fmt: skip


def main() -> None:
    """One JSON object: name -> comparison."""
    target = parse_target("cpu:8")
    os.environ.update(child_environment(target, os.environ))
    # The compiler's last stage does not change what is counted, and takes most of the time.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    from hw_profiles.loader import resolve_cluster
    from moecast.compiled import compare
    from moecast.programs import as_our_program
    from simulator.analysis.forecast import forecast
    from simulator.job.load import load_job
    from simulator.job.rules import resolve
    from trainer.compile import compile_step

    out = {}
    for name, (file, changes) in JOBS.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        job = load_job(SMALL / f"{file}.yaml", changes)
        program, _ = compile_step(job, resolve(job, resolve_cluster(job.cluster)), target)
        answer = forecast(as_our_program(job, "cpu"), engine="closed-form")
        out[name] = compare(answer, program).to_dict() | {"calls": [calls_forecast(answer), calls_compiled(program)]}
        sys.stderr.write(f"{name}\n")
    sys.stdout.write(json.dumps(out) + "\n")


def calls_forecast(answer: Forecast) -> dict[str, float]:
    """Calls of a step by kind of collective."""
    found: Counter[str] = Counter()
    for c in answer.collectives:
        found[c.kind] += c.count
    return dict(found)


def calls_compiled(program: CompiledProgram) -> dict[str, float]:
    """The same of the compiled program."""
    found: Counter[str] = Counter()
    for c in program.collectives:
        found[c.kind.replace("-", "_").replace("collective_permute", "permute")] += c.count
    return dict(found)


if __name__ == "__main__":
    main()
