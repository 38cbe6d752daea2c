"""From a job to its examples: one object that makes any of them, in any order.

Letters: B batch, S sequence, R raw tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.job.job import Job
from trainer.data.corpus import FIELD
from trainer.data.packing import Batch, Pieces, causal_batch, cut, take
from trainer.data.span_corruption import Noise, Shape, draw_noise, fit_shape, span_batch
from trainer.data.stream import Split, Stream, load_corpus
from trainer.data.tokenizer import Tokenizer, check_vocabulary


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split of a job's text; `shape` and `noise` are None for a causal objective.

    `fingerprint` is the SHA-256 of the text's tokens and of all that shapes the examples.
    """

    stream: Stream
    tokenizer: Tokenizer
    pieces: Pieces
    length: int
    vocab: int
    noise: Noise | None
    shape: Shape | None
    fingerprint: str

    @property
    def count(self) -> int:
        """Examples in an epoch."""
        return self.pieces.count

    def make(self, example_B: NDArray[np.int64], key: int, row_B: NDArray[np.int64]) -> Batch:
        """Arrays of the numbered examples; the noise of each is drawn from `key` and its number in `row_B`."""
        start_B, length_B = self.pieces.start_E[example_B], self.pieces.length_E[example_B]
        if self.shape is None or self.noise is None:
            return causal_batch(self.stream, self.tokenizer, start_B, length_B, self.length)
        raw_BR = take(self.stream, start_B, length_B, self.shape.raw)
        noise_BR = draw_noise(self.noise, length_B, self.shape.raw, key, row_B)
        return span_batch(raw_BR, length_B, noise_BR, self.shape, self.tokenizer, self.vocab)


def load_examples(job: Job, folder: Path, split: Split) -> Examples:
    """The examples of `split` for `job`, whose files lie in `folder`.

    Raises QuestionError, one line naming field, value and rule, for data that cannot serve the job.
    """
    data, batch = job.training.learning.data, job.batch
    objective = data.objective or ("span_corruption" if batch.encoder_length else "causal")
    if (objective == "span_corruption") != bool(batch.encoder_length):
        kind = "is an encoder-decoder; it learns span_corruption"
        if not batch.encoder_length:
            kind = "has no encoder; it learns causal"
        raise QuestionError(f"{FIELD}.objective = {objective}: {job.model.name} {kind}")
    noise, shape = None, None
    if objective == "span_corruption":
        noise = Noise(data.noise_density, data.mean_span)
        shape = fit_shape(noise, batch.encoder_length, batch.decoder_length)
    corpus = load_corpus(data, folder)
    check_vocabulary(corpus.tokenizer, shape.spans if shape else 0, job.model.vocab)
    stream = corpus.split(split)
    length = shape.raw if shape else batch.decoder_length
    # Unpacked, eos follows from the end of the inputs and targets of each example.
    pieces = cut(stream, length, packed=data.packed, with_eos=shape is None or data.packed)
    shaping = {
        "tokens": stream.digest,
        "tokenizer": [corpus.tokenizer.size, corpus.tokenizer.pad, corpus.tokenizer.eos, corpus.tokenizer.bos],
        "objective": objective,
        "length": [batch.encoder_length, batch.decoder_length],
        "noise": [data.noise_density, data.mean_span, job.model.vocab] if shape else None,
        "packed": data.packed,
    }
    fingerprint = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    return Examples(stream, corpus.tokenizer, pieces, length, job.model.vocab, noise, shape, fingerprint)
