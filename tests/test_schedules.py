"""Pipeline formulas against the longest path through the schedule, op by op."""

from __future__ import annotations

import random

import pytest

from hw_profiles.errors import QuestionError
from simulator.job.layout import Chunk, even_split, lay_out
from simulator.workload.schedules import StageTimes, in_flight, pipeline_time


def order_1f1b(stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    """Forwards and backwards of a stage under 1F1B, in order."""
    warm = min(stages - stage - 1, microbatches)
    ops = [("f", i) for i in range(warm)]
    for i in range(microbatches - warm):
        ops += [("f", warm + i), ("b", i)]
    return ops + [("b", i) for i in range(microbatches - warm, microbatches)]


def longest_path(times: list[StageTimes], microbatches: int, gpipe: bool = False) -> float:
    """End of the last op when every stage runs its order and waits for its neighbours; no hop time."""
    stages = len(times)
    orders = [
        [(k, i) for k in "fb" for i in range(microbatches)] if gpipe else order_1f1b(s, stages, microbatches)
        for s in range(stages)
    ]
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(orders[s]):
                kind, i = orders[s][at[s]]
                before = (kind, s - 1 if kind == "f" else s + 1, i)
                if 0 <= before[1] < stages and before not in done:
                    break
                t = times[s]
                length = t.forward if kind == "f" else t.backward_input + t.backward_weight
                clock[s] = done[kind, s, i] = max(clock[s], done.get(before, 0.0)) + length
                at[s] += 1
    return max(clock)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 2), (2, 8), (4, 4), (4, 16), (8, 9)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_are_exact(schedule: str, stages: int, microbatches: int) -> None:
    times = [StageTimes(1.0, 1.5, 0.5)] * stages
    expected = longest_path(times, microbatches, schedule == "gpipe")
    assert pipeline_time(schedule, times, microbatches, 1, 0.0) == pytest.approx(expected)


def test_unequal_stages_are_a_close_lower_bound() -> None:
    for slow in range(4):
        times = [StageTimes(1.0, 1.2, 0.8)] * 4
        times[slow] = StageTimes(1.5, 1.8, 1.2)
        for schedule in ("1f1b", "gpipe"):
            exact = longest_path(times, 12, schedule == "gpipe")
            assert 0.97 * exact <= pipeline_time(schedule, times, 12, 1, 0.0) <= 1.0001 * exact


def test_papers_bubbles() -> None:
    """ZB-H1 idles (P-1)(F+B-W), interleaving divides 1F1B's by V; DualPipe as its table prints."""
    t = StageTimes(1.0, 1.1, 0.9)
    times, m = [t] * 4, 16
    busy = m * t.total
    assert pipeline_time("1f1b", times, m, 1, 0.0) - busy == pytest.approx(3 * t.total)
    assert pipeline_time("interleaved", times * 2, m, 2, 0.0) - 2 * busy == pytest.approx(3 * t.total)
    assert pipeline_time("zb-h1", times, m, 1, 0.0) - busy == pytest.approx(3 * (1.0 + 1.1 - 0.9))
    equal = [StageTimes(1.0, 1.0, 1.0)] * 4
    assert pipeline_time("dualpipe", equal, m, 1, 0.0) - busy == pytest.approx((4 / 2 - 1) * (3.0 + 2.0 - 3 * 1.0))


def test_activations_in_flight() -> None:
    assert [in_flight("1f1b", s, 4, 8, 1) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight("gpipe", s, 4, 8, 1) for s in range(4)] == [8] * 4
    assert [in_flight("zb-h1", s, 4, 8, 1) for s in range(4)] == [4] * 4
    assert [in_flight("dualpipe", s, 4, 8, 1) for s in range(4)] == [5] * 4
    # Interleaved, V 2: 2 (P - p - 1) + P + 1 chunks of half a stage.
    assert [in_flight("interleaved", s, 4, 8, 2) for s in range(4)] == [5.5, 4.5, 3.5, 2.5]
    assert in_flight("1f1b", 0, 1, 8, 1) == 1


def test_layouts() -> None:
    assert even_split(94, 8) == [12, 12, 12, 12, 12, 12, 11, 11]
    chunks = lay_out("Et|(tt|)*2tmL", 6, 1, 4)
    assert chunks == (
        Chunk(0, 1, True, False, 0),
        Chunk(1, 2, False, False, 0),
        Chunk(3, 2, False, False, 0),
        Chunk(5, 1, False, True, 1),
    )
    assert lay_out((2, 1), 3, 0, 2) == (Chunk(0, 2, True, False, 0), Chunk(2, 1, False, True, 0))
    for bad in ("Et|tL", "Ett|x", (3, 1), (1, 1, 1), "E" + "t*999999999", "(t*9999)*9999"):
        with pytest.raises(QuestionError):
            lay_out(bad, 3, 0, 2)


def test_formulas_take_arrays() -> None:
    import numpy as np

    f = np.array([1.0, 2.0])
    for schedule in ("1f1b", "gpipe", "zb-h1", "dualpipe"):
        many = pipeline_time(schedule, [StageTimes(f, f, f), StageTimes(2 * f, f, f)] * 2, 8, 1, 0.0)
        each = [pipeline_time(schedule, [StageTimes(x, x, x), StageTimes(2 * x, x, x)] * 2, 8, 1, 0.0) for x in (1, 2)]
        assert many.tolist() == pytest.approx(each)


@pytest.mark.parametrize(
    ("schedule", "virtual", "most"),
    [("1f1b", 1, 0.01), ("zb-h1", 1, 0.01), ("dualpipe", 1, 0.01), ("interleaved", 2, 0.03)],
)
def test_unequal_stages_and_hops_against_the_whole_path(schedule: str, virtual: int, most: float) -> None:
    """Stages that differ by 25 % either way: walking 2 P microbatches and extrapolating, against walking all."""
    from simulator.workload.schedules import _program, _walk

    rng = random.Random(5)
    for _ in range(40):
        stages, hop = rng.choice([2, 4, 8]), rng.choice([0.0, 0.02])
        microbatches = stages * rng.choice([4, 8])
        times = []
        for _ in range(stages * virtual):
            f = rng.uniform(0.75, 1.25)
            times.append(StageTimes(f, f * rng.uniform(1.1, 1.3), f * 0.8))
        exact = _walk(_program(schedule, stages, microbatches, virtual), times, hop)
        assert pipeline_time(schedule, times, microbatches, virtual, hop) == pytest.approx(exact, rel=most)
