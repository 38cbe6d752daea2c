"""Workers on this machine: processes that take one part at a time, replaced when they die.

A pool of our own because the standard library's gives up altogether when one of its processes is killed, and does not
say which task that one had.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait

from hw_profiles.errors import QuestionError, WorkFailed
from simulator.planner.spread.runner import Runner, Tries
from simulator.planner.spread.work import work

Work = Callable[[str, int], bytes]
# A part takes seconds: a worker that is silent for so long has hung.
PART_LIMIT_S = 600.0
_DONE, _FAILED, _REFUSED = b"d", b"f", b"r"


class _Worker:
    """A process and our end of its pipe."""

    def __init__(self, text: str, do: Work) -> None:
        # Spawned, not forked: a fork would hold the pipes of its siblings open, and none would see the driver die.
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, text, do), daemon=True)
        self.process.start()
        theirs.close()
        self.part: int | None = None
        self.since = 0.0

    def give(self, part: int) -> None:
        """Hand it a part."""
        self.part, self.since = part, time.monotonic()
        # Where it has died, its pipe says so when the answer is read.
        with contextlib.suppress(OSError):
            self.ours.send_bytes(str(part).encode())

    def answer(self) -> bytes:
        """What it says; nothing where it has died."""
        try:
            return self.ours.recv_bytes()
        except (EOFError, OSError):
            return b""

    def end(self) -> str:
        """Stop it, whatever it does; how it ended."""
        self.ours.close()
        self.process.kill()
        self.process.join(10)
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def serve(conn: Connection, text: str, do: Work) -> None:
    """A worker: parts in by number, files out, until the driver is gone."""
    # An interruption is the driver's to handle; it reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            part = int(conn.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer = _DONE + do(text, part)
        except (QuestionError, WorkFailed) as error:
            answer = _REFUSED + json.dumps([isinstance(error, QuestionError), str(error)]).encode()
        except Exception as error:
            answer = _FAILED + f"{type(error).__name__}: {error}".encode()
        try:
            conn.send_bytes(answer)
        except OSError:
            return


def local(workers: int, do: Work = work, limit_s: float = PART_LIMIT_S) -> Runner:
    """A runner of `workers` processes: parts as they are done, in any order.

    WorkFailed for a part that failed three times; that its worker died, or was silent for `limit_s`, counts.
    """

    def run(text: str, parts: Sequence[int]) -> Generator[tuple[int, bytes], None, None]:
        todo, tries = deque(parts), Tries()
        crew = [_Worker(text, do) for _ in range(min(workers, len(parts)))]
        try:
            while todo or any(w.part is not None for w in crew):
                for w in crew:
                    if w.part is None and todo:
                        w.give(todo.popleft())
                busy = [w for w in crew if w.part is not None]
                ready = wait([w.ours for w in busy], timeout=1.0)
                for w in busy:
                    late = time.monotonic() - w.since > limit_s
                    if w.ours not in ready and not late:
                        continue
                    part, w.part = w.part, None
                    assert part is not None
                    answer = w.answer() if w.ours in ready else b""
                    if answer[:1] == _DONE:
                        yield part, answer[1:]
                        continue
                    if answer:
                        why = _refused(answer)
                    else:
                        crew.remove(w)
                        ended = w.end()
                        why = f"a worker was silent for {limit_s:g} s" if late else f"its worker ended with {ended}"
                        crew.append(_Worker(text, do))
                    tries.failed(part, why)
                    todo.append(part)
        finally:
            for w in crew:
                w.end()

    return run


def _refused(answer: bytes) -> str:
    """Why a part failed; the error itself where no other worker would do better."""
    said = answer[1:].decode()
    if answer[:1] == _REFUSED:
        wrong, text = json.loads(said)
        raise (QuestionError if wrong else WorkFailed)(text)
    return said
