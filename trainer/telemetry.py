"""What routers did, per step and layer, in Parquet files.

- `routing.parquet`: step, layer, expert, tokens: assignments that each expert was given before any drop. It is what
  `training.routing: {model: replay}` reads; layers are numbered in the whole model from 0, encoder first.
- `router.parquet`: a row per step and layer: assignments wanted, kept and dropped, per expert as well; mean entropy of
  the router (nats); root mean square and largest size of its logits; largest over mean load, of experts and of ranks.

Parts of both are written to `telemetry/` as the run goes, each whole and renamed into place, so that a run killed at
any time leaves readable files, and a resumed one drops the parts it does again. The two files are made of the newest
parts, up to `MOST_ROWS` rows.

Letters: L layers (of one report), E experts, R expert ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.files import write_whole
from trainer.model import segments, stack_layers, stacks

if TYPE_CHECKING:
    from simulator.job.job import Job
    from simulator.job.rules import Degrees

ROUTING_FILE, ROUTER_FILE, PARTS = "routing.parquet", "router.parquet", "telemetry"
# The newest steps tell most about what is to come, and whoever replays the file reads all of it.
MOST_ROWS = 2_000_000
# A part is written at every checkpoint, and where this many rows wait for one.
PART_ROWS = 200_000


@dataclass(frozen=True)
class LayerSeen:
    """What the router of one layer did in one step; counts are assignments (tokens x choices)."""

    step: int
    layer: int
    wanted_E: NDArray[np.int64]
    kept_E: NDArray[np.int64]
    entropy_nats: float
    logit_rms: float
    logit_largest: float
    load: float
    rank_load: float

    @property
    def dropped(self) -> int:
        """Assignments that found no slot."""
        return int(self.wanted_E.sum() - self.kept_E.sum())


def layer_numbers(job: Job, degrees: Degrees) -> dict[str, list[NDArray[np.int64]]]:
    """For each stack, the numbers in the model of the layers that each report of a step's metrics stacks."""
    out: dict[str, list[NDArray[np.int64]]] = {}
    first = 0
    for stack in stacks(job.model):
        layers = stack_layers(job, degrees, stack)
        stage_P = first + np.arange(degrees.pipeline)[:, None] * len(layers)
        found = []
        for segment in segments(layers):
            period = len(segment.period)
            for i, layer in enumerate(segment.period):
                if layer.moe is not None:
                    # Stages are gathered outermost.
                    found.append((stage_P + segment.first + i + period * np.arange(segment.count)).reshape(-1))
        out[stack] = found
        first += len(job.model.encoder_layers if stack == "encoder" else job.model.decoder_layers)
    return out


def seen_layers(
    step: int, experts: Mapping[str, Any], numbers: Mapping[str, Sequence[NDArray[np.int64]]], ranks: int
) -> list[LayerSeen]:
    """The layers' reports of one step, by number, from `experts` of its fetched metrics."""
    out = []
    for stack, reports in experts.items():
        for numbers_L, seen in zip(numbers[stack], reports, strict=True):
            wanted_LE = np.rint(np.asarray(seen["wanted_E"], np.float64)).astype(np.int64)
            kept_LE = np.rint(np.asarray(seen["kept_E"], np.float64)).astype(np.int64)
            tokens_L = np.maximum(np.asarray(seen["tokens"], np.float64), 1)
            entropy_L = np.asarray(seen["entropy"], np.float64) / tokens_L
            rms_L = np.sqrt(np.asarray(seen["logit_squares"], np.float64) / tokens_L)
            largest_L = np.asarray(seen["largest_logit"], np.float64)
            for i, number in enumerate(numbers_L):
                wanted_E = wanted_LE[i].reshape(-1)
                out.append(
                    LayerSeen(
                        step, int(number), wanted_E, kept_LE[i].reshape(-1), float(entropy_L[i]), float(rms_L[i]),
                        float(largest_L[i]), imbalance(wanted_E, len(wanted_E)), imbalance(wanted_E, ranks),
                    )
                )  # fmt: skip
    return sorted(out, key=lambda x: x.layer)


def imbalance(wanted_E: NDArray[np.int64], ranks: int) -> float:
    """The largest load of `ranks` ranks, each with as many neighbouring experts, over their mean; 1 when even."""
    load_R = wanted_E.reshape(ranks, -1).sum(-1)
    return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0


