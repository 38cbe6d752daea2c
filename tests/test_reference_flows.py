"""Coflows against every flow by itself (max-min per flow); `pytest -s` prints the errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from reference_flows import (
    Collective,
    Net,
    by_coflows,
    chance_scenarios,
    even_scenarios,
    simulate,
    skewed_scenarios,
    switch,
    to_coflow,
    torus,
    tree,
    unrelated_scenarios,
)

NETS = (switch(16), switch(32), switch(64), tree(32, 8, 4), tree(64, 16, 4), torus(4, 4))


def table(net: Net, scenarios: dict[str, list[Collective]], columns: tuple[str, ...]) -> dict[str, float]:
    """Largest error in each column; prints one row for each scenario."""
    worst = dict.fromkeys(columns, 0.0)
    sys.stdout.write(f"\n{net.name}: end of each collective against every flow by itself\n")
    for name, collectives in scenarios.items():
        exact = np.array(simulate(net, collectives))
        row = f"  {name:40}"
        for split in columns:
            error = np.array(by_coflows(net, collectives, split)) / exact - 1
            worst[split] = max(worst[split], float(np.abs(error).max()))
            row += f" {split:>6}" + "".join(f" {e:+7.2%}" for e in error)
        sys.stdout.write(row + "\n")
    return worst


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_even_collectives_end_with_their_flows(net: Net) -> None:
    assert table(net, even_scenarios(net.endpoints), ("level",))["level"] < 0.03


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_skewed_collectives_end_with_their_flows_as_the_product_cuts_them(net: Net) -> None:
    """Split by level alone they do not, nor by one end alone: the other columns are printed to show by how much."""
    assert table(net, skewed_scenarios(net.endpoints), ("cut", "end", "level"))["cut"] < 0.06


@pytest.mark.parametrize("net", [switch(16), switch(32), tree(32, 8, 4), torus(4, 4)], ids=lambda net: net.name)
def test_chance_routing_ends_with_its_flows_as_the_product_cuts_it(net: Net) -> None:
    """Every pair differs: a destination's part waits for its largest flow, flows of one class of size end together."""
    assert table(net, chance_scenarios(net.endpoints), ("cut", "size", "level"))["cut"] < 0.06


@pytest.mark.parametrize("net", [*NETS, tree(32, 4, 4)], ids=lambda net: net.name)
def test_a_hot_destination_whose_source_is_busy_elsewhere_ends_with_its_flows(net: Net) -> None:
    assert table(net, unrelated_scenarios(net.endpoints), ("cut", "end", "level"))["cut"] < 0.06


def test_reference_helpers_conserve_bytes() -> None:
    net = tree(32, 8, 4)
    for collective in skewed_scenarios(32)["Zipf 0.6 and ring"]:
        totals = []
        for split in ("level", "cut", "size"):
            load = np.zeros(net.bandwidth.size)
            for p in to_coflow(net, collective, split).parts:
                load[p.links] += p.bytes
            totals.append(load)
        assert totals[0] == pytest.approx(totals[1]) and totals[0] == pytest.approx(totals[2])
        assert totals[0][:32].sum() == pytest.approx(collective.stages[0].sum())
