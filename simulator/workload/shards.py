"""Over how many devices weights, gradients and the optimiser's states are split."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.job.rules import Degrees
from simulator.numbers import Number, maximum, minimum, where


@dataclass(frozen=True, slots=True)
class Shards:
    """Over how many devices each kind of state is split, beyond tensor, expert and pipeline degrees."""

    dense: Number
    expert: Number

    @staticmethod
    def of(degrees: Degrees) -> Shards:
        """Dense states over the shard degree; experts over the part of the same devices that holds copies of them."""
        d = degrees
        copies = d.shard * d.tensor // (d.expert * d.expert_tensor)
        return Shards(d.shard, where(d.shard > 1, maximum(1, minimum(d.expert_data, copies)), 1))
