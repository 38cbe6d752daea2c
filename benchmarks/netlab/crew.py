"""The processes of all hosts, seen from the run: one request to all, one answer from each, and an end to every wait."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.netlab.plan import address, host_name, namespace
from hw_profiles.errors import WorkFailed

PORT = 8476
ROOT = Path(__file__).parents[2]
END_S = 40.0
# Of a host's own words, when it fails.
LAST_LINES = 3


class Crew:
    """One process per host, in its namespace."""

    def __init__(self, hosts: int, scratch: Path) -> None:
        self.hosts, self.scratch = hosts, scratch
        self.workers: list[subprocess.Popen[bytes]] = []
        self._asked = 0

    def start(self) -> None:
        """Start all processes; they meet once the hosts are joined by cables."""
        for i in range(self.hosts):
            command = [
                "ip", "netns", "exec", namespace(host_name(i)), sys.executable, "-m", "benchmarks.netlab.worker",
                str(i), str(self.hosts), f"{address(0)}:{PORT}",
            ]  # fmt: skip
            with self._log(i).open("wb") as log:
                self.workers.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def ask(self, request: dict[str, Any], limit_s: float) -> list[Path]:
        """Send a request to all hosts; the table that each wrote.

        WorkFailed where one ends, or does not answer within `limit_s`.
        """
        self._asked += 1
        asked = range(self.hosts)
        out = [self.scratch / f"{self._asked}-{host_name(i)}.parquet" for i in asked]
        for i, path in zip(asked, out, strict=True):
            pipe = self.workers[i].stdin
            assert pipe is not None
            try:
                pipe.write(json.dumps({**request, "out": str(path)}).encode() + b"\n")
                pipe.flush()
            except BrokenPipeError:
                raise WorkFailed(self._why(i)) from None
        self._wait(asked, time.monotonic() + limit_s, f"{request['do']} of {request['case']}, {limit_s:g} s")
        return out

    def _wait(self, asked: Sequence[int], until: float, what: str) -> None:
        pipes = {i: self.workers[i].stdout for i in asked}
        waiting = {i: pipe for i, pipe in pipes.items() if pipe is not None}
        with selectors.DefaultSelector() as ready:
            for i, pipe in waiting.items():
                ready.register(pipe, selectors.EVENT_READ, i)
            while waiting:
                events = ready.select(max(0.0, until - time.monotonic()))
                if not events:
                    late = ", ".join(host_name(i) for i in waiting)
                    raise WorkFailed(f"{late}: no answer in time ({what}); {self._why(min(waiting))}")
                for key, _ in events:
                    answered = waiting.pop(key.data)
                    ready.unregister(answered)
                    if not answered.readline():
                        raise WorkFailed(self._why(key.data))

    def _log(self, i: int) -> Path:
        return self.scratch / f"{host_name(i)}.log"

    def _why(self, i: int) -> str:
        """The last words of a host."""
        text = self._log(i).read_text(encoding="utf-8", errors="replace")
        ours = [line for line in text.splitlines() if line.startswith("moecast:")]
        last = ours or [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
        return f"{host_name(i)}: {' '.join(' '.join(last).split())[-400:] or 'ended without a word'}"

    def end(self) -> None:
        """Let all leave in their own time, then end those that have not."""
        for worker in self.workers:
            if worker.stdin is not None:
                with suppress(BrokenPipeError):
                    worker.stdin.close()
        until = time.monotonic() + END_S
        for worker in self.workers:
            try:
                worker.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._close()

    def kill(self) -> None:
        """End all now."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
        self._close()

    def _close(self) -> None:
        """Let go of the pipes; what was not read or written any more does not matter."""
        for worker in self.workers:
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()


@contextmanager
def crew(hosts: int, scratch: Path) -> Iterator[Crew]:
    """The processes, which are ended on leaving: gently after success, at once after a failure."""
    found = Crew(hosts, scratch)
    try:
        found.start()
        yield found
    except BaseException:
        found.kill()
        raise
    found.end()
