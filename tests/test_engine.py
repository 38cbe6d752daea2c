"""The engine: whole timelines by hand, agreement with the closed form, folding, faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_setups import chunk, most_kept, run, setup, story
from hw_profiles.errors import QuestionError
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.engine.work import DeviceWork, Transfer
from simulator.job.load import load_job

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


# Two stages, forward 1 s, input and weight gradient 1 s each: worked out on paper.
@pytest.mark.parametrize(
    ("schedule", "microbatches", "virtual", "expected"),
    [
        ("gpipe", 2, 1, ["F0 0-1, F1 1-2, B1 5-7, B0 7-9", "F0 1-2, F1 2-3, B1 3-5, B0 5-7"]),
        ("1f1b", 2, 1, ["F0 0-1, F1 1-2, B0 4-6, B1 7-9", "F0 1-2, B0 2-4, F1 4-5, B1 5-7"]),
        (
            "zb-h1",
            2,
            1,
            ["F0 0-1, F1 1-2, I0 3-4, W0 4-5, I1 5-6, W1 6-7", "F0 1-2, I0 2-3, F1 3-4, I1 4-5, W0 5-6, W1 6-7"],
        ),
        (
            "interleaved",
            2,
            2,
            [
                "F0.0 0-1, F1.0 1-2, F0.1 2-3, F1.1 3-4, B0.1 6-8, B1.1 9-11, B0.0 11-13, B1.0 13-15",
                "F0.0 1-2, F1.0 2-3, F0.1 3-4, B0.1 4-6, F1.1 6-7, B1.1 7-9, B0.0 9-11, B1.0 11-13",
            ],
        ),
        (
            "dualpipe",
            4,
            1,
            [
                "F0.0 0-1, F0.1 1-2, F1.0 2-3, B0.1 3-5, FB1.1 5-8, B1.1 8-10, I1.0 10-11, W1.0 11-12",
                "F0.1 0-1, F0.0 1-2, F1.1 2-3, B0.0 3-5, FB1.0 5-8, B1.0 8-10, I1.1 10-11, W1.1 11-12",
            ],
        ),
    ],
)
def test_timeline_of_two_stages_by_hand(schedule: str, microbatches: int, virtual: int, expected: list[str]) -> None:
    assert story(setup(schedule, 2, microbatches, virtual)) == expected


def test_four_stages_of_1f1b_by_hand() -> None:
    """Forward 1 s, backward 2 s, four microbatches: 21 s = (4 + 4 - 1) x 3."""
    assert story(setup("1f1b", 4, 4)) == [
        "F0 0-1, F1 1-2, F2 2-3, F3 3-4, B0 10-12, B1 13-15, B2 16-18, B3 19-21",
        "F0 1-2, F1 2-3, F2 3-4, B0 8-10, F3 10-11, B1 11-13, B2 14-16, B3 17-19",
        "F0 2-3, F1 3-4, B0 6-8, F2 8-9, B1 9-11, F3 11-12, B2 12-14, B3 15-17",
        "F0 3-4, B0 4-6, F1 6-7, B1 7-9, F2 9-10, B2 10-12, F3 12-13, B3 13-15",
    ]


@pytest.mark.parametrize(
    ("schedule", "microbatches", "virtual", "kept"),
    [
        ("gpipe", 8, 1, [8, 8, 8, 8]),
        ("1f1b", 8, 1, [4, 3, 2, 1]),
        ("interleaved", 8, 2, [11, 9, 7, 5]),
        ("zb-h1", 8, 1, [4, 4, 4, 4]),
        ("dualpipe", 8, 1, [5, 5, 5, 5]),
    ],
)
def test_activations_in_flight(schedule: str, microbatches: int, virtual: int, kept: list[float]) -> None:
    assert most_kept(setup(schedule, 4, microbatches, virtual)) == kept


# Papers' idle times on equal stages: 1F1B and GPipe (P-1)(F+B), interleaved 1/V of it, ZB-H1 (P-1)(F+I-W), DualPipe
# (P/2-1)(F&B+B-3W), which is exact only where F = I = W.
@pytest.mark.parametrize(("schedule", "idle"), [("1f1b", 9.0), ("gpipe", 9.0), ("zb-h1", 3.0), ("dualpipe", 2.0)])
def test_bubbles_emerge(schedule: str, idle: float) -> None:
    assert run(setup(schedule, 4, 16)).step_s == pytest.approx(16 * 3 + idle)


def test_hops_delay_what_they_should() -> None:
    """1F1B with a lag of c: 2c[(P-1)M/P + P-2] more (derived by the longest path; architecture, section 4)."""
    plain, lagged = run(setup("1f1b", 4, 16)).step_s, run(setup("1f1b", 4, 16, hop_s=0.01)).step_s
    assert lagged - plain == pytest.approx(2 * 0.01 * (3 * 16 / 4 + 2))


def test_overlapped_transfers_hide_and_slow_and_serial_ones_do_not() -> None:
    def step(seconds: float, beside: bool, slowdown: float = 0.0) -> float:
        one = Transfer("all-to-all", "all_to_all", 8, 1, seconds, overlapped=beside)
        device = DeviceWork([chunk(4.0, 0.0, 0.0, forward=[one])], [], [], 0.0, 1)
        return run(setup("1f1b", 1, 1, devices=[device], slowdown=slowdown)).step_s

    assert step(3.0, beside=True) == 4.0
    assert step(6.0, beside=True) == 6.0
    assert step(3.0, beside=False) == 7.0
    assert step(2.0, beside=True, slowdown=0.5) == 5.0


def test_reductions_start_layer_by_layer_during_the_last_backward() -> None:
    """Four layers of 1 s backward each; 4 s of reduction in four parts: the last part begins at the end."""
    work = replace(chunk(0.0, 2.0, 2.0), layers=4)
    device = DeviceWork([work], [Transfer("gradients", "all_reduce", 8, 1, 2.0, overlapped=True)], [], 0.0, 4)
    assert run(setup("1f1b", 1, 1, devices=[device])).step_s == 4.5
    alone = DeviceWork([work], [Transfer("gradients", "all_reduce", 8, 1, 2.0)], [], 0.0, 4)
    assert run(setup("1f1b", 1, 1, devices=[alone])).step_s == 6.0


BASE: dict[str, Any] = {
    "model": "mixtral-8x7b",
    "cluster": {"chip": "h100-sxm", "nodes": 8},
    "batch": {"sequences": 256, "length": 4096},
    "training": {"routing": {"model": "even"}},
}
PLANS: dict[str, dict[str, Any]] = {
    "1f1b": {"pipeline": 4, "expert": 8, "microbatch_sequences": 1, "shard": "optimizer"},
    "gpipe": {"pipeline": 4, "expert": 8, "microbatch_sequences": 1, "schedule": "gpipe"},
    "interleaved": {
        "pipeline": 4,
        "expert": 8,
        "microbatch_sequences": 1,
        "schedule": "interleaved",
        "virtual_stages": 4,
    },
    "zb-h1": {"pipeline": 4, "expert": 8, "microbatch_sequences": 1, "schedule": "zb-h1"},
    "dualpipe": {"pipeline": 4, "expert": 8, "microbatch_sequences": 1, "schedule": "dualpipe"},
    "fsdp": {"shard": "parameters"},
    "fsdp, microbatches": {"shard": "parameters", "microbatch_sequences": 1},
    "zero 2": {"shard": "gradients", "microbatch_sequences": 1, "expert": 8},
    "replicated": {"expert": 8},
    "tensor": {"tensor": 4, "sequence_parallel": True, "expert": 8, "pipeline": 2, "microbatch_sequences": 1},
}


def alone(job: dict[str, Any]) -> float:
    """Events over closed form, minus one, every collective at its solo rate."""
    result = forecast(load_job(job), options=EventOptions(contention=False))
    assert result.events is not None
    return result.events.difference


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("overlap", [False, True])
def test_closed_form_and_events_agree_on_every_schedule(name: str, overlap: bool) -> None:
    software = {"overlap": {"all_to_all": overlap}}
    assert abs(alone(BASE | {"plan": PLANS[name], "software": software})) < 0.02


@pytest.mark.parametrize("shard", ["gradients", "parameters"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("all_to_all", [False, True])
def test_closed_form_and_events_agree_on_dualpipe_with_sharded_gradients(
    shard: str, gradients: bool, parameters: bool, all_to_all: bool
) -> None:
    """What is reduced and gathered every microbatch hides behind the passes of one action, alone or in pairs."""
    overlap = {"gradients": gradients, "parameters": parameters, "all_to_all": all_to_all}
    changes = {"plan": PLANS["dualpipe"] | {"shard": shard}, "software": {"overlap": overlap}}
    assert abs(alone(BASE | changes)) < 0.02
    # Cards at a third of their rate: reductions and gathers take longer than the passes.
    slow = {"cluster": {"chip": {"name": "h100-sxm", "scale_out.nic_gb_per_s": "x0.3"}, "nodes": 8}}
    assert abs(alone(BASE | changes | slow)) < 0.02


@pytest.mark.parametrize("path", EXAMPLES, ids=[p.stem for p in EXAMPLES])
def test_closed_form_and_events_agree_on_the_examples(path: Path) -> None:
    result = forecast(load_job(path, ["training.routing={model: even}"]), options=EventOptions(contention=False))
    assert result.events is not None and abs(result.events.difference) < 0.02


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "dualpipe", "zero 2", "replicated", "fsdp"])
def test_folded_and_unfolded_runs_are_the_same(name: str) -> None:
    """Without draws every group of a stage does the same at the same time."""
    job = load_job(BASE | {"plan": PLANS[name]})
    folded, all_ = (forecast(job, options=EventOptions(fold=f, contention=False)) for f in (True, False))
    assert all_.step_time_s == pytest.approx(folded.step_time_s, rel=1e-9)
    assert all_.timeline is not None and folded.timeline is not None
    assert len(all_.timeline) > len(folded.timeline) or len(all_.timeline.classes) == len(folded.timeline.classes)
    same = all_.timeline.device % (len(all_.timeline.classes) // len(folded.timeline.classes)) == 0
    assert all_.timeline.start_s[same] == pytest.approx(folded.timeline.start_s, rel=1e-9)


def test_a_straggler_slows_the_step_and_is_bounded_by_its_factor() -> None:
    job = load_job(BASE | {"plan": PLANS["1f1b"]})
    plain = forecast(job).step_time_s
    slow = forecast(job, options=EventOptions(stragglers={17: 1.5})).step_time_s
    assert plain * 1.05 < slow < plain * 1.5
    with pytest.raises(QuestionError, match=r"straggler 99: devices are 0 to 63"):
        forecast(job, options=EventOptions(stragglers={99: 2.0}))


def test_a_rank_that_never_arrives_is_named() -> None:
    """Stage 0 forgets its second forward: stage 1 waits for it, and the engine says so instead of hanging."""
    made = setup("1f1b", 2, 2)
    made.orders[0][:] = [a for a in made.orders[0] if not (a.kind == "F" and a.microbatch == 1)]
    with pytest.raises(QuestionError, match=r"stage 1 waits for microbatch 1 of stage 0"):
        run(made)


def test_runs_are_repeatable_to_the_last_bit() -> None:
    job = load_job(EXAMPLES[0])
    first, second = forecast(job), forecast(job)
    assert first.timeline is not None and second.timeline is not None
    assert first.timeline.start_s.tobytes() == second.timeline.start_s.tobytes()
    assert first.to_dict() == second.to_dict()
