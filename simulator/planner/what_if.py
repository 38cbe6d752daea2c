"""Grids: every combination of some values, each a forecast; what a rule refuses stays, with the rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from simulator.analysis.forecast import forecast_on
from simulator.job.job import Job
from simulator.job.load import job_from_mapping
from simulator.planner.vary import Axis
from simulator.results.forecast import Forecast
from simulator.results.whatif import Cell, Grid

# A minute by formulas, and some minutes by events.
MOST_CELLS = {"closed-form": 10_000, "events": 500}
# Degrees beside which the data degree follows, as in a search: a fixed one would refuse every other value.
_FREES_DATA = ("plan.tensor", "plan.context", "plan.pipeline", "cluster")


@dataclass(frozen=True, slots=True)
class Question:
    """A job before it is read: its mapping, changes after `--set`, a chip profile, the folder of its files."""

    data: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    chip: Chip | None = None
    folder: Path = Path()
    name: str = "job"

    def job(self, more: Sequence[str] = ()) -> Job:
        """The job with `more` changes; QuestionError where it breaks a rule."""
        changes = [*self.changes, *more]
        return job_from_mapping(dict(self.data), overrides=changes, folder=self.folder, where="", name=self.name)

    def forecast(
        self, more: Sequence[str] = (), numbers: Mapping[str, str | float] | None = None, engine: str = "closed-form"
    ) -> Forecast:
        """Its forecast with `more` changes and other numbers of the chip."""
        job = self.job(more)
        cluster = resolve_cluster(job.cluster, numbers, self.chip)
        return forecast_on(job, cluster, "what if", engine, folder=self.folder)


def what_if(
    question: Question,
    axes: Sequence[Axis],
    engine: str = "closed-form",
    progress: Callable[[int, int], None] | None = None,
) -> Grid:
    """The full grid of `axes`, the last changing fastest.

    QuestionError where two axes are one field, where the grid is too large, or where every cell is refused.
    """
    names = [a.field for a in axes]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise QuestionError(f"--vary {twice}: given twice; list its values in one")
    count = math.prod(len(a.shown) for a in axes)
    if count > MOST_CELLS[engine]:
        raise QuestionError(f"--vary: {count:,} cells; at most {MOST_CELLS[engine]:,} with --engine {engine}")
    free = any(n.startswith(_FREES_DATA) and not n.startswith("cluster.chip.") for n in names)
    first = ("plan.data=null",) if free and "plan.data" not in names else ()
    base = question.forecast(engine=engine)
    cells = []
    for i, which in enumerate(product(*(range(len(a.shown)) for a in axes))):
        chosen = list(zip(axes, which, strict=True))
        values = {a.field: a.shown[k] for a, k in chosen}
        sets = [*first, *(text for a, k in chosen for text in a.sets[k])]
        numbers = {path: v for a, k in chosen for path, v in a.chip[k].items()}
        try:
            cells.append(cell_of(values, question.forecast(sets, numbers, engine)))
        except QuestionError as error:
            said = str(error).removeprefix(": ")
            if said.startswith("--set"):
                raise QuestionError(said.replace("--set", "--vary", 1)) from None
            cells.append(Cell(values, refused=said))
        if progress is not None:
            progress(i + 1, count)
    if all(c.refused for c in cells):
        raise QuestionError(f"--vary: no cell of {count:,} keeps the rules; the first: {cells[0].refused}")
    shown = {a.field: a.shown for a in axes}
    return Grid(base.job.name, base.job.cluster, engine, shown, cell_of({}, base), tuple(cells))


def cell_of(values: dict[str, Any], f: Forecast) -> Cell:
    """A forecast as a cell."""
    return Cell(
        values=values,
        step_time_s=f.step_time_s,
        memory_peak_bytes=f.memory.peak_bytes,
        fits=f.memory.fits,
        mfu=f.mfu,
        tokens_per_s_per_device=f.tokens_per_s_per_device,
        all_to_all_exposed_s=f.all_to_all.exposed_s,
        usd_per_1b_tokens=f.cost.usd_per_1b_tokens,
    )
