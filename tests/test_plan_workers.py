"""A search over processes and machines: one table whoever works on it, whoever is killed, wherever it is saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.errors import QuestionError, WorkFailed
from simulator.job.load import load_job
from simulator.planner.kept import NUMBERS
from simulator.planner.space import SpaceFile, space_of
from simulator.planner.spread.folder import folder_at
from simulator.planner.spread.question import Question
from simulator.planner.table import FIELDS
from tests import plan_runs as runs
from tests.planner_draws import load

Call = Callable[..., tuple[int, str, str]]
PARTS = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a job and a space."""
    runs.write_question(tmp_path)
    return tmp_path


@pytest.fixture
def call(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The search of these tests, with more options."""
    monkeypatch.chdir(folder)
    return lambda *arguments: call(*runs.command(*arguments)[3:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of an uninterrupted search by one process."""
    folder = tmp_path_factory.mktemp("whole")
    runs.write_question(folder)
    done = runs.run(folder, "-o", "found")
    assert done.returncode == 0, done.stderr
    assert len(runs.saved(folder / "found")) == PARTS
    return runs.contents(folder / "found")


def _midway(results: Path) -> dict[str, int]:
    """The parts that are saved, once some are, and not yet all."""
    runs.wait_for(lambda: len(runs.saved(results)) >= 2, "two parts")
    found = runs.saved(results)
    assert len(found) < PARTS
    return found


def _question(**more: Any) -> Question:
    job = load_job(runs.JOB)
    space = space_of(job, load("mixtral-zipf")[1], SpaceFile.model_validate(runs.SPACE))
    return Question(job=job, space=dict(space.values), plans_per_part=runs.PLANS_PER_PART, **more)


def test_a_killed_worker_changes_nothing(folder: Path, whole: dict[str, bytes]) -> None:
    with runs.started(folder, "-o", "found", "--workers", "2") as driver:
        _midway(folder / "found")
        before = runs.children(driver.pid)
        runs.kill(before[0])
        _, error = driver.communicate(timeout=runs.LONGEST_S)
        assert driver.returncode == 0, error
    assert len(before) == 2 and not any(map(runs.alive, before))
    assert runs.contents(folder / "found") == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_driver_repeats_nothing_that_was_saved(folder: Path, whole: dict[str, bytes], workers: int) -> None:
    arguments = ("-o", "found", "--workers", str(workers))
    with runs.started(folder, *arguments) as driver:
        _midway(folder / "found")
        orphans = runs.children(driver.pid)
        runs.kill(driver.pid)
        driver.wait()
    assert len(orphans) == (workers if workers > 1 else 0)
    runs.wait_for(lambda: not any(map(runs.alive, orphans)), "workers to see that their driver is gone")
    kept = runs.saved(folder / "found")
    assert 0 < len(kept) < PARTS and not json.loads((folder / "found" / "search.json").read_text())["complete"]
    done = runs.run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert runs.contents(folder / "found") == whole
    assert {n: t for n, t in runs.saved(folder / "found").items() if n in kept} == kept


def test_dask_workers_and_drivers_may_be_killed_too(folder: Path, whole: dict[str, bytes]) -> None:
    pytest.importorskip("distributed")
    with runs.dask_scheduler(folder) as (address, _), runs.dask_workers(folder, address, 2) as nannies:
        arguments = ("-o", "found", "--scheduler", address)
        with runs.started(folder, *arguments) as driver:
            _midway(folder / "found")
            runs.kill(driver.pid)
            driver.wait()
        kept = runs.saved(folder / "found")
        assert 0 < len(kept) < PARTS
        with runs.started(folder, *arguments) as driver:
            runs.wait_for(lambda: len(runs.saved(folder / "found")) > len(kept), "one part more")
            assert len(runs.saved(folder / "found")) < PARTS
            (worker,) = runs.children(nannies[0])
            runs.kill(worker)
            _, error = driver.communicate(timeout=runs.LONGEST_S)
            assert driver.returncode == 0, error
        assert runs.contents(folder / "found") == whole
        assert {n: t for n, t in runs.saved(folder / "found").items() if n in kept} == kept


def test_a_scheduler_without_workers_or_with_others_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    other = tmp_path / "other"
    for name in ("hw_profiles", "simulator"):
        shutil.copytree(runs.ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = other / "simulator" / "numbers.py"
    changed.write_text(changed.read_text() + "\n# Another version.\n")
    impatient = (
        "import sys\nfrom simulator.planner.spread.on_dask import on_dask\n"
        "next(on_dask(sys.argv[1], connect_s=1, workers_s=1)('', [0]))"
    )

    def said(address: str) -> str:
        command = [sys.executable, "-c", impatient, address]
        done = subprocess.run(
            command,
            cwd=folder,
            env=runs.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=runs.LONGEST_S,
        )
        return done.stderr.splitlines()[-1]

    with runs.dask_scheduler(folder) as (address, _):
        assert f"{address}: for 1 s there was no worker; start some with: dask worker {address}" in said(address)
        with runs.dask_workers(folder, address, 1, root=other):
            done = runs.run(folder, "-o", "found", "--scheduler", address)
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    assert "has another moecast than this one: its files" in done.stderr and "0 of 16 parts are saved" in done.stderr
    assert "no scheduler answered in 1 s; start one with: dask scheduler" in said(address)


def test_a_scheduler_that_goes_is_named(folder: Path) -> None:
    pytest.importorskip("distributed")
    script = (
        "import sys\nfrom simulator.planner.spread.on_dask import on_dask\n"
        "answers = on_dask(sys.argv[1], connect_s=2, workers_s=30)(sys.stdin.read(), range(16))\n"
        "print(next(answers)[0], flush=True)\nlist(answers)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with runs.dask_scheduler(folder) as (address, pid), runs.dask_workers(folder, address, 1):
        command = [sys.executable, "-c", script, address]
        with subprocess.Popen(command, cwd=folder, env=runs.environment(), text=True, **pipes) as driver:
            assert driver.stdin is not None and driver.stdout is not None
            driver.stdin.write(_question().text())
            driver.stdin.close()
            assert int(driver.stdout.readline()) in range(PARTS)
            runs.kill(pid)
            driver.stdin = None
            _, error = driver.communicate(timeout=runs.LONGEST_S)
    assert error.splitlines()[-1].endswith(f"--scheduler {address}: it has gone, and has not come back")


def test_another_question_version_or_folder_is_refused(call: Call, folder: Path) -> None:
    assert call("-o", "found")[0] == 0
    before = runs.contents(folder / "found")
    for arguments, differs in (
        (("--top", "3"), "top 20, here 3"),
        (("--objective", "memory"), "objective step_time, here memory"),
        (("--constraint", "plan.tensor<=1"), 'constraints [], here ["plan.tensor<=1"]'),
        (("--set", "batch.sequences=128"), "job "),
        (("--keep", "all"), "keep best, here all"),
    ):
        status, _, error = call("-o", "found", *arguments)
        assert status == 2 and "holds the results of another question" in error and differs in error
    (folder / "space.yaml").write_text("plan: {tensor: 1}")
    assert "space {" in call("-o", "found")[2]
    runs.write_question(folder)
    assert runs.contents(folder / "found") == before
    record = json.loads(before["search.json"])
    record["asked"]["files"] = "0" * 16
    (folder / "found" / "search.json").write_text(json.dumps(record))
    assert "files 0000000000000000, here" in call("-o", "found")[2]
    (folder / "found" / "search.json").write_text('{"version": "1"}')
    status, _, error = call("-o", "found")
    assert status == 2 and "results of version '1'; this moecast writes and reads '2'" in error
    (folder / "found" / "search.json").write_text("[")
    assert call("-o", "found")[::2] == (2, "moecast: found/search.json: not JSON\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "mine.txt").write_text("mine")
    status, _, error = call("-o", "mine")
    assert status == 2 and "holds something else" in error and os.listdir(folder / "mine") == ["mine.txt"]
    assert "is a file" in call("-o", "job.yaml")[2]


def test_parts_that_were_cut_short_are_done_again(call: Call, folder: Path, whole: dict[str, bytes]) -> None:
    assert call("-o", "found")[0] == 0
    plans = folder / "found" / "plans"
    half = (plans / "part-000003.parquet").read_bytes()
    (plans / "part-000003.parquet").write_bytes(half[: len(half) // 2])
    shutil.copy(plans / "part-000005.parquet", plans / "part-000006.parquet")
    (plans / "part-000007.parquet").unlink()
    status, _, error = call("-o", "found")
    assert status == 0 and "part-000003.parquet was not whole" in error and "part-000006.parquet was not" in error
    assert runs.contents(folder / "found") == whole


def test_an_address_of_fsspec_holds_the_same_files(call: Call, folder: Path, whole: dict[str, bytes]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    assert call("-o", "memory://bucket/found")[0] == 0
    memory.rm_file("/bucket/found/plans/part-000004.parquet")
    others = {n: memory.modified(n) for n in memory.find("/bucket/found/plans")}
    assert call("-o", "memory://bucket/found", "--workers", "2")[0] == 0
    assert {n: memory.modified(n) for n in others} == others
    found = {n.removeprefix("/bucket/found/"): memory.cat_file(n) for n in memory.find("/bucket/found")}
    memory.store.clear()
    assert found == whole
    assert call("-o", f"file://{folder}/as file")[0] == 0
    assert runs.contents(folder / "as file") == whole
    assert call("-o", f"local://{folder}/aside")[0] == 0
    assert runs.contents(folder / "aside") == whole and not list((folder / "aside").rglob(".*"))


def test_an_address_that_cannot_be_reached_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuestionError, match=r"memry://x: Protocol not known: memry; did you mean 'memory'\?"):
        folder_at("memry://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(QuestionError, match=r"s3://b/x: its file system needs a package that is not here: .*s3fs"):
        folder_at("s3://b/x")
    with pytest.raises(QuestionError, match="names a machine"):
        folder_at("file://host/x")
    from fsspec.implementations.memory import MemoryFileSystem

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError("access\ndenied")

    monkeypatch.setattr(MemoryFileSystem, "ls", denied)
    with pytest.raises(WorkFailed, match="memory://x: PermissionError: access denied"):
        folder_at("memory://x").names()


def test_all_feasible_plans_are_a_dataset(call: Call, folder: Path) -> None:
    from pyarrow import parquet

    status, text, _ = call("-o", "found", "--keep", "all", "--workers", "2")
    answer = json.loads(text)
    table = parquet.read_table(folder / "found" / "plans")
    assert status == 0 and set(table.column_names) == {*FIELDS, *NUMBERS}
    assert table.num_rows == answer["feasible"] == json.loads((folder / "found/search.json").read_text())["rows"]
    assert min(table["step_time_s"].to_pylist()) == answer["best"][0]["step_time_s"]
    best = parquet.read_table(folder / "found" / "best.parquet").to_pydict()
    ranked = [s for s, r in zip(best["step_time_s"], best["rank"], strict=True) if r]
    assert ranked == sorted(table["step_time_s"].to_pylist())[:20] == [p["step_time_s"] for p in answer["best"]]
    front = sorted(s for s, f in zip(best["step_time_s"], best["on_front"], strict=True) if f)
    assert front == [p["step_time_s"] for p in answer["pareto"]]


def test_two_kinds_of_workers_are_refused(call: Call) -> None:
    status, _, error = call("--workers", "2", "--scheduler", "tcp://127.0.0.1:1")
    assert status == 2 and "--workers, --scheduler: one of them" in error
