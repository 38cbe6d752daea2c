"""A search over processes and machines: one table whoever works on it, whoever is killed, wherever it is saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError, WorkFailed
from moecast import cli
from simulator.job.load import load_job
from simulator.planner.kept import NUMBERS, Kept, Winners
from simulator.planner.search import Search
from simulator.planner.space import SpaceFile, space_of
from simulator.planner.spread.folder import folder_at
from simulator.planner.spread.local import local
from simulator.planner.spread.on_dask import on_dask
from simulator.planner.spread.parquet import decode
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
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in this process: exit code, standard output and error."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecast", *runs.command(*arguments)[3:]])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return run


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


@given(plans=st.integers(1, 20_000), objective=st.sampled_from(["step_time", "memory"]), top=st.integers(1, 40))
@settings(max_examples=6)
def test_the_size_of_a_part_does_not_change_the_table(plans: int, objective: str, top: int) -> None:
    job, cluster = load("lstm")
    space = space_of(job, cluster)
    found = [
        Search(job, cluster, space, objective=objective, top=top, plans_per_part=n).run() for n in (plans, 1 << 22)
    ]
    for one, other in zip(*([o.best, o.front] for o in found), strict=True):
        assert one.codes.tobytes() == other.codes.tobytes() and one.numbers.tobytes() == other.numbers.tobytes()
    assert found[0].searched == found[1].searched and found[0].broken == found[1].broken


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=30), st.randoms())
def test_what_is_kept_depends_on_no_order_and_is_what_all_pairs_say(pairs: list[tuple[int, int]], rng: Any) -> None:
    """Few distinct numbers, so that many plans tie; the front by its definition, over all pairs."""
    numbers = np.ones((len(pairs), len(NUMBERS)))
    numbers[:, :2] = pairs
    codes = np.zeros((len(pairs), len(FIELDS)), dtype=np.int64)
    codes[:, -1] = range(len(pairs))
    order = list(range(len(pairs)))
    rng.shuffle(order)
    winners = Winners("step_time_s", 3)
    for low in range(0, len(order), 7):
        winners.offer_kept(Kept(codes, numbers).taken(order[low : low + 7]))
    ranked = sorted(range(len(pairs)), key=lambda i: (*pairs[i], i))
    assert winners.best.codes[:, -1].tolist() == ranked[:3]

    def beaten(i: int) -> bool:
        (step, memory), others = pairs[i], range(len(pairs))
        return any(
            pairs[j][0] <= step and pairs[j][1] <= memory and (pairs[j] != pairs[i] or j < i) for j in others if j != i
        )

    assert sorted(winners.front.codes[:, -1].tolist()) == [i for i in range(len(pairs)) if not beaten(i)]


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
            command, cwd=folder, env=runs.environment(), capture_output=True, text=True, check=False, timeout=60
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


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "tcp://host", "tcp://host:0", "http://host:1", "tcp://a b:1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(QuestionError, match="write it as tcp://HOST:PORT"):
        on_dask(address)


def test_without_dask_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(QuestionError, match=r"pip install 'moecast\[dask\]'"):
        on_dask("tcp://127.0.0.1:8786")


def _dies(text: str, part: int) -> bytes:
    if part == 2:
        os._exit(7)
    return text.encode()


def _raises(text: str, part: int) -> bytes:
    raise MemoryError(f"too much for {text}")


def _sleeps(text: str, part: int) -> bytes:
    time.sleep(60)
    return b""


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (_dies, "part 2 of the search failed 3 times; the last time: its worker ended with exit code 7"),
        (_raises, "part 0 of the search failed 3 times; the last time: MemoryError: too much for x"),
        (_sleeps, "part 0 of the search failed 3 times; the last time: a worker was silent for 0.5 s"),
    ],
)
def test_a_part_that_always_fails_is_named_and_nothing_hangs(do: Any, said: str) -> None:
    with pytest.raises(WorkFailed) as error:
        list(local(1, do, limit_s=0.5 if do is _sleeps else 60)("x", [0, 1, 2]))
    assert said in str(error.value)


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


def test_a_question_survives_its_text_and_is_checked_by_whoever_reads_it() -> None:
    from hw_profiles.loader import load_chip
    from simulator.planner.spread.question import question_of
    from simulator.planner.spread.work import work

    question = _question(chip=load_chip("h100-sxm"), constraints=("plan.tensor<=1",))
    again = question_of(question.text(), "a test")
    assert again == question and again.hash == question.hash
    _, record = decode(work(question.text(), 3))
    assert record["part"] == 3 and record["question"] == question.hash
    data = json.loads(question.text())
    for key, bad, said in (
        ("objective", "speed", "the objective of a search"),
        ("keep", "some", "keep"),
        ("space", {**data["question"]["space"], "plan.shard": [9]}, "a code is out of range"),
        ("constraints", ["__import__"], "--constraint"),
    ):
        wrong = {**data, "question": {**data["question"], key: bad}}
        with pytest.raises(QuestionError, match=said):
            work(json.dumps(wrong), 0)


def test_too_many_parts_and_two_kinds_of_workers_are_refused(call: Call) -> None:
    status, _, error = call("--workers", "2", "--scheduler", "tcp://127.0.0.1:1")
    assert status == 2 and "--workers, --scheduler: one of them" in error
    job, cluster = load("deepseek-v3")
    with pytest.raises(QuestionError, match=r"--part-plans 1: makes [\d,]+ parts of [\d,]+ plans; at most 100,000"):
        Search(job, cluster, space_of(job, cluster), plans_per_part=1)
