"""Batches without end, the same for every number of processes and threads, to be stopped and resumed at any step.

A batch is a function of the step alone: which examples it holds follows from the seed and the epoch, and their noise
from the seed and their place in the run. grain runs that function ahead of the trainer and keeps the position.

Letters: B batch, S sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.job.job import Job
from trainer.data.corpus import FIELD
from trainer.data.draws import draw_order, make_key
from trainer.data.examples import Examples, load_examples
from trainer.data.packing import Batch

STATE_VERSION = 1
MAX_STEPS = 2**40
BUFFER_PER_THREAD = 2


class BatchMaker:
    """Makes the rows of one process of any global batch.

    Global row i of step n is number n B + i of an endless walk through the epochs, each in an order of its own.
    """

    def __init__(self, examples: Examples, seed: int, sequences: int, rows: range) -> None:
        self._examples = examples
        self._sequences = sequences
        self._rows = rows
        self._order_key = make_key("order", seed)
        self._noise_key = make_key("noise", seed)
        # A batch may span the end of an epoch, and threads may be at work on both sides of it.
        self._order = functools.lru_cache(maxsize=3)(self._draw_order)

    def __call__(self, step: int) -> Batch:
        """The arrays of `step`."""
        number_B = step * self._sequences + np.arange(self._rows.start, self._rows.stop, dtype=np.int64)
        epoch_B, place_B = np.divmod(number_B, self._examples.count)
        example_B = np.empty_like(number_B)
        for epoch in np.unique(epoch_B):
            here_B = epoch_B == epoch
            example_B[here_B] = self._order(int(epoch))[place_B[here_B]]
        return self._examples.make(example_B, self._noise_key, number_B)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        return draw_order(self._order_key, epoch, self._examples.count)


class Batches(Iterator[Batch]):
    """An endless iterator of batches that knows its step and can be put to any other."""

    def __init__(self, maker: BatchMaker, identity: str, examples: Examples, workers: int) -> None:
        import grain

        self.examples = examples
        self._identity = identity
        steps = grain.MapDataset.range(MAX_STEPS).map(maker)
        # Threads, not processes: a batch takes milliseconds of NumPy, and a process would need the text once more.
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=BUFFER_PER_THREAD * workers)
        self._iterator: Any = iter(steps.to_iter_dataset(options))

    @property
    def step(self) -> int:
        """The step that the next batch is for."""
        return int(self._iterator.get_state()["next_index"])

    def __next__(self) -> Batch:
        """The arrays of the next step."""
        batch: Batch = next(self._iterator)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, for JSON; the same in every process of a run."""
        return {"version": STATE_VERSION, "step": self.step, "data": self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` says; QuestionError for a state of other data, seed or batch, or of no known form."""
        step = state.get("step")
        if state.get("version") != STATE_VERSION or type(step) is not int or not 0 <= step < MAX_STEPS:
            raise QuestionError("checkpoint, position in the data: not written by this version of the trainer")
        if state.get("data") != self._identity:
            raise QuestionError(
                "checkpoint, position in the data: belongs to other text, seed, lengths or batch.sequences than the "
                f"job's; resume with those it was written with (without {FIELD}.files, with the same Python as well)"
            )
        self._go(step)

    def close(self) -> None:
        """Stop the threads that make batches ahead."""
        self._iterator.close()

    def _go(self, step: int) -> None:
        self._iterator.set_state({"next_index": step})


def make_batches(
    job: Job,
    folder: Path,
    *,
    split: Literal["train", "held_out"] = "train",
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> Batches:
    """Batches of `job` from `start_step` on, its files looked for in `folder`; this process's rows of each.

    Each batch is a dictionary of int32 arrays, shape (batch.sequences / process_count, length): `tokens_BS` that the
    model reads, `targets_BS` that it is to predict at the same places, `segments_BS`, `positions_BS`, and `weights_BS`,
    1 where there is a target; of an encoder-decoder also `encoder_tokens_BS`, `encoder_segments_BS`,
    `encoder_positions_BS`. `workers` threads make batches ahead (default: the job's; 0: when asked for) and change
    nothing else. Raises QuestionError for data or a vocabulary that cannot serve the job.
    """
    sequences = job.batch.sequences
    if sequences % process_count:
        raise QuestionError(f"batch.sequences = {sequences}: must be a multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index}: must be from 0 to {process_count - 1}")
    if not 0 <= start_step < MAX_STEPS:
        raise ValueError(f"start_step = {start_step}: must be from 0 to {MAX_STEPS - 1}")
    seed = int(seed)  # a NumPy integer would be another key
    examples = load_examples(job, folder, split)
    local = sequences // process_count
    rows = range(process_index * local, (process_index + 1) * local)
    # The two splits get unrelated orders even where their lengths agree.
    identity = f"{split}:{seed}:{sequences}:{examples.fingerprint}"
    threads = job.training.run.workers if workers is None else workers
    batches = Batches(BatchMaker(examples, seed, sequences, rows), identity, examples, threads)
    batches._go(start_step)
    return batches
