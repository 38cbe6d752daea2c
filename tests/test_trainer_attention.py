"""Long sequences: attention in blocks of 512 queries is whole attention, in values and in gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simulator.job.model import Attention
from trainer.attention import BLOCK, Sight, attend, core, relative_bias

# Two blocks and a piece of a third.
LENGTH = 2 * BLOCK + 76
# Documents that end within a block, the second in all of them, and padding at the end.
CUTS = (300, LENGTH - 9, LENGTH)
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal, bias and sinks": {"sinks": True, "bias": True},
    "window below a block, sinks": {"window": 200, "sinks": True},
    "window above a block": {"window": 700},
    "window of one": {"window": 1},
    "chunk below a block": {"chunk": 96},
    "chunk above a block, bias": {"chunk": 800, "bias": True},
    "encoder, bias and sinks": {"causal": False, "bias": True, "sinks": True},
    "cross": {"causal": False, "keys": 90},
}


def places(length: int, cuts: tuple[int, ...]) -> tuple[Any, Any]:
    """Documents [1, S], the last of them padding, and positions that restart with each."""
    starts = np.asarray((0, *cuts[:-1]))
    number = np.searchsorted(np.asarray(cuts), np.arange(length), side="right")
    documents = np.where(number == len(cuts) - 1, 0, number + 1)
    return jnp.asarray(documents)[None], jnp.asarray(np.arange(length) - starts[number])[None]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_queries_are_whole_attention(kind: str) -> None:
    given = dict(KINDS[kind])
    causal, keys = given.pop("causal", True), given.pop("keys", LENGTH)
    biased, sinks = given.pop("bias", False), given.get("sinks", False)
    a = Attention(heads=4, kv_heads=2, head_dim=4, **given)
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    documents, at = places(LENGTH, CUTS)
    theirs, there = (documents, at) if keys == LENGTH else places(keys, (25, keys - 5, keys))
    sight = Sight(documents, theirs, at, there, causal)
    arrays = {"q": normal(1, LENGTH, 2, 2, 4), "k": normal(1, keys, 2, 4), "v": normal(1, keys, 2, 3)}
    arrays |= {"table": normal(32, 4)} if biased else {}
    arrays |= {"sinks": normal(4)} if sinks else {}
    out = normal(1, LENGTH, 12)

    @jax.jit
    def both(x: dict[str, Any]) -> Any:
        def of(x: dict[str, Any], blocks: bool) -> Any:
            bias = relative_bias(x["table"], LENGTH, causal=causal) if biased else None
            if blocks:
                y = attend(a, x["q"], x["k"], x["v"], sight, bias, x.get("sinks"))
            else:
                y = core(x["q"], x["k"], x["v"], sight.mask(a), bias, x.get("sinks"))
            # Where nothing is seen the mean over the keys at hand comes out, and nobody reads it.
            y = jnp.where(sight.mask(a).any(-1)[..., None], y, 0)
            return (y * out).sum(), y

        return [jax.value_and_grad(of, has_aux=True)(x, blocks) for blocks in (True, False)]

    ((_, found), gradients), ((_, wanted), expected) = both(arrays)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, expected[name], atol=1e-5 * float(jnp.abs(expected[name]).max()), err_msg=name)
        # A window of one sees itself alone: only values have a gradient.
        assert (float(jnp.abs(expected[name]).max()) > 1e-3) is (name == "v" or a.window != 1), name
