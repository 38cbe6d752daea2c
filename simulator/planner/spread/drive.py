"""The driver: what is saved is read, what is missing is worked out by a runner, and all is joined."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing

from hw_profiles.errors import WorkFailed
from simulator.planner.outcome import Outcome
from simulator.planner.search import Progress, Search
from simulator.planner.spread.parquet import decode
from simulator.planner.spread.question import Question
from simulator.planner.spread.results import Results
from simulator.planner.spread.runner import Runner
from simulator.planner.spread.work import found


def here(question: Question, search: Search) -> Runner:
    """A runner in this very process."""

    def run(text: str, parts: Sequence[int]) -> Generator[tuple[int, bytes], None, None]:
        of = question.hash
        for part in parts:
            yield part, found(question, search, of, part)

    return run


def spread(
    question: Question,
    search: Search,
    runner: Runner,
    results: Results | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Search by `runner`, and keep every part in `results` as it comes; parts that are there are not searched again.

    QuestionError where nothing is left; WorkFailed where the work failed, with how much of it is saved. The outcome is
    the same for every runner, number of workers, order and interruption.
    """
    begin = time.perf_counter()
    whole, done, total = search.nothing(), 0, search.space.count
    missing = dict.fromkeys(range(search.parts.count))

    def tell(part: int | None) -> None:
        nonlocal done
        done += 0 if part is None else search.parts.size(part)
        if progress is not None:
            progress(done, total)

    if results is not None:
        for part, kept, record in results.saved():
            whole.add(kept, record)
            done += search.parts.size(part)
            del missing[part]
    tell(None)
    try:
        with closing(runner(question.text(), list(missing)) if missing else _nothing()) as answers:
            for part, data in answers:
                del missing[part]
                whole.add(*(decode(data) if results is None else results.save(part, data)))
                tell(part)
    except WorkFailed as error:
        if results is None:
            raise
        saved = search.parts.count - len(missing)
        raise WorkFailed(
            f"{error}; {saved:,} of {search.parts.count:,} parts are saved in {results.folder.address}, and the same"
            " command goes on from there"
        ) from None
    whole = search.finished(whole, begin)
    if results is not None:
        results.finish(whole)
    return whole


def _nothing() -> Generator[tuple[int, bytes], None, None]:
    """A runner that has nothing to do."""
    yield from ()
