"""Builds what a plan says, re-plugs it, and leaves nothing behind: also after a failure or a signal."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.netlab.plan import HOSTS, PREFIX, Command, Plan, host_name, hosts_file, namespace, plug, set_up_hosts
from benchmarks.netlab.plan import unplug as unplugged
from hw_profiles.errors import QuestionError, WorkFailed

TOOLS = ("ip", "tc", "sysctl")
# Where `ip netns exec` takes the hosts file of a namespace from.
FILES = Path("/etc/netns")
LOCK = Path("/run/mcnetlab.lock")
LONGEST_S = 20.0
DIES_S = 5.0


def missing() -> str:
    """Why there can be no netlab here, in a few words; empty where there can be."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)}: not found (iproute2 and procps have them)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    return ""


def run(command: Command) -> str:
    """What a command says; WorkFailed with its own words where it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        raise WorkFailed(f"{' '.join(command)}: took longer than {LONGEST_S:g} s") from None
    if done.returncode:
        raise WorkFailed(f"{' '.join(command)}: {' '.join(done.stderr.split()):.200}")
    return done.stdout


def namespaces() -> list[str]:
    """Namespaces of ours that there are."""
    names = [line.split()[0] for line in run(("ip", "netns", "list")).splitlines() if line.strip()]
    return sorted(name for name in names if name.startswith(PREFIX))


def clear() -> list[str]:
    """End what still runs in namespaces of ours, then remove them and their files; the names of those found.

    All are tried, whatever fails; WorkFailed at the end where something is left.
    """
    found = namespaces()
    for name in found:
        _end_processes(name)
    for name in found:
        subprocess.run(("ip", "netns", "del", name), capture_output=True, timeout=LONGEST_S, check=False)
    for folder in sorted(FILES.glob(f"{PREFIX}*")):
        shutil.rmtree(folder, ignore_errors=True)
    left = [*namespaces(), *(str(f) for f in FILES.glob(f"{PREFIX}*"))]
    if left:
        raise WorkFailed(f"left behind, and could not be removed: {', '.join(left)}")
    return found


def _end_processes(name: str) -> None:
    until = time.monotonic() + DIES_S
    while time.monotonic() < until:
        listed = subprocess.run(
            ("ip", "netns", "pids", name), capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
        numbers = [int(n) for n in listed.stdout.split()]
        if not numbers:
            return
        for number in numbers:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


class Lab:
    """The hosts, and what they are plugged into now."""

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts
        self.plan: Plan | None = None

    def plug(self, plan: Plan) -> None:
        """Replace the topology by `plan`; WorkFailed where a command fails."""
        self.unplug()
        self.plan = plan
        _all(plug(plan))

    def unplug(self) -> None:
        """Take away cables and switches; the hosts stay."""
        if self.plan is not None:
            plan, self.plan = self.plan, None
            _all(unplugged(plan))


@contextmanager
def lab(hosts: int = HOSTS) -> Iterator[Lab]:
    """Hosts without cables; on leaving, however that happens, everything is removed.

    What a killed run has left is removed first. QuestionError without root or the tools, or beside another run.
    """
    why = missing()
    if why:
        raise QuestionError(f"netlab: {why}")
    with LOCK.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QuestionError("netlab: another run is at work on this machine") from None
        clear()
        with _signals_raise():
            try:
                for i in range(hosts):
                    folder = FILES / namespace(host_name(i))
                    folder.mkdir(parents=True)
                    (folder / "hosts").write_text(hosts_file(i, socket.gethostname()), encoding="utf-8")
                _all(set_up_hosts(hosts))
                yield Lab(hosts)
            finally:
                clear()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP as an interruption, so that they tear down too."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _all(commands: Sequence[Command]) -> None:
    for command in commands:
        run(command)
