"""The entropies that a loss is held against: by hand, as chances that sum to one, and of a job's own targets."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import corpus_entropies, make_batches
from trainer.data.entropy import measure_entropies
from trainer_texts import make_job, rows_of, write_texts


def test_entropies_by_hand() -> None:
    # Targets a b a c: reads ^ a b a. H1 of (2, 1, 1)/4 is 1.5 bits; only after a (2 of 4) is there one bit to guess.
    a, b, c, start = 0, 1, 2, 3
    found = measure_entropies(
        np.array([start, a, b, a]), np.array([a, b, a, c]), held_out=(np.array([start, a]), np.array([a, a])), vocab=5
    )
    assert found.unigram_nats == pytest.approx(1.5 * math.log(2), rel=1e-12)
    assert found.bigram_nats == pytest.approx(0.5 * math.log(2), rel=1e-12)
    # Add one: P(a) = 3/9. After ^, seen once with one kind: (1 + 1/3)/2 = 2/3. After a, twice, two kinds: (0 + 2/3)/4.
    assert found.held_out_unigram_nats == pytest.approx(math.log(3), rel=1e-12)
    assert found.held_out_bigram_nats == pytest.approx(-(math.log(2 / 3) + math.log(1 / 6)) / 2, rel=1e-12)
    assert (found.train_targets, found.held_out_targets) == (4, 2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(6, 3000))
def test_smoothed_chances_sum_to_one(ids: list[int], vocab: int) -> None:
    read, target = np.array([0, *ids[:-1]]), np.array(ids)
    for context in range(7 if vocab > 6 else 6):
        chances = []
        for token in range(min(vocab, 6)):
            held_out = (np.array([context]), np.array([token]))
            found = measure_entropies(read, target, held_out=held_out, vocab=vocab)
            assert found.held_out_bigram_nats is not None
            chances.append(math.exp(-found.held_out_bigram_nats))
            last = (np.array([context]), np.array([vocab - 1]))
        rest = measure_entropies(read, target, held_out=last, vocab=vocab).held_out_bigram_nats
        assert rest is not None
        others = max(vocab - 6, 0) * math.exp(-rest)
        assert sum(chances) + others == pytest.approx(1, rel=1e-9)
        assert -1e-12 <= found.bigram_nats <= found.unigram_nats + 1e-12


@pytest.mark.parametrize("encoder", [False, True])
def test_entropies_of_a_job_are_of_its_targets(tmp_path: Path, encoder: bool) -> None:
    texts = write_texts(tmp_path)
    job = make_job(encoder=encoder, sequences=1, files=["texts.jsonl"], vocab=3000)
    found = corpus_entropies(job, texts)
    batches = make_batches(job, texts, seed=0)
    counts: Counter[int] = Counter()
    for batch in rows_of(batches, batches.examples.count):
        counts.update(batch["targets_BS"][batch["weights_BS"] == 1].tolist())
    total = counts.total()
    assert found.train_targets == total
    plug_in = -sum(n / total * math.log(n / total) for n in counts.values())
    # Other noise hides other letters, so of some 400 targets of span corruption the counts agree roughly.
    assert found.unigram_nats == pytest.approx(plug_in, rel=0.1 if encoder else 1e-12)
    assert found.bigram_nats < found.unigram_nats
    assert found.held_out_targets > 0 and found.held_out_unigram_nats is not None
