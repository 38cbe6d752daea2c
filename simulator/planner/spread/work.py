"""What a worker does: one part of a question, from text to the bytes of a file."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from simulator.planner.kept import Kept
from simulator.planner.search import Search
from simulator.planner.spread.parquet import encode
from simulator.planner.spread.question import Question, question_of

# A search remembers collectives and pipelines from part to part, and is no matter for two threads at once.
_mine = threading.local()


def work(text: str, part: int) -> bytes:
    """Part `part` of the question in `text`; WorkFailed if another program asks it, QuestionError if it is none."""
    if getattr(_mine, "text", None) != text:
        question = question_of(text, f"a worker on {socket.gethostname()} (process {os.getpid()})")
        _mine.question, _mine.search = question, question.search()
        _mine.hash, _mine.text = question.hash, text
    return found(_mine.question, _mine.search, _mine.hash, part)


def found(question: Question, search: Search, of: str, part: int) -> bytes:
    """Part `part` as a file: its feasible plans, or its best and front; its counts; the hash that it is `of`."""
    if question.keep == "all":
        plans = Kept()
        held: list[Kept] = []
        out = search.part(part, held.append)
        if held:
            plans = joined(held)
    else:
        out = search.part(part)
        plans = out.winners.rows()
    record: dict[str, Any] = out.record() | {"part": part, "question": of}
    return encode(plans, record)


def joined(several: list[Kept]) -> Kept:
    """All plans of some, one after the other."""
    import numpy as np

    return Kept(np.concatenate([k.codes for k in several]), np.concatenate([k.numbers for k in several]))
