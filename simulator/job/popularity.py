"""How popular a layer's experts are under the job's model of routing: what simulator and forced routing both follow.

Letters: E experts, K choices, N tokens of the global batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw_profiles.errors import QuestionError
from simulator.job.job import Job, Routing
from simulator.job.model import Moe
from simulator.numbers import Number

if TYPE_CHECKING:
    from collections.abc import Sequence


def chosen_shares(popularity: Number, top_k: int) -> Number:
    """Chance that a token chooses each expert, [..., E]: in proportion to popularity, at most 1, k in all.

    Experts whose share would exceed 1 are chosen by every token; the others share what is left of the k choices.
    """
    import numpy as np

    experts = popularity.shape[-1]
    if top_k >= experts:
        return np.ones_like(popularity)
    # A floor spreads the last choices over the experts that nobody wants, where fewer than k are wanted.
    popularity = np.maximum(popularity, 1e-12 * popularity.max(axis=-1, keepdims=True))
    falling = -np.sort(-popularity, axis=-1)
    tails = np.cumsum(falling[..., ::-1], axis=-1)[..., ::-1]
    left = top_k - np.arange(experts)
    taken = ((left > 0) & (left * falling >= tails)).sum(axis=-1, keepdims=True)
    return np.minimum(1.0, popularity * (top_k - taken) / np.take_along_axis(tails, taken, axis=-1))


def dirichlet_popularity(rng: Any, concentration: float, shape: tuple[int, ...]) -> Number:
    """Popularity of experts, [..., E], in proportion to a draw from Dirichlet(concentration)."""
    import numpy as np

    if concentration >= 0.1:
        return rng.standard_gamma(concentration, shape)
    # Small gamma variates underflow; their logarithms do not (Marsaglia and Tsang 2000, section 6).
    logs = np.log(rng.standard_gamma(concentration + 1, shape)) + np.log1p(-rng.random(shape)) / concentration
    return np.exp(logs - logs.max(axis=-1, keepdims=True))


def layer_shares(rng: Any, routing: Routing, moe: Moe, recorded_E: Number | None = None) -> Number:
    """Chance that a token of a layer chooses each expert, [E], under the model of routing; sums to k.

    `rng` is the layer's NumPy generator, `recorded_E` what was recorded of it, for `replay`.
    """
    import numpy as np

    popularity = np.ones(moe.experts)
    if moe.router.kind == "expert_choice":
        # Experts choose their tokens: every one is exactly full.
        pass
    elif routing.exponent is not None:
        popularity = rng.permutation(np.arange(1.0, moe.experts + 1) ** -routing.exponent)
    elif routing.concentration is not None:
        popularity = dirichlet_popularity(rng, routing.concentration, (moe.experts,))
    elif recorded_E is not None:
        popularity = recorded_E
    return chosen_shares(popularity, moe.top_k)


def layer_generator(seed: int, number: int) -> Any:
    """The NumPy generator of the `number`-th layer with experts, counted from 0 in order of execution."""
    import numpy as np

    return np.random.default_rng([seed, number])


def one_width(moes: Sequence[Moe], field: str, value: str) -> int:
    """Experts of every layer; QuestionError naming the field where layers differ."""
    if len({moe.experts for moe in moes}) > 1:
        raise QuestionError(f"{field} = {value!r:.60}: needs a model whose layers have equally many experts")
    return moes[0].experts


def recorded_counts(job: Job, layers: Sequence[tuple[int, Moe, int]], folder: Path) -> tuple[Number, ...]:
    """Recorded counts, [E], of each layer, given as (number in the model, experts, tokens of a sequence).

    QuestionError for a bad file; `folder` is the job's.
    """
    from simulator.job.recorded import read_counts

    name = job.training.routing.file
    assert name is not None
    experts = one_width([moe for _, moe, _ in layers], "training.routing.file", name)
    sent = [job.batch.sequences * length * moe.top_k for _, moe, length in layers]
    return tuple(read_counts(name, folder, [number for number, _, _ in layers], experts, sent))


def forced_counts(job: Job, folder: Path) -> dict[int, Number]:
    """Assignments of each expert, [E] whole numbers, in a step of forced routing, by the layer's number in the model.

    The shares of the model of routing times the step's tokens, rounded by largest remainders (the earlier expert first
    of equal ones): they sum to N K, and none is above N. Drawn from `training.learning.seed`, as the engine does.
    """
    model, batch = job.model, job.batch
    kinds = [(x.moe, batch.encoder_length) for x in model.encoder_layers]
    kinds += [(x.moe, batch.decoder_length) for x in model.decoder_layers]
    layers = [(i, moe, length) for i, (moe, length) in enumerate(kinds) if moe is not None]
    if not layers:
        return {}
    routing, seed = job.training.routing, job.training.learning.seed
    recorded = recorded_counts(job, layers, folder) if routing.model == "replay" else (None,) * len(layers)
    out = {}
    for i, (number, moe, length) in enumerate(layers):
        shares = layer_shares(layer_generator(seed, i), routing, moe, recorded[i])
        out[number] = whole_counts(shares, batch.sequences * length, moe.top_k)
    return out


def whole_counts(shares_E: Number, tokens: int, top_k: int) -> Number:
    """`tokens` x shares as whole numbers that sum to tokens x k, by largest remainders, each at most `tokens`."""
    import numpy as np

    wanted = tokens * np.asarray(shares_E, dtype=np.float64)
    # A millionth absorbs what shares lose of recorded whole numbers.
    counts = np.floor(wanted + 1e-6)
    left = round(tokens * top_k - counts.sum())
    order = np.argsort(-np.where(counts < tokens, wanted - counts, -1.0), kind="stable")
    counts[order[:left]] += 1
    return counts.astype(np.int64)
