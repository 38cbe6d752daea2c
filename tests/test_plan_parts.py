"""Parts of a search: their size and order change nothing, those that fail are named, and questions travel as text."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError, WorkFailed
from simulator.job.load import load_job
from simulator.planner.kept import NUMBERS, Kept, Winners
from simulator.planner.search import Search
from simulator.planner.space import SpaceFile, space_of
from simulator.planner.spread.local import local
from simulator.planner.spread.on_dask import on_dask
from simulator.planner.spread.parquet import decode
from simulator.planner.spread.question import Question
from simulator.planner.table import FIELDS
from tests import plan_runs as runs
from tests.planner_draws import load


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


def test_a_space_in_too_many_parts_is_refused() -> None:
    job, cluster = load("deepseek-v3")
    with pytest.raises(QuestionError, match=r"--part-plans 1: makes [\d,]+ parts of [\d,]+ plans; at most 100,000"):
        Search(job, cluster, space_of(job, cluster), plans_per_part=1)