def summary(seen: Sequence[LayerSeen]) -> dict[str, float]:
    """Of one step: share of assignments dropped, and largest over mean load, mean over layers."""
    wanted = sum(int(x.wanted_E.sum()) for x in seen)
    return {
        "dropped": sum(x.dropped for x in seen) / max(1, wanted),
        "load": float(np.mean([x.load for x in seen])),
        "rank_load": float(np.mean([x.rank_load for x in seen])),
    }


class Telemetry:
    """Gathers what routers did and writes it into the run's folder."""

    def __init__(self, folder: Path, after: int) -> None:
        self._folder = folder
        self._parts = folder / PARTS
        self._waiting: list[LayerSeen] = []
        self._parts.mkdir(exist_ok=True)
        for stray in self._parts.glob(".*.part"):
            stray.unlink()
        for name in (ROUTING_FILE, ROUTER_FILE):
            for first, path in self._written(name):
                table = _read(path)
                if table is None or first > after:
                    path.unlink()
                elif table["step"].to_numpy().max() > after:
                    _write(path, table.filter(table["step"].to_numpy() <= after))

    def add(self, seen: Sequence[LayerSeen]) -> None:
        """Take in the layers of one step."""
        self._waiting += seen
        if sum(len(x.wanted_E) for x in self._waiting) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a part."""
        if self._waiting:
            step = self._waiting[0].step
            for name, table in ((ROUTING_FILE, _routing(self._waiting)), (ROUTER_FILE, _router(self._waiting))):
                _write(self._parts / f"{Path(name).stem}-{step:08d}.parquet", table)
            self._waiting = []

    def publish(self) -> None:
        """Write what waits, and make the two files anew."""
        self.flush()
        for name in (ROUTING_FILE, ROUTER_FILE):
            tables: list[Any] = []
            for _, path in reversed(self._written(name)):
                table = _read(path)
                if table is None:
                    break
                if sum(t.num_rows for t in tables) + table.num_rows > MOST_ROWS and tables:
                    break
                tables.append(table)
            if tables:
                _write(self._folder / name, *reversed(tables))

    def _written(self, name: str) -> list[tuple[int, Path]]:
        """(first step, path) of the parts of `name`, in order."""
        out = []
        for path in self._parts.glob(f"{Path(name).stem}-*.parquet"):
            with contextlib.suppress(ValueError):
                out.append((int(path.stem.rpartition("-")[2]), path))
        return sorted(out)


def write_routing(path: Path, seen: Sequence[LayerSeen]) -> None:
    """Tokens per expert of all layers and steps seen, as `training.routing: {model: replay}` reads them."""
    _write(path, _routing(seen))


def _arrow(name: str = "") -> Any:
    return importlib.import_module(f"pyarrow{name}")


def _routing(seen: Sequence[LayerSeen]) -> Any:
    counts = [len(x.wanted_E) for x in seen]
    columns = {
        "step": np.repeat([x.step for x in seen], counts),
        "layer": np.repeat([x.layer for x in seen], counts),
        "expert": np.concatenate([np.arange(n) for n in counts]),
        "tokens": np.concatenate([x.wanted_E for x in seen]),
    }
    return _arrow().table({name: np.asarray(value, np.int64) for name, value in columns.items()})


def _router(seen: Sequence[LayerSeen]) -> Any:
    pa = _arrow()
    whole = {"step": [x.step for x in seen], "layer": [x.layer for x in seen]}
    whole |= {
        "wanted": [int(x.wanted_E.sum()) for x in seen],
        "kept": [int(x.kept_E.sum()) for x in seen],
        "dropped": [x.dropped for x in seen],
    }
    real = {
        name: [getattr(x, name) for x in seen]
        for name in ("entropy_nats", "logit_rms", "logit_largest", "load", "rank_load")
    }
    lists = {name: [getattr(x, name).tolist() for x in seen] for name in ("wanted_E", "kept_E")}
    return pa.table(
        {k: pa.array(v, pa.int64()) for k, v in whole.items()}
        | {k: pa.array(v, pa.float64()) for k, v in real.items()}
        | {k: pa.array(v, pa.list_(pa.int64())) for k, v in lists.items()}
    )


def _write(path: Path, *tables: Any) -> None:
    """The tables, a row group each, as one file that is there whole or not at all."""
    out = io.BytesIO()
    with _arrow(".parquet").ParquetWriter(out, tables[0].schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    write_whole(path, out.getvalue())


def _read(path: Path) -> Any:
    """The table in a part; None for a damaged one."""
    try:
        table = _arrow(".parquet").ParquetFile(path).read()
    except (OSError, ValueError, TypeError, NotImplementedError):
        return None
    return table if table.num_rows and "step" in table.column_names else None
