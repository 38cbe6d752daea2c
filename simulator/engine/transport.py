"""How the engine's transfers move: alone at their own rate, or sharing the links of a real topology."""

from __future__ import annotations

from typing import Any

import simpy

from simulator.engine.work import Transfer
from simulator.network.collectives import Network
from simulator.network.flight import TICK_S


class Solo:
    """Every transfer at its rate alone: the closed form's view of the network.

    A class sends its states (weights, gradients) one collective after the other, since they share its cards; its
    all-to-alls do not wait for them.
    """

    def __init__(self, env: simpy.Environment, network: Network) -> None:
        self.env, self.network = env, network
        self._free: dict[tuple[int, bool], dict[int, int]] = {}

    def seconds(self, t: Transfer) -> float:
        """Seconds of a transfer: its calls' latencies, and its bytes at the solo rate."""
        rate = self.network.rate(t.kind, t.size, t.stride, t.between)
        return t.calls * rate.latency_s + t.bytes * rate.seconds_per_byte

    def transfer(self, t: Transfer, stage: int, group: int) -> simpy.Event:
        """Start it now; the event fires at its end."""
        lanes = self._free.setdefault((stage, t.name == "all-to-all"), {})
        # Group -1 is all groups together: they share the lane that it holds.
        before = max(lanes.values(), default=0) if group == -1 else max(lanes.get(group, 0), lanes.get(-1, 0))
        now = int(self.env.now)
        begin = max(now, before)
        end = lanes[group] = begin + round(self.seconds(t) / TICK_S)
        return self.env.timeout(end - now, value=(begin, end))

    def span(self, event: simpy.Event) -> tuple[float, float]:
        """When a transfer began to move and ended, seconds."""
        begin, end = event.value  # type: ignore[misc]
        return float(begin * TICK_S), float(end * TICK_S)


def solo(network: Network) -> Any:
    """Transport factory for `Engine`."""
    return lambda env: Solo(env, network)
