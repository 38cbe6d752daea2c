"""Batches of a job's data as global arrays on the trainer's devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from hw_profiles.errors import QuestionError
from trainer.data import Batches, make_batches

if TYPE_CHECKING:
    from simulator.job.job import Job
    from trainer.step import Trainer


def rows_here(trainer: Trainer) -> range:
    """The rows of a global batch that this process's devices hold."""
    shape = trainer.batch_shapes()["sequence_B"]
    held = [
        index[0].indices(shape.shape[0])
        for index in shape.sharding.addressable_devices_indices_map(shape.shape).values()
    ]
    first, last = min(h[0] for h in held), max(h[1] for h in held)
    if len({row for h in held for row in range(h[0], h[1])}) != last - first or first % (last - first):
        raise QuestionError("plan: splits the batch over processes in a way the trainer does not serve")
    return range(first, last)


def batches_here(job: Job, folder: Path, rows: range, split: Any, seed: int, workers: int | None = None) -> Batches:
    """This process's part of every batch; `workers` as `make_batches` has it."""
    index, count = rows.start // len(rows), job.batch.sequences // len(rows)
    return make_batches(job, folder, split=split, seed=seed, process_index=index, process_count=count, workers=workers)


def placed(shapes: Mapping[str, Any], rows: range, batch: Mapping[str, Any]) -> dict[str, Any]:
    """This process's rows as parts of the global arrays."""
    local = {**batch, "sequence_B": np.arange(rows.start, rows.stop, dtype=np.int32)}
    return {
        name: jax.make_array_from_process_local_data(like.sharding, local[name], like.shape)
        for name, like in shapes.items()
    }


class Placer:
    """The training batches of a job, one after the other, on the devices.

    Each is made when it is asked for: threads that made the next ones ahead would take cores from the step that is
    being timed, milliseconds of one device's in every step.
    """

    def __init__(self, job: Job, folder: Path, trainer: Trainer) -> None:
        self.rows, self.shapes = rows_here(trainer), trainer.batch_shapes()
        self._batches = batches_here(job, folder, self.rows, "train", job.training.learning.seed, workers=0)

    def next(self) -> dict[str, Any]:
        """The next batch."""
        return placed(self.shapes, self.rows, next(self._batches))

    def close(self) -> None:
        """End what reads ahead."""
        self._batches.close()
