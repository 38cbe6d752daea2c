"""Workers of a Dask scheduler that somebody runs: parts as tasks, taken back where a worker is lost.

Dask pickles what it sends between its own processes, and a client unpickles what comes back: a scheduler must be one
that is trusted. Of ours only a text and a number go out, and bytes of a file come back.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from hw_profiles.errors import QuestionError, WorkFailed
from simulator.planner.spread.runner import Runner, Tries
from simulator.planner.spread.work import work

_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
CONNECT_S, WORKERS_S, PART_LIMIT_S = 10.0, 30.0, 600.0
# How often the scheduler is asked about its workers while nothing is done.
_LOOK_S = 2.0


def check_address(address: str) -> None:
    """QuestionError for what is no address of a scheduler."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[3]) < 65536:
        raise QuestionError(f"--scheduler {address!r:.80}: write it as tcp://HOST:PORT, such as tcp://127.0.0.1:8786")


def on_dask(
    address: str, *, connect_s: float = CONNECT_S, workers_s: float = WORKERS_S, limit_s: float = PART_LIMIT_S
) -> Runner:
    """A runner on the scheduler at `address`: parts as they are done, in any order.

    QuestionError without the library; WorkFailed, naming what was waited for, for a scheduler that does not answer in
    `connect_s`, for none of its workers being there for `workers_s`, and for a part that failed three times, more than
    `limit_s` without any part done included.
    """
    check_address(address)
    distributed = _library()

    def run(text: str, parts: Sequence[int]) -> Generator[tuple[int, bytes], None, None]:
        # What goes wrong is told below, in one line; the library would log pages.
        for name in [n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "distributed"]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            client = distributed.Client(address, timeout=connect_s, set_as_default=False)
        except OSError:
            raise WorkFailed(
                f"--scheduler {address}: no scheduler answered in {connect_s:g} s; start one with: dask scheduler"
            ) from None
        try:
            yield from _Crew(distributed, client, address, workers_s, limit_s).run(text, parts)
        finally:
            with contextlib.suppress(Exception):
                client.close(timeout=5)

    return run


class _Crew:
    """One search on a connected client."""

    def __init__(self, distributed: Any, client: Any, address: str, workers_s: float, limit_s: float) -> None:
        self.distributed, self.client, self.address = distributed, client, address
        self.workers_s, self.limit_s = workers_s, limit_s
        self.seen = self.last = time.monotonic()

    def run(self, text: str, parts: Sequence[int]) -> Generator[tuple[int, bytes], None, None]:
        """Parts as they are done; twice as many are out as there are threads, so that no worker waits for us."""
        todo, tries = deque(parts), Tries()
        out: dict[Any, int] = {}
        self.seen = self.last = time.monotonic()
        threads = self._threads()
        while todo or out:
            while todo and len(out) < 2 * max(1, threads):
                part = todo.popleft()
                out[self._submit(text, part)] = part
            done = self._wait(list(out))
            for future in done:
                part = out.pop(future)
                data = self._answer(future, part, tries)
                if data is None:
                    todo.append(part)
                    continue
                self.seen = self.last = time.monotonic()
                yield part, data
            if not done:
                threads = self._threads()
                if time.monotonic() - self.last > self.limit_s:
                    named = ", ".join(map(str, sorted(out.values())[:4]))
                    raise WorkFailed(f"{self.address}: waited {self.limit_s:g} s for parts {named}; none was done")

    def _submit(self, text: str, part: int) -> Any:
        try:
            return self.client.submit(work, text, part, pure=False, key=None)
        except self.distributed.client.ClosedClientError:
            raise WorkFailed(f"--scheduler {self.address}: it has gone, and has not come back") from None

    def _wait(self, futures: list[Any]) -> list[Any]:
        """Futures that are done, or lost, after a while at most."""
        with self.client.as_current(), contextlib.suppress(TimeoutError, self.distributed.CancelledError):
            self.distributed.wait(futures, timeout=_LOOK_S, return_when="FIRST_COMPLETED")
        return [f for f in futures if f.status in ("finished", "error", "cancelled")]

    def _answer(self, future: Any, part: int, tries: Tries) -> bytes | None:
        """A part's file; None where it must be done again."""
        try:
            return bytes(future.result(timeout=self.workers_s))
        except (QuestionError, WorkFailed):
            raise
        except self.distributed.CancelledError:
            # Its scheduler forgot it, in starting anew or in going: no fault of the part.
            self._threads()
            time.sleep(0.5)
        except self.distributed.KilledWorker as error:
            said = " ".join(str(error).split())
            raise WorkFailed(f"part {part} of the search: its workers died: {said:.300}") from None
        except Exception as error:
            tries.failed(part, f"{type(error).__name__}: {' '.join(str(error).split()):.200}")
        return None

    def _threads(self) -> int:
        """Threads of the workers that are there; WorkFailed where there was none for too long."""
        try:
            info = self.client.sync(self.client.scheduler.identity, n_workers=-1, callback_timeout=5)
            threads = sum(w["nthreads"] for w in info["workers"].values())
        except Exception:
            threads, missing = 0, "the scheduler has not answered"
        else:
            missing = f"there was no worker; start some with: dask worker {self.address}"
        now = time.monotonic()
        if threads:
            self.seen = now
        elif now - self.seen > self.workers_s:
            raise WorkFailed(f"--scheduler {self.address}: for {self.workers_s:g} s {missing}")
        return int(threads)


def _library() -> Any:
    try:
        import distributed
    except ImportError:
        raise QuestionError("--scheduler: needs Dask, which is not here: pip install 'moecast[dask]'") from None
    return distributed
