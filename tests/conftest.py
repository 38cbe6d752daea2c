"""What all tests share."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from refusals import JARGON, JOB, Refused

# JAX's programs in tests run once: most of their time is the compiler's.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # fmt: skip

# No deadline: a slow machine is no failure. CI tries the same examples every time, elsewhere they differ between runs.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in this process, for 80 columns: exit code, standard output and error."""
    from moecast import cli

    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecast", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code or 0
        assert isinstance(code, int)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good job in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    return tmp_path


@pytest.fixture
def refused(folder: Path, call: Call) -> Refused:
    """Runs the command in `folder`, and checks that it says one line with `expected` in it, and nothing else."""

    def check(expected: str, *arguments: str, code: int = 2) -> None:
        left, out, said = call(*arguments)
        assert expected in said
        assert (left, out) == (code, "")
        assert said.startswith("moecast: ") and said.endswith("\n") and said.count("\n") == 1
        assert said[:-1].isprintable() and len(said) <= 620 and not JARGON.search(said)

    return check


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published facts and measurements beside the repository; where it is absent, its tests skip."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent")
    return folder


@pytest.fixture(scope="session")
def trainer_suite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What `tests/trainer_suites.py SUITE` finds on eight devices; run once, whatever the number of test workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    script = Path(__file__).with_name("trainer_suites.py")

    @cache
    def run(name: str) -> dict[str, Any]:
        out = folder / f"trainer-{name}.json"
        with out.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                command = [sys.executable, "-W", "error", str(script), name]
                # The packages beside these tests, whichever are installed.
                environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
                done = subprocess.run(
                    command, cwd=script.parents[1], env=environment, capture_output=True, text=True, timeout=540,
                    check=False,
                )  # fmt: skip
                # A suite that failed has failed for every test that asks for it, and is not run for each of them.
                out.write_text(done.stdout if done.returncode == 0 else json.dumps({"failed": done.stderr[-4000:]}))
        found: dict[str, Any] = json.loads(out.read_text())
        assert "failed" not in found, found["failed"]
        return found

    return run
