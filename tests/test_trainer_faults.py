"""Runs in processes of their own that are killed, starved of disk, fed nonsense, or lose one of their processes."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runs import LIMIT_S, finish, free_port, losses, start, train, wait_for_steps, write_tiny

STEPS = 40
EVERY = ("--set", "training.run.checkpoint_every=7")
TWO = ("--devices", 2, "--set", "plan.expert=2")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The parent is common to all workers of a test run.
    folder = tmp_path_factory.getbasetemp().parent / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def reference(job: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("reference") / "run"
    code, printed, error = train(job, "--steps", STEPS, *EVERY, "--out", out, "--json", cache=cache)
    assert code == 0, error
    result = json.loads(printed)
    assert result["steps"] == STEPS and result["checkpoint"] == STEPS and result["resumed_from"] is None
    return out


def checkpoints(out: Path) -> list[int]:
    return sorted(int(x.parent.name) for x in (out / "checkpoints").glob("*/manifest.json"))


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed_is_the_same_run_bit_for_bit(
    seed: int, job: Path, cache: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    running = start(job, "--steps", STEPS, *EVERY, "--out", out, cache=cache)
    wait_for_steps(running, out, random.Random(time.time_ns() + seed).randint(2, STEPS - 5))
    running.kill()
    code, _, _ = finish(running)
    assert code == -signal.SIGKILL and len(losses(out)) < STEPS
    code, _, error = train(job, "--steps", STEPS, *EVERY, "--out", out, "--resume", cache=cache)
    assert code == 0, error
    assert losses(out) == losses(reference)


def test_a_truncated_newest_checkpoint_is_named_and_the_one_before_used(
    job: Path, cache: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    assert checkpoints(out) == [28, 35, 40]
    largest = max((out / "checkpoints/00000040/arrays").rglob("*"), key=lambda x: x.stat().st_size * x.is_file())
    largest.write_bytes(largest.read_bytes()[:-100])
    code, printed, error = train(job, "--steps", STEPS, *EVERY, "--out", out, "--resume", "--json", cache=cache)
    assert code == 0, error
    warnings = [line for line in error.splitlines() if "damaged" in line]
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint of step 40 is damaged: arrays/")
    assert json.loads(printed)["resumed_from"] == 35 and json.loads(printed)["notes"] == warnings
    assert losses(out) == losses(reference) and checkpoints(out) == [28, 35, 40]


def test_a_disk_that_takes_no_more_ends_the_run_and_spares_the_last_checkpoint(
    job: Path, cache: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert train(job, "--steps", 14, *EVERY, "--out", out, cache=cache)[0] == 0
    kept = (out / "checkpoints/00000014/manifest.json").read_bytes()

    arguments = ("--steps", STEPS, *EVERY, "--out", out, "--resume")
    limited = start(job, *arguments, cache=cache)
    resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    code, _, error = finish(limited)
    said = error.splitlines()[-1]
    assert code == 4 and "Traceback" not in error
    assert (
        said == "moecast: the checkpoint of step 21 could not be written: File too large; last good checkpoint: step 14"
    )
    assert checkpoints(out) == [7, 14] and (out / "checkpoints/00000014/manifest.json").read_bytes() == kept
    assert train(job, *arguments, cache=cache)[0] == 0 and losses(out) == losses(reference)


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(job: Path, cache: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        options = ("--set", "training.run.checkpoint_every=5", "--set", "training.run.keep_checkpoints=50")
        code, _, error = train(job, "--steps", 60, *options, "--out", disk / "run", cache=cache)
        assert code == 4 and "Traceback" not in error
        said = error.splitlines()[-1]
        assert said.startswith("moecast: ") and "No space left on device" in said
        good = checkpoints(disk / "run")
        assert good and said.split("; ")[-1].startswith(f"last good checkpoint: step {good[-1]}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_loss_that_is_no_number_ends_the_run_and_no_such_state_is_written(
    job: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    wild = ("--set", "training.learning.weight_decay=1000", "--set", "training.learning.learning_rate.peak=1000")
    code, _, error = train(job, *wild, "--set", "training.run.checkpoint_every=1", "--out", out, cache=cache)
    said = error.splitlines()[-1]
    step = len(losses(out)) + 1
    assert (code == 4 and said.startswith(f"moecast: step {step}: ") and "nan" in said) or "not finite" in said
    good = checkpoints(out)
    assert good and good[-1] < step and f"last good checkpoint: step {good[-1]}" in said


def test_ctrl_c_finishes_the_step_and_saves(job: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    running = start(job, "--steps", 10**6, "--out", out, cache=cache)
    wait_for_steps(running, out, 5)
    running.send_signal(signal.SIGINT)
    code, _, error = finish(running)
    done = len(losses(out))
    assert code == 130 and checkpoints(out) == [done]
    assert error.splitlines()[-1] == f"moecast: stopped after step {done} of 1000000, saved; --resume goes on"


def start_two(job: Path, cache: Path, out: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    meeting = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2)
    return [
        start(job, *TWO, *arguments, *meeting, "--process", i, "--out", out, "--json", cache=cache) for i in range(2)
    ]


def test_two_processes_are_the_same_run_as_one(job: Path, cache: Path, reference: Path, tmp_path: Path) -> None:
    first, second = [finish(p) for p in start_two(job, cache, tmp_path / "run", "--steps", 20, *EVERY)]
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert json.loads(first[1])["processes"] == 2 and not second[1]
    assert checkpoints(tmp_path / "run") == [7, 14, 20]
    for (_, here, _), (_, there, _) in zip(losses(tmp_path / "run"), losses(reference)[:20], strict=True):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_message(
    victim: int, job: Path, cache: Path, tmp_path: Path
) -> None:
    both = start_two(job, cache, tmp_path / "run", "--steps", 10**6)
    wait_for_steps(both[0], tmp_path / "run", 5)
    begun = time.monotonic()
    # The supervisor, whose worker notices and ends itself: so dies whoever is in the middle of a step.
    both[victim].kill()
    code, _, error = finish(both[1 - victim])
    finish(both[victim])
    assert code == 4 and time.monotonic() - begun < 30 < LIMIT_S
    assert "another process" in [line for line in error.splitlines() if line.startswith("moecast: ")][-1]


def test_a_program_for_several_devices_that_was_compiled_before_does_not_hang(job: Path, tmp_path: Path) -> None:
    # Loaded from JAX's cache it did, in its first steps.
    four = ("--steps", STEPS, "--devices", 4, "--set", "plan.expert=4")
    for name in ("compiled", "again"):
        code, _, error = train(job, *four, "--out", tmp_path / name, cache=tmp_path / "cache", optimised=True)
        assert code == 0, error
    assert losses(tmp_path / "again") == losses(tmp_path / "compiled")
