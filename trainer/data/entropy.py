"""What a model that only counts would score on a job's text: the marks a training loss is read against.

Letters: N pairs of tokens, V vocabulary, K symbols that occur.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulator.job.job import Job
from trainer.data.draws import make_key
from trainer.data.examples import Examples, load_examples
from trainer.data.stream import load_corpus

ROWS_AT_A_TIME = 256
MAX_TARGETS = 2**25
DENSE_PAIRS = 2**22


@dataclass(frozen=True)
class Entropies:
    """Nats per target token, `weights_BS` = 1 only.

    Of the training text, plug-in (what its own counts give): `unigram_nats` is H(target), `bigram_nats` is
    H(target | the token read at its place, which is the target before it). Of the held-out text, cross-entropies
    under counts of the training text: `held_out_unigram_nats` with one added to every count of the model's
    vocabulary, `held_out_bigram_nats` interpolated with that (Witten and Bell 1991); None where nothing is held out.
    A loss in nats per token below them means more has been learnt than how frequent tokens and pairs are.
    """

    unigram_nats: float
    bigram_nats: float
    held_out_unigram_nats: float | None
    held_out_bigram_nats: float | None
    train_targets: int
    held_out_targets: int


def corpus_entropies(job: Job, folder: Path, *, seed: int = 0) -> Entropies:
    """Entropies of the targets of `job`, from one pass over each split (at most 2^25 targets, from its beginning).

    For span corruption these are of the decoder's targets, sentinels included, under the noise of one epoch. Raises
    QuestionError as `make_batches` does.
    """
    train = _pairs(load_examples(job, folder, "train"), seed)
    held_out = None
    if load_corpus(job.training.learning.data, folder).held_out.documents:
        held_out = _pairs(load_examples(job, folder, "held_out"), seed)
    return measure_entropies(*train, held_out=held_out, vocab=job.model.vocab)


def measure_entropies(
    read_N: NDArray[np.int64],
    target_N: NDArray[np.int64],
    *,
    held_out: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    vocab: int,
) -> Entropies:
    """Entropies of pairs of a token read and its target, ids below `vocab`; `held_out` are such pairs too.

    With counts c: H1 = log n - 1/n sum c(t) log c(t), H2 = 1/n (sum c(r) log c(r) - sum c(r,t) log c(r,t)).
    """
    total = len(target_N)
    target_V = np.bincount(target_N, minlength=vocab)
    read_V = np.bincount(read_N, minlength=vocab)
    pairs = _PairCounts(read_N, target_N, vocab)
    h1 = np.log(total) - _sum_c_log_c(target_V) / total
    h2 = (_sum_c_log_c(read_V) - _sum_c_log_c(pairs.count_N)) / total
    if held_out is None:
        return Entropies(float(h1), float(h2), None, None, total, 0)
    unigram_V = (target_V + 1) / (total + vocab)
    read_H, target_H = held_out
    # Witten and Bell, IEEE Trans. Inf. Theory 37(4), 1991, method C, as Chen and Goodman (1999), section 2.4 write it:
    # P(t | r) = (c(r, t) + kinds(r) P(t)) / (c(r) + kinds(r)); after a token never read, P(t).
    kinds_V = np.bincount(pairs.key_N // vocab, minlength=vocab)
    chance_H = unigram_V[target_H]
    weight_H = (read_V + kinds_V)[read_H]
    seen_H = np.maximum(weight_H, 1)
    bigram_H = np.where(weight_H > 0, (pairs.count(read_H, target_H) + kinds_V[read_H] * chance_H) / seen_H, chance_H)
    return Entropies(
        unigram_nats=float(h1),
        bigram_nats=float(h2),
        held_out_unigram_nats=float(-np.log(chance_H).mean()),
        held_out_bigram_nats=float(-np.log(bigram_H).mean()),
        train_targets=total,
        held_out_targets=len(target_H),
    )


class _PairCounts:
    """How often each pair (read, target) occurs: sorted keys read x V + target, and counts."""

    def __init__(self, read_N: NDArray[np.int64], target_N: NDArray[np.int64], vocab: int) -> None:
        self._vocab = vocab
        key_N = read_N * vocab + target_N
        if vocab * vocab <= DENSE_PAIRS:
            dense = np.bincount(key_N, minlength=vocab * vocab)
            self.key_N = np.nonzero(dense)[0]
            self.count_N = dense[self.key_N]
        else:
            self.key_N, self.count_N = np.unique(key_N, return_counts=True)

    def count(self, read_H: NDArray[np.int64], target_H: NDArray[np.int64]) -> NDArray[np.int64]:
        """count_H of the pairs; 0 for one that never occurred."""
        key_H = read_H * self._vocab + target_H
        place_H = np.minimum(np.searchsorted(self.key_N, key_H), len(self.key_N) - 1)
        return np.where(self.key_N[place_H] == key_H, self.count_N[place_H], 0)


def _sum_c_log_c(count_K: NDArray[np.int64]) -> float:
    found_K = count_K[count_K > 0].astype(np.float64)
    return float(np.sum(found_K * np.log(found_K)))


def _pairs(examples: Examples, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(read_N, target_N) at all places of weight 1 of one epoch."""
    parts = list(_bounded(examples, make_key("entropy", seed)))
    return np.concatenate([read for read, _ in parts]), np.concatenate([target for _, target in parts])


def _bounded(examples: Examples, key: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    seen = 0
    for first in range(0, examples.count, ROWS_AT_A_TIME):
        row_B = np.arange(first, min(first + ROWS_AT_A_TIME, examples.count), dtype=np.int64)
        batch = examples.make(row_B, key, row_B)
        counts_BS = batch["weights_BS"] == 1
        yield batch["tokens_BS"][counts_BS].astype(np.int64), batch["targets_BS"][counts_BS].astype(np.int64)
        seen += int(counts_BS.sum())
        if seen >= MAX_TARGETS:
            return
