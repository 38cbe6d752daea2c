"""The job's plan as a mesh of devices, and the one table from logical axes of arrays to mesh axes.

Devices are numbered as in the simulator: pipeline outermost, then data, then tensor. The expert degrees cut the same
numbers again, from the innermost: expert_tensor (slices of an expert's hidden size), expert, copies of the experts. The
mesh has one axis for every piece between two cuts, so that each degree, dense or expert, is a tuple of mesh axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hw_profiles.errors import QuestionError

if TYPE_CHECKING:
    from simulator.job.job import Job
    from simulator.job.rules import Degrees

PIPELINE = "pipeline"


@dataclass(frozen=True)
class Axes:
    """Mesh axes, outermost first, and which of them make up each degree (tuples of names, outermost first)."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    pipeline: tuple[str, ...]
    data: tuple[str, ...]
    tensor: tuple[str, ...]
    expert: tuple[str, ...]
    expert_tensor: tuple[str, ...]
    copies: tuple[str, ...]
    shard: tuple[str, ...]

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along `axes`."""
        out = 1
        for name, size in zip(self.names, self.sizes, strict=True):
            out *= size if name in axes else 1
        return out

    @property
    def token_split(self) -> tuple[str, ...]:
        """Tensor axes over which an MoE layer splits tokens: those that do not split the experts' hidden size."""
        return tuple(a for a in self.tensor if a not in self.expert_tensor)

    @property
    def expert_shard(self) -> tuple[str, ...]:
        """Axes over which the states of experts are sharded: the data axes that hold copies of them."""
        return tuple(a for a in self.shard if a in self.copies)


def _check_slices(job: Job, d: Degrees) -> None:
    """QuestionError where the slices of a network would see different tokens, or would need each other's results."""
    if d.tensor % d.expert_tensor:
        raise QuestionError(
            f"plan.expert_tensor = {d.expert_tensor}: must divide tensor {d.tensor}; the trainer slices experts over"
            " ranks that hold the same tokens"
        )
    for stack in (job.model.encoder, job.model.decoder):
        dense = stack.ffn.depth if stack is not None and stack.ffn is not None else 1
        expert = stack.moe.expert.depth if stack is not None and stack.moe is not None else 1
        if (dense > 1 and d.tensor > 1) or (expert > 1 and d.expert_tensor > 1):
            raise QuestionError(
                f"plan = tensor {d.tensor}, expert_tensor {d.expert_tensor}: the trainer does not split networks of"
                f" {max(dense, expert)} hidden layers"
            )


def make_axes(job: Job, degrees: Degrees) -> Axes:
    """The axes for the plan; QuestionError where the degrees do not cut the device numbers into one mesh."""
    d = degrees
    inner = d.data * d.tensor
    _check_slices(job, d)
    shard = d.tensor * d.shard if d.shard > 1 else inner
    cuts = {1, d.tensor, shard, d.expert_tensor, d.expert_tensor * d.expert, inner}
    chain = sorted(cuts)
    for low, high in zip(chain, chain[1:], strict=False):
        if high % low:
            raise QuestionError(
                f"plan = tensor {d.tensor}, expert {d.expert}, expert_tensor {d.expert_tensor}, shard_degree {d.shard}:"
                f" the trainer lays them over the same devices, and {low} does not divide {high}"
            )
    found: list[tuple[str, int, str, str, bool]] = []
    for low, high in zip(chain, chain[1:], strict=False):
        dense = "tensor" if high <= d.tensor else "data"
        if high <= d.expert_tensor:
            moe = "slice"
        elif high <= d.expert_tensor * d.expert:
            moe = "expert"
        else:
            moe = "copy"
        sharded = dense == "data" and d.shard > 1 and high <= shard
        name = f"{dense}_{moe}" if dense == "tensor" or sharded or d.shard == 1 else f"replica_{moe}"
        found.append((name, high // low, dense, moe, sharded))
    found.reverse()
    names = [f[0] for f in found]
    if d.pipeline > 1:
        names, sizes = [PIPELINE, *names], [d.pipeline, *(f[1] for f in found)]
    else:
        sizes = [f[1] for f in found]
    if not names:
        names, sizes = ["data_copy"], [1]

    def pick(**wanted: Any) -> tuple[str, ...]:
        fields = {"dense": 2, "moe": 3, "sharded": 4}
        return tuple(f[0] for f in found if all(f[fields[k]] == v for k, v in wanted.items()))

    return Axes(
        names=tuple(names),
        sizes=tuple(sizes),
        pipeline=(PIPELINE,) if d.pipeline > 1 else (),
        data=pick(dense="data"),
        tensor=pick(dense="tensor"),
        expert=pick(moe="expert"),
        expert_tensor=pick(moe="slice"),
        copies=pick(moe="copy"),
        shard=pick(sharded=True),
    )


def make_mesh(axes: Axes, devices: Any) -> Any:
    """The JAX mesh of `axes` over `devices`, in their order; QuestionError where there are too few."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    count = 1
    for size in axes.sizes:
        count *= size
    if len(devices) < count:
        raise QuestionError(f"plan: needs {count} devices; there are {len(devices)} (moecast scale JOB --devices N)")
    grid = np.asarray(devices[:count]).reshape(axes.sizes)
    return Mesh(grid, axes.names, axis_types=(AxisType.Auto,) * len(axes.names))


# Logical axis of an array -> which of the degrees splits it. What is not named here is not split.
RULES: dict[str, str] = {
    "stage": "pipeline",
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "expert_ffn": "expert_tensor",
    "batch": "data",
}


def mesh_axes(axes: Axes, logical: str | None) -> tuple[str, ...]:
    """The mesh axes that split the logical axis; empty where nothing does."""
    return getattr(axes, RULES[logical]) if logical in RULES else ()
