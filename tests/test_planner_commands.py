"""The command lines of plan, size and convert: exit codes, JSON, bad input in one line, and 80 columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests import plan_runs as runs

Call = Callable[..., tuple[int, str, str]]
SIZE = ("size", "mixtral-8x7b", "--tokens", "1e11", "--days", "10")


@pytest.fixture
def call(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """In a folder with a job and a space."""
    monkeypatch.chdir(tmp_path)
    runs.write_question(tmp_path)
    return call


def _refused(answer: tuple[int, str, str]) -> str:
    """The one line of a question that is wrong."""
    status, text, error = answer
    assert status == 2 and text == "" and error.startswith("moecast: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"tensor": []}, "other.yaml: plan.tensor: an empty list leaves no plan"),
        ({"tensor": [5, 7]}, "no plan of the space keeps the rules; plan refused most, 2,016 of 2,016: their product"),
        (
            {name: list(range(1, 1001)) for name in ("tensor", "pipeline", "context", "expert")},
            "000 plans; at most 1,000,000,000 are searched: give fewer values, first of plan.tensor (1000 values)",
        ),
    ],
)
def test_a_space_that_is_empty_or_endless_is_refused(call: Call, space: dict[str, list[int]], said: str) -> None:
    plan = {**runs.SPACE["plan"], **space}
    Path("other.yaml").write_text(yaml.safe_dump({"plan": plan}))
    assert said in _refused(call("plan", "job.yaml", "--search", "other.yaml"))


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        (["step_time_s<=0.001"], "'step_time_s<=0.001': no plan holds it; the nearest has step_time_s 0.58"),
        (["memory_peak_bytes<=1e9"], "'memory_peak_bytes<=1e9': none of 1,272 plans fits: the smallest needs"),
        (["plan.tensor>=64"], "'plan.tensor>=64': no plan of the space holds it; nearest is 2"),
        (["plan.tensor<=1", "plan.tensor>=2"], "together plan.tensor<=1, plan.tensor>=2 exclude all"),
        (["mfu>=0.2", "mfu>=0.9"], "'mfu>=0.9': no plan holds it; the nearest has mfu 0.5"),
    ],
)
@pytest.mark.parametrize("parts", [(), ("--part-plans", "400", "-o", "found")])
def test_a_constraint_that_nothing_holds_is_named(
    call: Call, constraints: list[str], said: str, parts: tuple[str, ...]
) -> None:
    """However the space is divided: the nearest miss is that of all parts."""
    given = [a for c in constraints for a in ("--constraint", c)]
    assert said in _refused(call("plan", "job.yaml", "--search", "space.yaml", *given, *parts))


def test_an_objective_or_constraint_without_a_price_is_refused(call: Call) -> None:
    deepseek = str(runs.ROOT / "examples" / "deepseek-v3.yaml")
    said = _refused(call("plan", deepseek, "--objective", "tokens_per_usd"))
    assert "no price for h800 in its profile" in said and "--profile" in said
    assert "no price for h800" in _refused(call("plan", deepseek, "--constraint", "usd_per_1b_tokens<=5"))


def test_size_says_the_fewest_chips_in_80_columns_and_in_json(call: Call) -> None:
    status, text, error = call(*SIZE)
    assert status == 0 and error == "" and max(map(len, text.splitlines())) <= 80
    answer = json.loads(call(*SIZE, "--json")[1])
    (fewest,) = answer["smallest"]
    assert f"{fewest['chips']} h100-sxm are the fewest of those tried: {fewest['days']:.1f} days" in text
    assert fewest["in_time"] and {p["chips"] for p in answer["points"] if p["in_time"]} >= {fewest["chips"]}


def test_size_exits_with_3_where_no_count_is_enough_and_it_is_strict(call: Call) -> None:
    status, text, _ = call(*SIZE, "--budget", "1", "--strict")
    assert status == 3 and "no count that was tried is in time and in budget" in text
    assert call(*SIZE, "--budget", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tokens", "x"), "--tokens 'x': must be a finite number above zero"),
        (("--days", "-1"), "--days '-1': must be a finite number above zero"),
        (("--days", "nan"), "--days 'nan': must be a finite number above zero"),
        (("--chips", "h1000"), "cluster.chip = 'h1000': unknown chip; did you mean 'h100'?"),
        (("--chips", ","), "--chips ',': names no chip"),
        (("--terms", "spt"), "did you mean 'spot'?"),
        (("--phase", "tokns=1"), "did you mean 'tokens'?"),
        (("--phase", "tokens=1e12,sequences=8"), "together more tokens than --tokens 1e+11"),
        (("--largest", "expert"), "did you mean 'experts'?"),
    ],
)
def test_size_refuses_what_it_cannot_answer(call: Call, arguments: tuple[str, ...], said: str) -> None:
    assert said in _refused(call(*SIZE, *arguments))


@pytest.mark.parametrize("form", ["megatron", "maxtext", "torchtitan"])
def test_convert_writes_what_it_reads_again(call: Call, form: str) -> None:
    status, text, error = call("convert", "job.yaml", "--to", form, "-o", "made.txt")
    if status == 2:
        assert form == "torchtitan" and text == "" and error.count("\n") == 1
        return
    assert status == 0 and error == "" and max(map(len, text.splitlines())) <= 80
    made = json.loads(call("convert", "job.yaml", "--to", form, "--json")[1])
    assert made["text"] == Path("made.txt").read_text() and made["export"]["left"]
    status, text, error = call("convert", "made.txt")
    assert status == 0 and yaml.safe_load(text)["plan"]["expert"] == 8
    assert max(map(len, error.splitlines())) <= 80
    assert call("convert", "job.yaml", "--to", form, "--strict")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nosuch",), "nosuch: no such file"),
        (("job.yaml",), "is a job already; say what it becomes with --to"),
        (("job.yaml", "--to", "megatrn"), "did you mean 'megatron'?"),
        (("job.yaml", "--from", "megatrn"), "did you mean 'megatron'?"),
        (("job.yaml", "a=1", "--to", "maxtext"), "overrides go with a trainer's configuration"),
        (("bytes",), "bytes: not UTF-8 text"),
    ],
)
def test_convert_refuses_what_it_cannot_read(call: Call, arguments: tuple[str, ...], said: str) -> None:
    Path("bytes").write_bytes(b"\xff\xfe")
    assert said in _refused(call("convert", *arguments))
