"""The command that trains: its example, and the questions that it refuses before a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hw_profiles.errors import QuestionError
from runs import tiny, train, write_tiny
from simulator.job.load import load_job
from trainer.folder import check_folder, claimed
from trainer.processes import parse_address

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`moecast train` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # and so are put back
        monkeypatch.delenv(name)
    return lambda *arguments: call("train", *arguments)


def test_the_example_in_the_help_trains(tmp_path: Path, call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0 and "Example: moecast train examples/tiny-moe.yaml --steps 100" in " ".join(out.split())
    example = Path(__file__).parents[1] / "examples/tiny-moe.yaml"
    code, printed, error = train(example, "--steps", 2, "--out", tmp_path / "run", "--json", cache=tmp_path)
    assert code == 0, error
    result = json.loads(printed)
    assert result["devices"] == 4 and result["steps"] == 2 and result["held_out_nats"] > result["bigram_nats"]
    assert "unigram" in error.splitlines()[0] and error.splitlines()[-1].startswith("step 2/2  loss ")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["missing.yaml"], "missing.yaml: no such file"),
        (["tiny.yaml", "--set", "training.run.stps=3"], "training.run.stps: unknown key; did you mean 'steps'?"),
        (["tiny.yaml", "--process", "0"], "--coordinator, --process and --processes: go together"),
        (["tiny.yaml", "--coordinator", "x", "--process", "0", "--processes", "2"], "write it as HOST:PORT"),
        (["tiny.yaml", "--coordinator", ":1", "--process", "2", "--processes", "2"], "--process 2: must be from 0"),
        (["tiny.yaml", "--coordinator", ":1", "--process", "0", "--processes", "2"], "must divide the 1 devices"),
        (["tiny.yaml", "--devices", "3"], "batch.sequences = 8: must be a multiple of the data degree 3"),
        (["tiny.yaml", "--set", "cluster=v5p-8"], "moecast scale tiny.yaml --devices 8 makes a small job of it"),
        (["tiny.yaml", "--out", "text.txt"], "--out text.txt: is there and is not a folder"),
        (["tiny.yaml", "--set", "training.learning.data.files=[none.txt]"], "none.txt"),
        (["tiny.yaml", "--set", "model.vocab=100"], "model.vocab = 100: must be at least 259"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_question_is_one_line(arguments: list[str], rule: str, call: Call, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    code, out, error = call(*arguments)
    assert code == 2 and not out and error.count("\n") == 1 and error.startswith("moecast: ") and rule in error
    assert not (tmp_path / "runs").exists()


def test_the_tiny_job_of_the_tests_is_the_same_in_a_file(tmp_path: Path) -> None:
    written = load_job(write_tiny(tmp_path))
    assert written.hash == tiny("training.learning.data.files=[text.txt]").hash != tiny().hash


@pytest.mark.parametrize("text", ["here", "here:", "here:0", "here:65536", "a b:80", ":x"])
def test_an_address_is_a_host_and_a_port(text: str) -> None:
    with pytest.raises(QuestionError, match="write it as HOST:PORT"):
        parse_address(text)
    assert parse_address(":80").loopback and parse_address("localhost:80").loopback
    assert not parse_address("10.0.0.1:80").loopback and not parse_address("host.example:80").loopback


def test_a_folder_is_one_runs_alone(tmp_path: Path) -> None:
    job = tiny()
    with claimed(tmp_path / "run", job, resume=False) as existing:
        assert not existing
        with (
            pytest.raises(QuestionError, match="another run is writing there now"),
            claimed(tmp_path / "run", job, resume=True),
        ):
            raise AssertionError
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    for name, rule in (("full", "is not empty and holds no run"), ("full/letter", "is there and is not a folder")):
        with pytest.raises(QuestionError, match=rule):
            check_folder(tmp_path / name, job, resume=True)
    (tmp_path / "full" / "run.json").write_text("[]")
    with pytest.raises(QuestionError, match=r"run\.json cannot be read"):
        check_folder(tmp_path / "full", job, resume=True)
