"""One abstract tree of parameters, from which initial values, shardings, gradients' reductions and checkpoints derive.

A leaf says its shape, the logical axis of each dimension, and how it is drawn. Leading dimensions `layers` and
`experts` stack equal matrices; the last two are the matrix itself (`[in, out]`), so that fans and factored moments
never see the stack.

Letters: L stacked layers, E experts, D hidden, F ffn hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hw_profiles.errors import QuestionError
from trainer.mesh import Axes, mesh_axes

if TYPE_CHECKING:
    import jax

STACKED = ("stage", "layers", "experts", "branches")
Tree = Any


@dataclass(frozen=True)
class Parameter:
    """One array of the model: `axes` names each dimension; `hidden` is the one that sharding of states splits.

    `init`: `fan_in` is a truncated normal of standard deviation sqrt(scale / fan_in) (Switch Transformer,
    arXiv:2101.03961, section 2.4), `normal` one of standard deviation `scale`; fans count the matrix alone.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["fan_in", "normal", "zeros", "ones"]
    scale: float = 1.0
    trained: bool = True
    expert: bool = False

    @property
    def stacked(self) -> int:
        """Leading dimensions that stack equal arrays."""
        return sum(1 for a in self.axes if a in STACKED)

    def stack(self, count: int, axis: str = "layers") -> Parameter:
        """`count` of them in one array."""
        return Parameter((count, *self.shape), (axis, *self.axes), self.init, self.scale, self.trained, self.expert)

    def one(self) -> Parameter:
        """One of the stack, without its first dimension."""
        return Parameter(self.shape[1:], self.axes[1:], self.init, self.scale, self.trained, self.expert)

    def shard_dimension(self) -> int | None:
        """The dimension that ZeRO and FSDP split: the hidden size, of which every large array has one."""
        return self.axes.index("hidden") if "hidden" in self.axes else None


def is_parameter(x: object) -> bool:
    """Whether `x` is a leaf of the abstract tree."""
    return isinstance(x, Parameter)


def tree_map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`f` over the leaves of the abstract tree (and of trees of the same form)."""
    import jax

    return jax.tree.map(f, tree, *rest, is_leaf=is_parameter)


def spec_of(p: Parameter, axes: Axes, *, sharded: bool) -> jax.sharding.PartitionSpec:
    """How a parameter lies on the mesh; `sharded` adds the axes of ZeRO or FSDP on its hidden dimension."""
    from jax.sharding import PartitionSpec

    parts: list[tuple[str, ...]] = [mesh_axes(axes, a) for a in p.axes]
    at = p.shard_dimension()
    if sharded and at is not None:
        parts[at] = parts[at] + shard_axes(p, axes)
    return PartitionSpec(*(tuple(x) if x else None for x in parts))


def shard_axes(p: Parameter, axes: Axes) -> tuple[str, ...]:
    """The data axes over which the states of `p` can be split."""
    if p.shard_dimension() is None:
        return ()
    return axes.expert_shard if p.expert else axes.shard


def own_axes(p: Parameter, axes: Axes) -> tuple[str, ...]:
    """Mesh axes along which devices hold different parts of `p`, sharding of states aside."""
    return tuple(m for a in p.axes for m in mesh_axes(axes, a))


def varying_axes(p: Parameter, axes: Axes, *, gathered: bool) -> tuple[str, ...]:
    """Mesh axes along which the gradient of `p` differs between devices and has to be summed.

    Tokens differ along the data axes, along the tensor axes that split an MoE layer's tokens, and stages along the
    pipeline. `gathered`: FSDP's own axes are summed where the weight was gathered, so they are left out.
    """
    token = (*axes.pipeline, *axes.data)
    if p.expert:
        token = (*token, *axes.token_split)
    out = [a for a in axes.names if a in token and a not in own_axes(p, axes)]
    if gathered:
        out = [a for a in out if a not in shard_axes(p, axes)]
    return tuple(out)


def check_shardable(tree: Tree, axes: Axes) -> None:
    """QuestionError where the hidden size cannot be split over the shard ranks."""
    for p in leaves(tree):
        at = p.shard_dimension()
        if at is not None:
            parts = axes.size(shard_axes(p, axes))
            if p.shape[at] % parts:
                raise QuestionError(f"plan.shard: {parts} ranks do not divide the hidden size {p.shape[at]}")


def leaves(tree: Tree) -> list[Parameter]:
    """The parameters in order."""
    import jax

    return list(jax.tree.leaves(tree, is_leaf=is_parameter))


def initial_values(tree: Tree, seed: int, dtype: Any) -> Tree:
    """Initial values of all parameters; each array has its own stream, named by its path, so that trees may grow.

    To be called under `jax.jit` with output shardings: every device draws its own part.
    """
    import zlib

    import jax
    import jax.numpy as jnp

    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_parameter)
    root = jax.random.key(seed)

    def draw(path: Any, p: Parameter) -> jax.Array:
        kind = jnp.float32 if not p.trained else dtype
        if p.init in ("zeros", "ones"):
            return jnp.full(p.shape, 0.0 if p.init == "zeros" else 1.0, kind)
        key = jax.random.fold_in(root, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if p.init == "normal":
            return (p.scale * jax.random.normal(key, p.shape, jnp.float32)).astype(kind)
        fan_in = p.shape[-2]
        # A normal cut at two standard deviations has 0.8796 of its standard deviation left.
        deviation = (p.scale / fan_in) ** 0.5 / 0.87962566103423978
        return (deviation * jax.random.truncated_normal(key, -2.0, 2.0, p.shape, jnp.float32)).astype(kind)

    return jax.tree_util.tree_unflatten(treedef, [draw(path, p) for path, p in paths])
