"""Coflows in SimPy: whole timelines, and the order of what happens in one tick."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import simpy

from coflows import GB, coflow, part, random_case, story
from simulator.network.coflow import Coflow
from simulator.network.fluid import Fluid
from simulator.network.transfers import FluidProcess


def told(
    run: Callable[[simpy.Environment, FluidProcess, list[tuple[str, int]]], None], links: int = 2
) -> tuple[list[tuple[str, int]], Fluid]:
    env, fluid = simpy.Environment(), Fluid(np.full(links, GB))
    log: list[tuple[str, int]] = []
    run(env, FluidProcess(env, fluid), log)
    env.run()
    return log, fluid


def test_simpy_tells_the_same_story() -> None:
    def run(env: simpy.Environment, transfers: FluidProcess, log: list[tuple[str, int]]) -> None:
        def rank(name: str, at: int, chain: list[Coflow]):  # type: ignore[no-untyped-def]
            yield env.timeout(at)
            for one in chain:
                flight = yield transfers.transfer(one)
                assert flight.coflow is one
                log.append((name, env.now))

        shared, short = coflow("shared", part({0: 1e6})), coflow("short", part({0: 5e5, 1: 1e5}), latency_s=1e-6)
        env.process(rank("r0", 0, [shared, short]))
        env.process(rank("r1", 0, [shared, short]))
        env.process(rank("r2", 500_000, [short]))

    log, fluid = told(run)
    # r0 and r1 share for 0.501 ms; then r2, after its latency, moves 0.5 MB at a third of the link, until 2.001 ms.
    assert log == [("r2", 2_001_000), ("r0", 2_500_000), ("r1", 2_500_000), ("r0", 3_501_000), ("r1", 3_501_000)]
    assert fluid.link_bytes().tolist() == pytest.approx([3.5e6, 3e5])


def test_what_starts_in_one_instant_is_solved_once() -> None:
    def run(env: simpy.Environment, transfers: FluidProcess, log: list[tuple[str, int]]) -> None:
        same = coflow("same", part({0: 1e6}))

        def rank(name: str):  # type: ignore[no-untyped-def]
            for _ in range(3):
                yield env.timeout(1000)
                yield transfers.transfer(same)
                log.append((name, env.now))

        for k in range(8):
            env.process(rank(f"r{k}"))

    log, fluid = told(run)
    assert log == [(f"r{k}", 8_001_000 * (turn + 1)) for turn in range(3) for k in range(8)]
    assert fluid.solves == 1


def test_a_start_in_answer_to_an_end_shares_its_tick() -> None:
    """The next transfer begins in the tick in which the last one ended, and rates are solved once for both."""

    def run(env: simpy.Environment, transfers: FluidProcess, log: list[tuple[str, int]]) -> None:
        def rank(name: str, sizes: list[float]):  # type: ignore[no-untyped-def]
            for size in sizes:
                yield transfers.transfer(coflow(name, part({0: size}) if size else part({})))
                log.append((name, env.now))

        env.process(rank("long", [3e6]))
        env.process(rank("short", [1e6, 0.0, 1e6]))

    log, fluid = told(run)
    assert log == [("short", 2_000_000), ("short", 2_000_000), ("short", 4_000_000), ("long", 5_000_000)]
    assert fluid.solves == 2


def test_simpy_agrees_with_the_bare_fluid() -> None:
    for seed in range(20):
        bandwidth, starts = random_case(seed)
        env = simpy.Environment()
        fluid = Fluid(bandwidth)
        transfers = FluidProcess(env, fluid)
        log: list[tuple[str, int]] = []

        def rank(one: Coflow, at: int):  # type: ignore[no-untyped-def]
            yield env.timeout(at)  # noqa: B023
            flight = yield transfers.transfer(one)  # noqa: B023
            log.append((flight.coflow.name, flight.ended))  # noqa: B023

        for one, at in starts:
            env.process(rank(one, at))
        env.run()
        assert dict(log) == dict(story(Fluid(bandwidth), *starts))


def test_a_clock_in_fractions_is_refused() -> None:
    env = simpy.Environment(initial_time=0.5)
    with pytest.raises(TypeError, match=r"0\.5: it counts ticks"):
        FluidProcess(env, Fluid(np.array([GB]))).transfer(coflow("a", part({0: 1})))
