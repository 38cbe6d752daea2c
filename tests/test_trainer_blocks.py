"""Dropless experts in blocks: the loop over experts is the oracle; as many blocks run as hold tokens, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.job.rules import rows_per_block
from trainer.blocks import _loop, by_blocks, order_by_expert
from trainer.hlo import HloError, read_text
from trainer.hlo_walk import BY_TOKENS

E, R, D, F, B = 4, 40, 6, 10, 8
DRAW = np.random.default_rng(0)
UP, DOWN, BIAS = (jnp.asarray(DRAW.normal(size=s), jnp.float32) for s in ((E, D, F), (E, F, D), (E, F)))
ROWS, GATE, OUT = (jnp.asarray(DRAW.normal(size=s), jnp.float32) for s in ((R, D), (R,), (R, D)))


def owners(counts: tuple[int, ...]) -> Any:
    """owner_R with so many rows of each expert, the rest empty, in no order."""
    owner = np.repeat([*range(E), E], [*counts, R - sum(counts)])
    return jnp.asarray(np.random.default_rng(1).permutation(owner), jnp.int32)


def network(w: Any, x: Any, gate: Any, numbers: Any, key: Any) -> Any:
    """One expert: a bias before the activation, so that a row of zeros is none inside."""
    del numbers, key
    return (jax.nn.silu(x @ w["up"] + w["bias"]) * gate[:, None]) @ w["down"]


def in_blocks(weights: Any, rows: Any, gate: Any, owner: Any) -> Any:
    """The rows through their experts, in blocks."""
    return by_blocks(network, B, "experts", weights, rows, gate, None, None, order_by_expert(owner, E, B))


def one_by_one(weights: Any, rows: Any, gate: Any, owner: Any) -> Any:
    """The oracle: every expert sees every row, and its own count."""
    out = jnp.zeros_like(rows)
    for e in range(E):
        y = network(jax.tree.map(lambda w, e=e: w[e], weights), rows, gate, None, None)
        out = out + jnp.where((owner == e)[:, None], y, 0)
    return out


# Even; all at one, at the last; none at some; whole blocks, one row more and one less; nothing at all; no empty rows.
COUNTS = [(10, 10, 10, 10), (40, 0, 0, 0), (0, 0, 0, 33), (0, 9, 0, 7), (8, 16, 8, 8), (1, 7, 8, 9), (0, 0, 0, 0)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_blocks_are_the_loop_over_experts_in_values_and_gradients(counts: tuple[int, ...]) -> None:
    weights, owner = {"up": UP, "down": DOWN, "bias": BIAS}, owners(counts)

    def both(way: Callable[..., Any]) -> Any:
        def loss(*a: Any) -> Any:
            y = way(*a, owner)
            return (y * OUT).sum() + jnp.square(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(weights, ROWS, GATE)

    ((_, y), gradients), ((_, expected), oracle) = both(in_blocks), both(one_by_one)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(y)[np.asarray(owner) == E], 0)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(oracle), strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1.0, float(jnp.abs(wanted).max())))
    assert (max(float(jnp.abs(g).max()) for g in jax.tree.leaves(oracle)) > 0.1) is (sum(counts) > 0)


def run_blocks(counts: tuple[int, ...]) -> list[int]:
    """How many blocks the loop ran for each expert."""

    def work(shared: Any, own: Any, w: Any, index_B: Any, at: Any) -> Any:
        del w, index_B, at
        return shared, own + 1

    order = order_by_expert(owners(counts), E, B)
    _, ran = jax.jit(lambda o: _loop(o, B, UP, (), lambda w: jnp.int32(0), work))(order)
    return [int(n) for n in ran]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_as_many_blocks_run_as_hold_rows(counts: tuple[int, ...]) -> None:
    assert run_blocks(counts) == [-(-n // B) for n in counts]


@given(st.floats(1, 1e7))
def test_a_block_is_a_power_of_two_and_no_longer_than_an_experts_mean(mean: float) -> None:
    block = rows_per_block(mean)
    assert block in (8, 16, 32, 64, 128) and (block <= mean or block == 8) and (2 * block > mean or block == 128)
    assert rows_per_block(np.array([mean]))[0] == block


def test_the_order_of_arrival_changes_no_row() -> None:
    weights, owner, run = {"up": UP, "down": DOWN, "bias": BIAS}, owners((3, 9, 0, 17)), jax.jit(in_blocks)
    expected = run(weights, ROWS, GATE, owner)
    for seed in range(10):
        at = np.random.default_rng(seed).permutation(R)
        # A row is at another place of its block, whose products may add up in another order.
        np.testing.assert_allclose(run(weights, ROWS[at], GATE[at], owner[at]), expected[at], atol=1e-5)


def test_a_program_says_which_loops_the_tokens_end() -> None:
    weights, owner = {"up": UP, "down": DOWN, "bias": BIAS}, owners((10, 10, 10, 10))
    program = read_text(jax.jit(in_blocks).lower(weights, ROWS, GATE, owner).compile().as_text(), "cpu")
    assert program.flops.total == 0 and len(program.flops.uncounted) == 1
    assert next(iter(program.flops.uncounted)).startswith("loop by tokens ")

    def bare(x: Any, n: Any) -> Any:
        return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ UP[0] @ DOWN[0]), (0, x))[1]

    text = jax.jit(bare).lower(ROWS, 3).compile().as_text()
    # Only what says so is let through: a loop that nobody explains is an error as before.
    assert BY_TOKENS not in text
    with pytest.raises(HloError, match="how often it runs"):
        read_text(text, "cpu")
