"""The host stream: kernels start when they are launched and the device is free; graphs and XLA programs launch once."""

from __future__ import annotations

from typing import Any

import pytest

from engine_setups import chunk, run, setup
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.engine.work import DeviceWork
from simulator.job.load import load_job
from simulator.results.forecast import Forecast
from simulator.results.timeline import KINDS
from test_engine import BASE, PLANS


def alone(kernels: float, compute_s: float, launch_s: float, microbatches: int = 1) -> float:
    """Seconds of a step of forwards alone on one device."""
    one = chunk(compute_s, 0.0, 0.0)
    one.forward.kernels = kernels
    device = DeviceWork([one], [], [], 0.0, 1)
    return run(setup("1f1b", 1, microbatches, devices=[device], launch_s=launch_s)).step_s


def test_four_kernels_by_hand() -> None:
    """1 s each. Launched every 2 s they start at 2, 4, 6, 8 and end at 9; every 0.5 s, the first at 0.5: 4.5 s."""
    assert alone(4, 4.0, 2.0) == 9.0
    assert alone(4, 4.0, 0.5) == 4.5
    assert alone(4, 4.0, 0.0) == 4.0


def test_the_host_runs_ahead_of_the_device() -> None:
    """Three passes of two kernels of 1 s, a launch every 0.5 s: only the first launch is seen."""
    assert alone(2, 2.0, 0.5, microbatches=3) == 6.5
    # Launched every 2 s, the last of six is launched at 12 s.
    assert alone(2, 2.0, 2.0, microbatches=3) == 13.0


def test_kernels_run_as_on_one_queue_whatever_their_number() -> None:
    """Against launches and kernels one by one."""
    for kernels in (1, 3, 10):
        for launch in (0.05, 0.3, 0.7):
            end = 0.0
            for i in range(4 * kernels):
                end = max(end, (i + 1) * launch) + 1.0 / kernels
            assert alone(kernels, 1.0, launch, microbatches=4) == pytest.approx(end, rel=1e-6)


def launched(us: float, plan: str, software: dict[str, Any] | None = None, chip: str = "h100-sxm") -> Forecast:
    cluster = {"chip": {"name": chip, "host_launch_us": us}, "nodes": 8}
    job = BASE | {"plan": PLANS[plan], "cluster": cluster, "software": software or {}}
    return forecast(load_job(job), options=EventOptions(contention=False))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("us", [10.0, 600.0, 3000.0])
def test_closed_form_and_events_agree_however_slow_the_host(plan: str, us: float) -> None:
    result = launched(us, plan)
    assert result.events is not None and abs(result.events.difference) < 0.02


def test_a_launch_bound_step_says_so_and_graphs_free_it() -> None:
    slow, usual, graphs = launched(3000, "1f1b"), launched(10, "1f1b"), launched(3000, "1f1b", {"graphs": True})
    assert any(w.startswith("launch-bound: the host needs") for w in slow.evidence.warnings)
    assert slow.parts.host_s > 0.3 * slow.step_time_s
    assert slow.timeline is not None and (slow.timeline.kind == KINDS.index("launch")).any()
    for free in (usual, graphs):
        assert not any("launch-bound" in w for w in free.evidence.warnings)
        assert free.parts.host_s < 0.01 * free.step_time_s
    assert graphs.step_time_s == pytest.approx(usual.step_time_s, rel=1e-3)


def test_a_slower_host_never_speeds_a_step_up() -> None:
    steps = [launched(us, "1f1b").step_time_s for us in (0.0, 10.0, 300.0, 1000.0, 3000.0)]
    assert steps == sorted(steps)


def test_xla_launches_whole_programs() -> None:
    job = BASE | {"cluster": {"chip": {"name": "h100-sxm", "host_launch_us": 3000.0}, "nodes": 8}}
    maxtext, torch = (
        forecast(load_job(job | {"software": {"stack": stack}}), engine="closed-form")
        for stack in ("maxtext", "megatron")
    )
    assert maxtext.parts.host_s < 0.01 < torch.parts.host_s
