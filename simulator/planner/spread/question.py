"""The question of a search as text: all that decides its answer, down to the program that works it out.

Workers get this text and a part's number, never objects; they validate it anew, and refuse that of another program.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from hw_profiles.errors import QuestionError, WorkFailed
from hw_profiles.loader import resolve_cluster
from hw_profiles.schema import Chip
from hw_profiles.validation import validate
from simulator.job.job import Job
from simulator.job.model import Count, Section
from simulator.planner.constraints import parse_constraint
from simulator.planner.parts import PLANS_PER_PART
from simulator.planner.search import OBJECTIVES, Search
from simulator.planner.space import Space
from simulator.planner.table import CHOICES, FIELDS

# Folders whose files decide an answer: the formulas, and the numbers that they rest on.
_FOLDERS = ("hw_profiles", "simulator")
_SUFFIXES = (".py", ".yaml", ".yml", ".json", ".csv")


@cache
def program() -> dict[str, str]:
    """This moecast: versions, and a SHA-256 of the files that decide an answer, which tells two checkouts apart.

    NumPy and pyarrow are in it because other versions may round, or lay out the same table, in another way.
    """
    root = Path(__file__).parents[3]
    found = hashlib.sha256()
    for path in sorted(p for f in _FOLDERS for p in (root / f).rglob("*") if p.suffix in _SUFFIXES):
        data = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(data)}\n".encode())
        found.update(data)
    return {name: version(name) for name in ("moecast", "numpy", "pyarrow")} | {"files": found.hexdigest()[:16]}


class Question(Section):
    """A search: the job and what is asked of it. `chip` replaces the shipped profile; `space` are codes of values."""

    job: Job
    chip: Chip | None = None
    space: dict[str, tuple[int, ...]]
    objective: str = "step_time"
    constraints: tuple[str, ...] = ()
    top: Count = 20
    exhaustive: bool = False
    keep: Literal["best", "all"] = "best"
    plans_per_part: Count = PLANS_PER_PART

    def search(self) -> Search:
        """The search; QuestionError for what cannot be asked."""
        if list(self.space) != list(FIELDS):
            raise QuestionError("the space of a search has not the fields of this moecast")
        for name, codes in self.space.items():
            if not codes or min(codes) < 0 or max(codes) >= len(CHOICES.get(name, range(1 << 31))):
                raise QuestionError(f"the space of a search: {name}: a code is out of range")
        if self.objective not in OBJECTIVES:
            raise QuestionError(f"the objective of a search: {self.objective!r:.40}: none of {', '.join(OBJECTIVES)}")
        return Search(
            self.job,
            resolve_cluster(self.job.cluster, chip=self.chip),
            Space(self.space),
            objective=self.objective,
            constraints=[parse_constraint(text) for text in self.constraints],
            top=self.top,
            exhaustive=self.exhaustive or self.keep == "all",
            plans_per_part=self.plans_per_part,
        )

    def asked(self) -> dict[str, Any]:
        """What two searches must have in common to share their parts, as a folder's record has it."""
        plain = self.model_dump(mode="json", exclude={"job", "chip"})
        chip = None if self.chip is None else _digest(self.chip.model_dump(mode="json"))
        return {**program(), "job": self.job.hash, "profile": chip, **plain}

    @property
    def hash(self) -> str:
        """SHA-256 of what is asked."""
        return _digest(self.asked())

    def text(self) -> str:
        """The question as JSON, with the program that asks."""
        return json.dumps({"program": program(), "question": self.model_dump(mode="json")})


def question_of(text: str, who: str) -> Question:
    """The question in a text; WorkFailed, naming `who` read it, if another program asks."""
    data = json.loads(text)
    theirs, ours = data["program"], program()
    if theirs != ours:
        differ = [f"its {k} {ours[k]}, not {theirs.get(k)}" for k in ours if theirs.get(k) != ours[k]]
        raise WorkFailed(f"{who} has another moecast than this one: {'; '.join(differ)}; install the same")
    return validate(Question, data["question"], "the question of a search")


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
