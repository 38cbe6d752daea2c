"""A tiny job, and `moecast train` on it in processes of their own."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from simulator.job.job import Job
from simulator.job.load import job_from_mapping

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "preset": "mixtral-8x7b",
        "vocab": 384,
        "hidden": 32,
        "decoder": {
            "layers": 2,
            "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8},
            "moe": {"experts": 4, "top_k": 2, "expert": {"hidden": 32}},
        },
    },
    "cluster": {"chip": "cpu-host", "devices": 1},
    "batch": {"sequences": 8, "length": 32},
    "training": {
        "precision": "fp32",
        "capacity": {"factor": 1.25, "eval_factor": 2.0, "basis": "assignments", "group_tokens": 64},
        "learning": {"learning_rate": {"peak": 0.01, "warmup_steps": 10}},
    },
}
LIMIT_S = 240
# The least optimised programs compile four times as fast; also where a test trains in its own process, unless that has
# begun to use JAX before.
UNOPTIMISED = "--xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", UNOPTIMISED)


def tiny(*changes: str) -> Job:
    """The tiny job on the default corpus, with `changes` like those of --set."""
    return job_from_mapping(TINY, overrides=changes)


def write_tiny(folder: Path) -> Path:
    """The tiny job on one file of text, in `folder`."""
    (folder / "text.txt").write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    learning = TINY["training"]["learning"] | {"data": {"files": ["text.txt"]}}
    job = TINY | {"training": TINY["training"] | {"learning": learning}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def start(job: Path, *arguments: object, cache: Path, optimised: bool = False) -> subprocess.Popen[str]:
    """`moecast train JOB ARGUMENTS` in a process; compiled programs are kept in `cache`."""
    environment = os.environ | {
        "XLA_FLAGS": "" if optimised else UNOPTIMISED,
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-m", "moecast", "train", str(job), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) once it has ended."""
    try:
        out, error = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return process.returncode, out, error


def train(job: Path, *arguments: object, cache: Path, optimised: bool = False) -> tuple[int, str, str]:
    """`moecast train JOB ARGUMENTS` to its end."""
    return finish(start(job, *arguments, cache=cache, optimised=optimised))


def losses(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of metrics, every bit of them."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(r["step"], r["nats"], r["gradient_norm"]) for r in map(json.loads, lines)]


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    """Return as soon as `out` has the metrics of `steps` steps."""
    until = time.monotonic() + LIMIT_S
    file = out / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        assert process.poll() is None and time.monotonic() < until, "the run ended before it could be killed"
        time.sleep(0.001)


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
