"""Numbers of a run, a line of JSON a step, and the same for TensorBoard.

A line: `step` (steps done), `nats` (mean cross-entropy per target), `loss` (with the router's weighted losses),
`right` (share of targets guessed), `router` (mean over layers with experts, before coefficients), `gradient_norm`
(before clipping), `learning_rate`, `dropped` (share of assignments), `load` and `rank_load` (largest over mean of
experts and of expert ranks, mean over layers), `seconds`, `tokens_per_s`; after an evaluation `held_out_nats`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.files import write_whole
from simulator.job.job import Job

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def step_record(job: Job, step: int, metrics: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The line of one step from its metrics, fetched; times are added by the run."""
    how = job.training.learning.router
    coefficient = {
        "balance": how.balance_loss, "z": how.z_loss, "importance": how.importance_loss, "load": how.load_loss,
    }  # fmt: skip
    router = {name: float(value) for name, value in metrics["router"].items()}
    nats = float(metrics["loss"])
    return {
        "step": step,
        "loss": nats + sum(coefficient[name] * value for name, value in router.items()),
        "nats": nats,
        "right": float(metrics["right"]),
        "router": {name: value / max(1, layers) for name, value in router.items()},
        "gradient_norm": float(metrics["gradient_norm"]),
        "learning_rate": float(metrics["learning_rate"]),
    }


def not_finite(record: Mapping[str, Any]) -> str | None:
    """`name is nan` for the first of a step's losses and norms that is no finite number."""
    values = {k: record[k] for k in ("nats", "loss", "gradient_norm")}
    for name, value in (values | {f"router {k} loss": v for k, v in record["router"].items()}).items():
        if not math.isfinite(value):
            return f"{'loss' if name == 'nats' else name.replace('_', ' ')} is {value}"
    return None


class MetricsFile:
    """The lines of a run. A killed run leaves whole lines, the last perhaps cut; resuming drops what it does again."""

    def __init__(self, folder: Path, after: int, *, tensorboard: bool = True) -> None:
        self.path = folder / METRICS_FILE
        self._keep(after)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # What a killed run wrote after its last checkpoint is hidden by TensorBoard from here on.
            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=after + 1, flush_secs=30)

    def _keep(self, after: int) -> None:
        kept = [line for line, record in read_lines(self.path) if record["step"] <= after]
        if self.path.exists():
            write_whole(self.path, "".join(kept).encode())

    def write(self, record: Mapping[str, Any], *, board: bool) -> None:
        """Add a step's line, and with `board` its numbers to the event file."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if board and self._board is not None:
            for name, value in flat(record):
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out what is left."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """(name, number) of all numbers, those of sections as `section/name`."""
    out: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            out += flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            out.append((prefix + name, float(value)))
    return out


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(text, record) of the whole lines of a metrics file, in order; QuestionError for another file."""
    if not path.exists():
        return []
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)):
        if not line.endswith("\n"):
            break  # the run was killed while it wrote this one
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise QuestionError(f"{path}, line {number + 1}: not a line of a run's metrics") from None
        out.append((line, record))
    return out
