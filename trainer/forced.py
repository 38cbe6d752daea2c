"""Forced routing: tokens go where the job's model of routing sends them, and not where their router would.

Every step each expert of a layer gets exactly the counts of `simulator.job.popularity.forced_counts`. Which tokens it
gets is fixed by their numbers, so that any number of devices sees the same. Lay the experts on a line of N K places,
each as long as its count. The j-th choice of the token of number q stands at q + j N: since no count is above N, a
token's K choices are K experts, and since every place is taken once, counts are exact (Madow 1949, systematic
sampling). Token s of sequence b has the number g(s) B + b: the places of a sequence are B apart, so that of any
sequence, and so of any device and microbatch, each expert gets its share within one token a sequence.

Letters: L layers of the model, E experts, G groups, N tokens (of the global batch, of a group in arrays), K choices, B
sequences of the global batch, S tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hw_profiles.errors import QuestionError
from trainer.setting import TOKENS, Noise

if TYPE_CHECKING:
    from simulator.job.job import Job

Array = jax.Array


@dataclass(frozen=True, eq=False)
class Forced:
    """Where on the line the experts of each layer end, `end_LE` (N K for experts that a layer has not)."""

    end_LE: np.ndarray[Any, np.dtype[np.int32]]
    sequences: int

    @classmethod
    def of(cls, job: Job, counts: Mapping[int, Any]) -> Forced:
        """From the counts of each layer with experts, by its number in the model; QuestionError for too many tokens."""
        longest = max(job.batch.encoder_length, job.batch.decoder_length)
        if longest > TOKENS:
            raise QuestionError(f"batch.length = {longest}: routing is forced on sequences of at most {TOKENS} tokens")
        if max((sum(map(int, c)) for c in counts.values()), default=0) >= 2**31:
            raise QuestionError(f"batch.sequences = {job.batch.sequences}: forced choices are numbered with 31 bits")
        layers = len(job.model.encoder_layers) + len(job.model.decoder_layers)
        end_LE = np.zeros((layers, max(map(len, counts.values()), default=1)), np.int32)
        for number, counts_E in counts.items():
            end_LE[number] = sum(counts_E)
            end_LE[number, : len(counts_E)] = np.cumsum(counts_E)
        return cls(end_LE, job.batch.sequences)

    def experts(self, noise: Noise, token_GN: Array, length: int, top_k: int) -> Array:
        """expert_GNK of tokens with these numbers, in sequences of `length`, in the layer of `noise`."""
        sequence, position = token_GN // TOKENS, token_GN % TOKENS
        number = position * spread(length) % length * self.sequences + sequence
        place = number[..., None] + jnp.arange(top_k) * (self.sequences * length)
        end_E = jnp.asarray(self.end_LE)[noise.layer]
        return jnp.searchsorted(end_E, place, side="right").astype(jnp.int32)


def spread(length: int) -> int:
    """The step from one token to the next of a sequence: prime to its length, and near its golden section.

    Neighbours then go to other experts, and each part of a sequence sees all of them.
    """
    step = max(1, round(length * 0.6180339887))
    return next(s for s in range(step, 0, -1) if math.gcd(s, length) == 1)
