"""How long the trainer waits for a batch of text, and what counting alone would score on it.

Prints, for a decoder-only model and an encoder-decoder on Python's standard library as bytes: the corpus, the time to
set up, the median, 99th percentile and maximum time of a batch of 64 sequences of 256 tokens in one thread (target:
median below 5 ms), and the entropies. Usage: python benchmarks/bench_data.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from simulator.job.job import Job
from simulator.job.load import job_from_mapping
from trainer.data import corpus_entropies, load_corpus, make_batches

BATCHES, TARGET_S = 500, 5e-3
LENGTHS: dict[str, Any] = {"mixtral-8x7b": 256, "switch-base-128": {"encoder": 256, "decoder": 64}}


def make_job(model: str) -> Job:
    """A job with a vocabulary of bytes and 100 more ids, as T5 has sentinels."""
    return job_from_mapping(
        {
            "model": {"preset": model, "vocab": 384},
            "cluster": {"chip": "cpu-host", "devices": 1},
            "batch": {"sequences": 64, "length": LENGTHS[model]},
        }
    )


def main() -> None:
    for model in LENGTHS:
        job = make_job(model)
        begin = time.perf_counter()
        batches = make_batches(job, Path(), seed=0, workers=0)
        print(f"{model}: {load_corpus(job.training.learning.data, Path()).describe()}")
        print(f"  set up in {time.perf_counter() - begin:.2f} s, {batches.examples.count:,} examples an epoch")
        next(batches)
        times = []
        for _ in range(BATCHES):
            begin = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - begin)
        median_s, most_s = float(np.median(times)), max(times)
        verdict = "below" if median_s < TARGET_S else "ABOVE"
        print(
            f"  a batch: median {median_s * 1e3:.2f} ms ({verdict} {TARGET_S * 1e3:.0f} ms), "
            f"99 % within {np.quantile(times, 0.99) * 1e3:.2f} ms, at most {most_s * 1e3:.2f} ms"
        )
        begin = time.perf_counter()
        print(f"  {corpus_entropies(job, Path())} in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
