"""What every part of the model needs to know: the job, its mesh, number formats, and the noise of this step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.mesh import Axes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from simulator.job.job import Job
    from simulator.job.rules import Degrees
    from trainer.forced import Forced

Array = jax.Array
# Room for the tokens of a sequence in the numbers of tokens.
TOKENS = 2**14


@dataclass(frozen=True)
class Setting:
    """The unchanging frame of a step: inside of `shard_map`, where every device sees its own part of each array."""

    job: Job
    degrees: Degrees
    axes: Axes
    compute: Any
    platform: str
    train: bool = True
    stack: str = "decoder"
    forced: Forced | None = None

    def inside(self, stack: str) -> Setting:
        """The same for the layers of `stack`, which gives scopes their first word."""
        return replace(self, stack=stack)

    def scope(self, name: str) -> AbstractContextManager[Any]:
        """A named scope of this stack, such as `decoder.moe.router`; the simulator's op has the same name."""
        return jax.named_scope(f"{self.stack}.{name}")

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        """Axes over which the residual stream's sequence is split."""
        return self.axes.tensor if self.job.plan.sequence_parallel else ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Random numbers that belong to tokens, not to devices: the same on one device as on eight.

    `token_BS` numbers the tokens of the global batch (`TOKENS` x sequence + position); every draw folds a token's
    number into the key of step and layer. `layer` is the layer's number in the model.
    """

    key: Array
    token_BS: Array
    layer: Array | int = 0

    def at(self, index: Array | int) -> Noise:
        """The noise of layer `index`."""
        return Noise(jax.random.fold_in(self.key, index), self.token_BS, index)

    def uniform(
        self, name: int, shape: tuple[int, ...], token: Array | None = None, part: Array | None = None
    ) -> Array:
        """Numbers in [0, 1), [tokens..., *shape]; `name` tells draws of one layer apart, `part` those of one token."""
        return self._draw(name, token, lambda k: jax.random.uniform(k, shape), part)

    def normal(self, name: int, shape: tuple[int, ...], token: Array | None = None) -> Array:
        """Standard normal numbers, [tokens..., *shape]."""
        return self._draw(name, token, lambda k: jax.random.normal(k, shape))

    def _draw(self, name: int, token: Array | None, draw: Any, part: Array | None = None) -> Array:
        key = jax.random.fold_in(self.key, name)
        numbers = self.token_BS if token is None else token
        parts = jnp.zeros_like(numbers) if part is None else part

        def one(t: Array, i: Array) -> Array:
            own = jax.random.fold_in(key, t)
            return draw(own if part is None else jax.random.fold_in(own, i))

        flat = jax.vmap(one)(numbers.reshape(-1), parts.reshape(-1))
        return flat.reshape(*numbers.shape, *flat.shape[1:])


def dropped(x: Array, rate: float, noise: Noise | None, name: int) -> Array:
    """Dropout: `x` [B, S, D] with a share `rate` set to zero and the rest scaled up; without noise, `x` as it is."""
    if rate == 0 or noise is None:
        return x
    keep = noise.uniform(name, (x.shape[-1],)) >= rate
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def expert_dropout(s: Setting, noise: Noise, token: Array, part: Array) -> Callable[[Array], Array]:
    """Dropout inside of experts, at their hidden layer (Switch Transformer, arXiv:2101.03961, section 4.1).

    `token` and `part` number the rows [...] of hidden states [..., F]; slices of an expert drop their own part of F.
    """
    rate = s.job.training.learning.expert_dropout or 0.0
    slices = s.axes.expert_tensor

    def drop(h: Array) -> Array:
        width = h.shape[-1] * s.axes.size(slices)
        keep = noise.uniform(25, (width,), token, part) >= rate
        if slices:
            keep = lax.dynamic_slice_in_dim(keep, lax.axis_index(slices) * h.shape[-1], h.shape[-1], keep.ndim - 1)
        return jnp.where(keep, h / (1 - rate), 0).astype(h.dtype)

    return drop


def axes_of(x: Array) -> frozenset[str]:
    """The mesh axes along which `x` differs between devices, as its type says."""
    out: frozenset[str] = jax.typeof(x).manual_axis_type.varying
    return out


def varying(x: Array, axes: tuple[str, ...]) -> Array:
    """`x` marked as differing along `axes`; a no-op for those along which it already does."""
    missing = tuple(a for a in axes if a not in axes_of(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros_like(x: Array, dtype: Any = None) -> Array:
    """Zeros that differ along the same mesh axes as `x`, as a loop's first value must."""
    return varying(jnp.zeros(x.shape, dtype or x.dtype), tuple(axes_of(x)))


def numbered(count: int) -> Iterator[int]:
    """0, 1, 2 ...: names for the draws of a layer."""
    return iter(range(count))
