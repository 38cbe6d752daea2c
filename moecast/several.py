"""Several processes of one command: who is who, a child that does the work, and how all of them end.

JAX's devices are fixed when it starts, and it ends its process with a signal when another process of the run dies: the
work is done in a child, and its parent says what became of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hw_profiles.errors import QuestionError, WorkFailed

if TYPE_CHECKING:
    from trainer.processes import Address

Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where several processes meet; process 0 listens there. Under SLURM, Open MPI and on TPU pods leave this"
        " and the next two out: JAX knows.",
    ),
]
Process = Annotated[int | None, typer.Option(min=0, metavar="I", help="Which of the processes this is.")]
Processes = Annotated[int | None, typer.Option(min=1, metavar="N", help="How many processes there are.")]


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is; `address` is None where it is alone, or JAX recognises the cluster."""

    address: Address | None
    process: int
    count: int

    @property
    def several(self) -> bool:
        """Whether this process has to meet others, or one was asked to wait for them."""
        return self.address is not None or self.count > 1

    def divides(self, devices: int) -> None:
        """QuestionError where the processes cannot share `devices` equally."""
        if devices % self.count:
            raise QuestionError(f"--processes {self.count}: must divide the {devices} devices")


def place(coordinator: str | None, process: int | None, processes: int | None, kind: str) -> Place:
    """The place that the three options, or a launcher, give this process on chips of `kind`.

    QuestionError where one option is without the others. SLURM steps and Open MPI say how many they have started; a TPU
    pod has several hosts.
    """
    if coordinator is None and process is None and processes is None:
        told = [os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
        hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) if kind == "tpu" else 1
        return Place(None, 0, max(hosts, *(int(n) for n in told if n.isdecimal()), 1))
    if coordinator is None or process is None or processes is None:
        raise QuestionError("--coordinator, --process and --processes: go together")
    if process >= processes:
        raise QuestionError(f"--process {process}: must be from 0 to {processes - 1}")
    from trainer.processes import parse_address

    return Place(parse_address(coordinator), process, processes)


@contextmanager
def met(where: Place) -> Iterator[None]:
    """Within, a child that has met the other processes; an error ends it at once, without waiting for one that died."""
    from moecast.cli import _complain
    from moecast.progress import FAILED, INTERRUPTED
    from trainer import processes

    # gloo greets each of its peers on standard output, which is for the result.
    printed, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        if where.address is not None:
            processes.join(where.address, where.process, where.count)
        else:
            processes.join_recognised()
        yield
        processes.leave()
    except QuestionError as error:
        _complain(str(error))
        _end(2)
    except (WorkFailed, OSError) as error:
        _complain(f"process {where.process}: {error}" if where.address is not None else str(error))
        _end(FAILED)
    except typer.Exit as leaving:
        _end(leaving.exit_code)
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    os.dup2(printed, 1)


def _end(code: int) -> NoReturn:
    """End now: JAX's own way out waits for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def supervised(arguments: Sequence[str], mark: str, *, limit_s: float | None = None, hint: str = "") -> int:
    """Run a command of ours in a child, which finds our process number in the variable `mark`; its exit code.

    WorkFailed where it takes longer than `limit_s`. `hint` ends what is said of a child that was ended by a signal.
    """
    with tempfile.TemporaryFile() as waits:
        return _supervised(arguments, mark, limit_s, hint, waits)


def _supervised(arguments: Sequence[str], mark: str, limit_s: float | None, hint: str, waits: Any) -> int:
    from moecast.cli import _complain
    from moecast.progress import FAILED
    from trainer.processes import WAITS, WAITS_BYTES

    environment = os.environ | {mark: str(os.getpid()), WAITS: f"{waits.fileno()}:{os.getpid()}"}
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    child = subprocess.Popen(
        [sys.executable, "-m", "moecast", *arguments], env=environment, start_new_session=True,
        pass_fds=(waits.fileno(),),
    )  # fmt: skip

    def pass_on(number: int, _: Any) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        raise WorkFailed(f"moecast {' '.join(arguments[:2])}: took longer than {limit_s:g} s, and was ended") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        return code
    said = os.pread(waits.fileno(), WAITS_BYTES, 0).decode(errors="replace").strip()
    waited = f"; {said}" if said else ""
    if -code == signal.SIGABRT:
        _complain(f"another process of the run has ended or is silent: this one was ended too{waited}{hint}")
    else:
        _complain(f"the process that did the work was ended by signal {-code} ({signal.strsignal(-code)}){hint}")
    return FAILED
