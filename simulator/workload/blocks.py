"""The layout `blocks`, in which the trainer runs dropless experts on a CPU (trainer/blocks.py).

Rows travel in buffers for the worst case; experts work through those that came, in whole blocks of rows.
"""

from __future__ import annotations

from simulator.job.job import Job, Routing
from simulator.job.model import Moe
from simulator.job.rules import Degrees, rows_per_block
from simulator.numbers import Number, maximum, minimum, round_up


def works_in_blocks(job: Job, degrees: Degrees) -> bool:
    """Whether the job's program is the trainer's, and its experts work in blocks."""
    return degrees.layout == "blocks" and job.software.stack == "moecast"


def padding(moe: Moe, experts_here: Number) -> Number:
    """Rows of the buffers over the assignments of a rank: room for all choices that its tokens can make on one rank.

    A token has at most min(k, e) of its k choices on one of E / e ranks.
    """
    return minimum(moe.top_k, experts_here) * (moe.experts / experts_here) / moe.top_k


def balanced_rows(routing: Routing, mean: Number) -> Number:
    """Rows that an expert works on when all of them have `mean` on average.

    Rounded up to whole blocks where loads are exactly even or forced; else half a block more than the mean, since a
    random load ends anywhere in its last block.
    """
    block = rows_per_block(mean)
    if routing.model == "even" or routing.forced:
        return round_up(mean, block)
    return maximum(mean + (block - 1) / 2, block)
