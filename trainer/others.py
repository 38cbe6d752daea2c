"""What the processes of one measurement tell each other beside JAX's arrays, and where they wait for each other.

It goes through the key-value store of JAX's distributed runtime, which process 0 serves: no shared folder is needed.
Every process calls the same methods in the same order. A process alone waits for nobody and hears itself.
"""

from __future__ import annotations

import importlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import jax

from hw_profiles.errors import QuestionError, WorkFailed
from trainer.processes import Watch, short, working

# Of one process at once, compressed: process 0 holds what all have sent until it has read it.
MOST_BYTES = 64 * 2**20
# The runtime's messages have a limit of their own (4 MiB).
PIECE_BYTES = 2**20
WAIT_S = 900.0
# The others wait while one compiles.
COMPILE_S = 3000.0
T = TypeVar("T")
# Keys and barriers are used once.
_SERIAL = itertools.count()


class Others:
    """The processes of a run, of which this is number `index` of `count`; `watch` bounds waits inside of JAX."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.lead = self.index == 0
        self._watch = watch
        self._client: Any = None
        if self.count > 1:
            self._client = importlib.import_module("jax._src.distributed").global_state.client

    @contextmanager
    def working(self, what: str, limit_s: float = WAIT_S) -> Iterator[None]:
        """Within, JAX may wait for the others: its errors are WorkFailed, and after `limit_s` the process ends."""
        if self._watch is None:
            with working(what):
                yield
            return
        whom = "" if self.count == 1 else "the other processes in "
        with working(what), self._watch.waiting(whom + what, limit_s):
            yield

    def barrier(self, what: str, limit_s: float = WAIT_S) -> None:
        """Return once all have come; WorkFailed, saying what was waited for, where they do not within `limit_s`."""
        if self.count > 1:
            name = self._next()
            self._asked(
                lambda: self._client.wait_at_barrier(name, int(limit_s * 1e3)), what, limit_s, "the other processes"
            )

    def gather(self, what: str, value: Any) -> list[Any]:
        """Every process's `value` (as JSON has it), by process, on process 0; nothing elsewhere.

        WorkFailed where a value has more than `MOST_BYTES`, or does not come within `WAIT_S`.
        """
        if self.count == 1:
            return [value]
        name = self._next()
        if not self.lead:
            self._send(name, what, value)
            return []
        found = [value, *(self._receive(name, what, i) for i in range(1, self.count))]
        self._client.key_value_delete(name)
        return found

    def share(self, what: str, value: Any) -> list[Any]:
        """The same on every process."""
        if self.count == 1:
            return [value]
        name = self._next()
        self._send(name, what, value)
        found = [value if i == self.index else self._receive(name, what, i) for i in range(self.count)]
        self.barrier(what)
        if self.lead:
            self._client.key_value_delete(name)
        return found

    def same(self, asked: Mapping[str, Any]) -> None:
        """QuestionError where another process was asked something else, naming the first thing that differs."""
        for i, other in enumerate(self.share("what each process was asked", asked)):
            for key, value in asked.items():
                if other.get(key) != value:
                    raise QuestionError(f"process {self.index} was asked {key} {value}, process {i} {other.get(key)}")

    def slowest(self, seconds: Sequence[float], what: str) -> list[float]:
        """Of each timing the longest of all processes, on process 0; a process's own elsewhere.

        All have begun together, and what they did has ended when the last has.
        """
        found = self.gather(what, list(seconds)) or [list(seconds)]
        return [max(times) for times in zip(*found, strict=True)]

    def _next(self) -> str:
        return f"moecast/told/{next(_SERIAL)}"

    def _send(self, name: str, what: str, value: Any) -> None:
        packed = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
        if len(packed) > MOST_BYTES:
            raise WorkFailed(
                f"{what}: process {self.index} has {len(packed):,} bytes to send; at most {MOST_BYTES:,} are gathered:"
                " fewer --traced steps may help"
            )
        pieces = [packed[at : at + PIECE_BYTES] for at in range(0, len(packed), PIECE_BYTES)]
        with working(what):
            for i, piece in enumerate(pieces):
                self._client.key_value_set_bytes(f"{name}/{self.index}/{i}", piece)
            self._client.key_value_set_bytes(f"{name}/{self.index}/pieces", str(len(pieces)).encode())

    def _receive(self, name: str, what: str, process: int) -> Any:
        def get(key: str) -> bytes:
            full = f"{name}/{process}/{key}"
            found: bytes = self._asked(
                lambda: self._client.blocking_key_value_get_bytes(full, int(WAIT_S * 1e3)),
                what, WAIT_S, f"process {process}",
            )  # fmt: skip
            return found

        packed = b"".join(get(str(i)) for i in range(int(get("pieces"))))
        return json.loads(zlib.decompress(packed))

    def _asked(self, ask: Callable[[], T], what: str, limit_s: float, whom: str) -> T:
        begun = time.monotonic()
        # The runtime gives up by itself; the watch is for a runtime that does not.
        watched = self._watch.waiting(f"{whom} ({what})", limit_s + 30) if self._watch else nullcontext()
        try:
            with watched:
                return ask()
        except jax.errors.JaxRuntimeError as error:
            waited = time.monotonic() - begun
            raise WorkFailed(
                f"{what}: waited {waited:.0f} s (of at most {limit_s:.0f}) for {whom}: {short(error, 120)}"
            ) from None
