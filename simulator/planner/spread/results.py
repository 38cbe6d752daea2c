"""The results of a search in a folder: a record of the question, a file of plans for every part, and the final table.

    search.json               the question, its hash, the version of this form, how many parts; complete or not
    plans/part-000000.parquet plans of part 0, and its counts; the folder `plans` is a Parquet dataset
    best.parquet              the best and the front of all parts, written last

A part that is there is never searched again. A folder of another version, program or question is refused, never mixed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from hw_profiles.errors import QuestionError
from simulator.planner.kept import Kept
from simulator.planner.outcome import Outcome
from simulator.planner.spread.folder import Folder
from simulator.planner.spread.parquet import decode, encode
from simulator.planner.spread.question import Question

VERSION = "2"
RECORD, PLANS, BEST = "search.json", "plans", "best.parquet"
_PART = re.compile(r"part-(\d{6})\.parquet")


class Results:
    """The results of `question`, some of which may be there already; QuestionError for a folder of anything else.

    `torn` names the files of parts that could not be read, and are searched again.
    """

    def __init__(self, folder: Folder, question: Question, parts: int) -> None:
        self.folder, self.parts, self.rows = folder, parts, 0
        self.hash, self.asked = question.hash, question.asked()
        self.torn: list[str] = []
        if (data := folder.read(RECORD)) is not None:
            check(folder.address, data, self.asked)
            return
        if folder.names():
            raise QuestionError(f"{folder.address}: holds something else: no {RECORD} in it")
        self._record(complete=False)

    def saved(self) -> Iterator[tuple[int, Kept, dict[str, Any]]]:
        """Parts that are there: number, plans, record."""
        for name in self.folder.names(PLANS):
            found = _PART.fullmatch(name)
            if found is None or int(found[1]) >= self.parts:
                continue
            data = self.folder.read(f"{PLANS}/{name}")
            try:
                kept, record = decode(data or b"")
                if (record["part"], record["question"]) != (int(found[1]), self.hash):
                    raise ValueError(name)
            except (ValueError, KeyError):
                # Renames of some file systems are copies, and a copy can be cut short.
                self.torn.append(name)
                continue
            self.rows += len(kept.codes)
            yield int(found[1]), kept, record

    def save(self, part: int, data: bytes) -> tuple[Kept, dict[str, Any]]:
        """Keep a part's file; its plans and record."""
        self.folder.write(f"{PLANS}/part-{part:06d}.parquet", data)
        kept, record = decode(data)
        self.rows += len(kept.codes)
        return kept, record

    def finish(self, outcome: Outcome) -> None:
        """Write the final table, and that the results are whole.

        `rank` counts the best from 1; 0 are plans of the front alone, which follow by memory.
        """
        best, front = outcome.best, outcome.front
        on_front = (best.codes[:, None] == front.codes).all(axis=2).any(axis=1)
        others = front.taken(~(front.codes[:, None] == best.codes).all(axis=2).any(axis=1))
        rank = np.concatenate([np.arange(1, len(best.codes) + 1), np.zeros(len(others.codes), dtype=np.int64)])
        more = {"rank": rank, "on_front": np.concatenate([on_front, np.ones(len(others.codes), dtype=np.bool_)])}
        record = outcome.record() | {"question": self.hash}
        self.folder.write(BEST, encode(best.joined(others.codes, others.numbers), record, more))
        self._record(complete=True)

    def _record(self, complete: bool) -> None:
        record = {"version": VERSION, "question": self.hash, "parts": self.parts, "complete": complete}
        if complete:
            record["rows"] = self.rows
        self.folder.write(RECORD, json.dumps(record | {"asked": self.asked}, indent=2).encode())


def check(address: str, data: bytes, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record of a folder; QuestionError where it is of another version, or of another question than `asked`."""
    try:
        record = json.loads(data)
    except ValueError:
        raise QuestionError(f"{address}/{RECORD}: not JSON") from None
    found = record.get("version") if isinstance(record, dict) else None
    if found != VERSION:
        raise QuestionError(f"{address}: results of version {found!r:.20}; this moecast writes and reads {VERSION!r}")
    theirs = record.get("asked")
    if asked is not None and theirs != json.loads(json.dumps(asked)):
        theirs = theirs if isinstance(theirs, dict) else {}
        differ = [f"{k} {_shown(theirs.get(k))}, here {_shown(v)}" for k, v in asked.items() if _other(theirs, k, v)]
        raise QuestionError(f"{address}: holds the results of another question ({'; '.join(differ[:3])}); name another")
    return dict(record)


def _other(theirs: dict[str, Any], key: str, ours: Any) -> bool:
    return bool(json.dumps(theirs.get(key), sort_keys=True) != json.dumps(ours, sort_keys=True))


def _shown(what: Any) -> str:
    text = "none" if what is None else what if isinstance(what, str) else json.dumps(what)
    return text if len(text) <= 24 else text[:21] + "..."
