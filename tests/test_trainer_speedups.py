"""The faster forms of the trainer give what the plain ones give: sorts of pairs, and networks on rows.

Letters: G groups, N tokens of a group, K choices, E experts, T tokens, D hidden, F ffn hidden.
"""

from __future__ import annotations

import numpy as np
import pytest

from trainer import routing


@pytest.mark.parametrize("values", [7, 2**29])
def test_pairs_are_sorted_by_key_then_by_value_whether_or_not_one_number_holds_both(values: int) -> None:
    draw = np.random.default_rng(0)
    key = draw.integers(0, 5, (3, 40)).astype(np.int32)
    value = draw.integers(0, values, (3, 40)).astype(np.int32)
    got = routing.sort_pairs(key, value, 5, values)
    for row in range(3):
        pairs = sorted(zip(key[row].tolist(), value[row].tolist(), strict=True))
        assert list(zip(got[0][row].tolist(), got[1][row].tolist(), strict=True)) == pairs


@pytest.mark.parametrize("priority", [False, True])
def test_seats_are_those_that_tokens_find_one_by_one(priority: bool) -> None:
    groups, tokens, k, experts, capacity = 3, 32, 2, 5, 6
    draw = np.random.default_rng(1)
    expert = draw.integers(0, experts, (groups, tokens, k)).astype(np.int32)
    made = draw.random(expert.shape) < 0.8
    sure = draw.random((groups, tokens)).astype(np.float32)
    gate = np.ones(expert.shape, np.float32)
    choices = routing.Choices(expert, gate, made, np.zeros((groups, tokens, experts), np.float32))
    got = routing.assign_slots(choices, experts, capacity, sure if priority else None)
    for g in range(groups):
        place = np.full((tokens, k), experts * capacity)
        seats: list[list[int]] = [[] for _ in range(experts)]
        for j in range(k):
            for n in np.argsort(-sure[g], kind="stable") if priority else range(tokens):
                taken = seats[expert[g, n, j]]
                if made[g, n, j] and len(taken) < capacity:
                    place[n, j] = expert[g, n, j] * capacity + len(taken)
                    taken.append(n * k + j)
        empty = [s + [tokens * k] * (capacity - len(s)) for s in seats]
        np.testing.assert_array_equal(got.place_GNK[g], place)
        np.testing.assert_array_equal(got.choice_GEC[g], empty)
