"""How the fields of a plan take part in a call: what all its rows share, what is a column, what is a flag."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = ("plan.schedule", "plan.placement.order")
CORE = (
    "plan.tensor", "plan.context", "plan.expert", "plan.expert_tensor", "plan.shard_degree", "plan.pipeline",
    "plan.virtual_stages", "plan.microbatch_sequences",
)  # fmt: skip
# Columns that decide which devices a collective joins.
GROUPS = 6
FLAGS = (
    "plan.sequence_parallel", "training.remat", "training.dispatch.transport", "training.dispatch.layout", "plan.shard",
    "software.overlap.all_to_all", "software.overlap.gradients", "software.overlap.parameters",
)  # fmt: skip


class Flags(NamedTuple):
    """What decides the control flow of the formulas: codes into `table.CHOICES`, in the order of `FLAGS`."""

    sequence_parallel: int
    remat: int
    transport: int
    layout: int
    shard: int
    all_to_all: int
    gradients: int
    parameters: int

    @property
    def rules(self) -> tuple[int, int, int]:
        """Those that rules read."""
        return self.sequence_parallel, self.layout, self.shard

    @property
    def layers(self) -> tuple[int, int, int, int]:
        """Those that change a layer's work."""
        return self[:4]
