"""Several processes of one run, and a bound on every wait.

JAX recognises SLURM, GKE and TPU pods itself. Elsewhere `--coordinator HOST:PORT --process I --processes N` say who is
who. Nothing listens beyond the loopback unless the user names another address.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from hw_profiles.errors import QuestionError, WorkFailed

# JAX ends a process whose peer has been silent for so long; a process that was killed is noticed at once.
HEARTBEAT_S = 20
JOIN_S = 120
LEAVE_S = 30
FAILED = 4
LOOPBACK = "127.0.0.1"
STOP_KEY = "moecast/stop"
# From a parent: the number of an open file, a colon, the parent's process number; and how much of the file is used.
WAITS = "MOECAST_WAITS"
WAITS_BYTES = 400
# Steps from one process's dispatch that the others cannot have passed: each fetches step n - 1 before dispatching
# n + 1, and that one needs everybody's part.
LEAD_STEPS = 4


@dataclass(frozen=True)
class Address:
    """Where the processes of a run meet; `host` is an address or a name."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """`HOST:PORT` (the host may be left out: the loopback); QuestionError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 2**16 or any(c.isspace() for c in host):
        raise QuestionError(f"--coordinator {text!r:.60}: write it as HOST:PORT, such as {LOOPBACK}:8476")
    return Address(host or LOOPBACK, int(port))


def join(address: Address, process: int, processes: int, heartbeat_s: int = HEARTBEAT_S) -> None:
    """Meet the other processes; WorkFailed where they do not all come within `JOIN_S` seconds.

    JAX ends a process whose peer has been silent for `heartbeat_s`.
    """
    import jax

    where = f"{address.host}:{address.port}"
    # The service of preemption notices would take SIGTERM, which here means: save and stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _meeting(f"the {processes} processes to meet at {where}"):
            jax.distributed.initialize(
                where, processes, process, coordinator_bind_address=where, cluster_detection_method="deactivate",
                initialization_timeout=JOIN_S, heartbeat_timeout_seconds=heartbeat_s, shutdown_timeout_seconds=LEAVE_S,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise WorkFailed(
            f"process {process} of {processes}: the others were not met at {where} within {JOIN_S} s: {short(error)}"
        ) from None
    if address.loopback:
        _collectives_on_loopback()


def join_recognised() -> None:
    """Meet the other processes where a cluster's environment tells JAX who they are; else nothing."""
    import jax

    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _meeting("the other processes to come"):
            jax.distributed.initialize(
                initialization_timeout=JOIN_S, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=LEAVE_S
            )
    except ValueError:
        return  # JAX knows of no cluster here: one process
    except RuntimeError as error:
        raise WorkFailed(f"the other processes were not met within {JOIN_S} s: {short(error)}") from None


@contextmanager
def _meeting(what: str) -> Iterator[None]:
    """Within, `JOIN_S` seconds may pass: JAX's own end is later and says nothing of it."""
    watch = Watch()
    try:
        with watch.waiting(what, JOIN_S):
            yield
    finally:
        watch.close()


def _collectives_on_loopback() -> None:
    """Have gloo, which carries collectives between CPU processes, listen on the loopback, not on the host's name."""
    # JAX has no public setting for it.
    bridge: Any = importlib.import_module("jax._src.xla_bridge")
    state: Any = importlib.import_module("jax._src.distributed").global_state
    make: Any = importlib.import_module("jaxlib._jax").make_gloo_tcp_collectives

    def client() -> Any:
        return bridge.make_cpu_client(collectives=make(distributed_client=state.client, hostname=LOOPBACK))

    bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)


def leave() -> None:
    """Part from the other processes at the end of a run."""
    import jax

    if jax.process_count() > 1:
        try:
            jax.distributed.shutdown()
        except RuntimeError as error:
            raise WorkFailed(f"waited {LEAVE_S} s for the other processes to end: {short(error)}") from None


class StopSignal:
    """A wish to stop that all processes follow at the same step."""

    def __init__(self) -> None:
        import jax

        self.asked = False
        self._lead = jax.process_index() == 0
        self._client: Any = None
        if jax.process_count() > 1:
            self._client = importlib.import_module("jax._src.distributed").global_state.client

    def due(self, done: int) -> bool:
        """Whether to stop after `done` steps, of which the last has been dispatched but not waited for."""
        if self._client is None:
            return self.asked
        if self.asked and not self._read("asked"):
            self._client.key_value_set(f"{STOP_KEY}/asked", "1", allow_overwrite=True)
        at = self._read("at")
        if self._lead and at is None and self._read("asked"):
            at = str(done + LEAD_STEPS)
            self._client.key_value_set(f"{STOP_KEY}/at", at, allow_overwrite=True)
        return at is not None and done >= int(at)

    def _read(self, name: str) -> str | None:
        import jax

        try:
            value: str = self._client.key_value_try_get(f"{STOP_KEY}/{name}")
        except jax.errors.JaxRuntimeError:
            return None
        return value


def agree(number: int) -> int:
    """Process 0's number, in all processes."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Errors of JAX within as WorkFailed, one line that begins with `what`."""
    import jax

    try:
        yield
    except (QuestionError, WorkFailed):
        raise
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        if jax.process_count() > 1:
            raise WorkFailed(f"{what}: another process has ended or cannot be reached: {short(error)}") from None
        raise WorkFailed(f"{what}: {short(error)}") from None


def give_up(text: str) -> NoReturn:
    """End this process now, from whatever thread, with one line and exit code 4."""
    sys.stderr.write(f"\nmoecast: {text}\n")
    sys.stderr.flush()
    os._exit(FAILED)


class Watch:
    """Ends the process when a wait takes longer than it may: waits inside of JAX cannot be interrupted otherwise.

    What is being waited for is written to the file that `WAITS` names, for a parent to say it if JAX ends the process.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._waits: dict[int, tuple[float, float, str]] = {}
        self._parent = parent
        # The file is open in a child of that parent only.
        file, _, whose = os.environ.get(WAITS, "").partition(":")
        self._told = int(file) if whose == str(os.getppid()) else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, what: str, limit_s: float) -> Iterator[None]:
        """Within, at most `limit_s` seconds may pass; else the process ends with a line that names `what`."""
        key = object()
        self._waits[id(key)] = (time.monotonic(), limit_s, what)
        try:
            yield
        finally:
            self._waits.pop(id(key), None)

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            now = time.monotonic()
            waits = list(self._waits.values())
            for begun, limit_s, what in waits:
                if now > begun + limit_s:
                    give_up(f"waited {limit_s:.0f} s for {what}: gave up")
            if self._told is not None:
                said = [f"it had waited {now - begun:.0f} s for {what}" for begun, _, what in waits]
                # Of fixed length, so that nothing of a longer one is left.
                os.pwrite(self._told, "; ".join(said).encode()[:WAITS_BYTES].ljust(WAITS_BYTES), 0)
            # A worker whose supervisor was killed would go on unseen.
            if self._parent is not None and os.getppid() != self._parent:
                give_up("the process that started this one is gone")


def short(error: BaseException, length: int = 200) -> str:
    """The first words of an error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
