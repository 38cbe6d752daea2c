"""Forecast beside compiler, for every mechanism of the trainer once, on eight CPU devices; and the command.

FLOPs are those of the compiler to a thousandth, bytes of every kind of collective within 5 %, arguments within 5 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from moecast.compiled import Comparison, Row, compare
from simulator.job.load import load_job
from simulator.job.rules import resolve
from tests.compiled_jobs import JOBS, SMALL
from trainer.refuse import check_runnable
from trainer.targets import parse_target

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_jobs"],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", JOBS)
def test_the_forecast_is_what_the_compiler_makes(name: str, compiled: dict[str, Any]) -> None:
    rows = {r["what"]: r for r in compiled[name]["rows"]}
    flops = rows["executed FLOPs"]
    assert abs(flops["error"]) < 0.001
    assert all(r["holds"] for r in rows.values()), compiled[name]
    scored = [r for r in rows.values() if r["what"].endswith("bytes") and r["error"] is not None]
    assert scored and all(abs(r["error"]) < 0.05 for r in scored)


@pytest.mark.parametrize("name", JOBS)
def test_the_forecast_counts_the_calls(name: str, compiled: dict[str, Any]) -> None:
    """XLA:CPU merges nothing but all-reduces; those of sums that no forecast has are left out."""
    ours, theirs = compiled[name]["calls"]
    kinds = {"all_gather", "reduce_scatter", "all_to_all"} & (set(ours) | set(theirs))
    assert {k: ours.get(k) for k in kinds} == {k: theirs.get(k) for k in kinds}


def test_an_op_that_differs_is_named() -> None:
    row = Row("executed FLOPs", 110.0, 100.0, "FLOPs", 0.01)
    assert row.error == pytest.approx(0.1) and not row.holds
    assert Row("all-reduce bytes", 0.0, 4.0, "bytes", None).holds
    assert Comparison((row,), ("x",)).to_dict()["rows"][0]["holds"] is False
    assert callable(compare)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("mixtral-8x7b", "plan={data: 4, context: 2}", "plan.context = 2"),
        ("mixtral-8x7b", "plan={data: 4, pipeline: 2, microbatch_sequences: 1}", "plan.schedule = 1f1b"),
        ("mixtral-8x7b", "training.precision=fp8-tensorwise", "training.precision = fp8-tensorwise"),
        ("mixtral-8x7b", "cluster={chip: tpu-v5e, slice: 2x4}", "cluster = not of a CPU"),
        ("mixtral-8x7b", "training.dispatch.transport=deepep", "training.dispatch.transport = deepep"),
        ("mixtral-8x7b", "training.capacity.group_tokens=96", "training.capacity.group_tokens = 96"),
        ("mixtral-8x7b", "model.sampled_softmax=64", "model.sampled_softmax = 64"),
        ("deepseek-v3", "model.mtp_layers=1", "model.mtp_layers = 1"),
        ("moe-32", "model.hidden=96", "has to be the hidden size 96"),
        ("mixtral-8x7b", "training.dtypes.master=fp32", "training.dtypes.master = fp32"),
        ("mixtral-8x7b", "training.remat={offload: [qkv]}", "training.remat.offload = qkv"),
    ],
)
def test_what_the_trainer_cannot_run_is_refused_by_name(file: str, change: str, said: str) -> None:
    job = load_job(SMALL / f"{file}.yaml", ["plan.expert=4", change] if file == "mixtral-8x7b" else [change])
    if "cluster" in change:
        dropless = ["plan.expert=4", "training.capacity=dropless", "training.dispatch={}"]
        job = load_job(SMALL / f"{file}.yaml", [*dropless, change])
    with pytest.raises(QuestionError) as found:
        check_runnable(job, resolve(job, resolve_cluster(job.cluster)), "cpu")
    assert said in str(found.value) and "\n" not in str(found.value)


def test_the_command_names_a_bad_target_in_one_line() -> None:
    job = str(SMALL / "mixtral-8x7b.yaml")
    for target, said in (
        ("cpu:4", "cpu-host-4 has 4 devices"),
        ("tpu:v9:2x2", "unknown TPU generation"),
        ("gpu:8", "unknown platform"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "moecast", "compile", job, "--target", target],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_example_in_the_help_is_there() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "moecast", "compile", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    said = " ".join(shown.split()).partition("Example: moecast compile ")[2].split()
    assert (ROOT / said[0]).is_file() and parse_target(said[2]).devices == 8 and "--json" in shown
