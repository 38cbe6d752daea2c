"""The command line: what it prints, its JSON, its exit codes, and how it leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Never

import pytest
import yaml

from simulator.analysis.forecast import forecast
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.job.model import Model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
COMMANDS = ("forecast", "link-load", "placement", "models", "chips", "clusters", "schema", "scale", "plan")
FORMULA = ("--engine", "closed-form")
TOO_BIG = "model: mixtral-8x7b\ncluster: h100-64\nbatch: {sequences: 64, length: 4096}\n"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """In a folder of its own, for 120 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return call


def strictly(text: str) -> Any:
    """JSON as the standard has it: without NaN and infinities."""

    def refuse(constant: str) -> Never:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# The contract of `forecast --json`: a scalar's type, or the keys of a mapping or of each entry of a list.
CONTRACT: dict[str, Any] = {
    "step_time_s": float,
    "step_time_interval_s": list,
    "sequences_per_s": float,
    "tokens_per_s": float,
    "tokens_per_s_per_device": float,
    "mfu": float,
    "hfu": float,
    "flops": {"model_per_step", "executed_per_device", "convention"},
    "memory": {
        "peak_bytes", "capacity_bytes", "fits", "parameters_bytes", "gradients_bytes", "optimizer_bytes",
        "activations_bytes", "dispatch_bytes", "other_bytes", "by_stage",
    },
    "time": {"parts"},
    "all_to_all": {"time_s", "exposed_s", "bytes_per_device"},
    "collectives": [{"scope", "kind", "group_size", "count", "bytes", "time_s", "exposed_s"}],
    "routing": {"dropped_token_fraction", "max_over_mean_load"},
    "cost": {"usd_per_step", "usd_per_1b_tokens"},
    "evidence": {"profile", "rests_on", "warnings"},
    "version": str,
}  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_json_of_a_forecast_keeps_its_contract(path: Path, call: Call) -> None:
    code, out, said = call("forecast", path, *FORMULA, "--json")
    got = strictly(out)
    assert (code, said) == (0, "")
    for key, wanted in CONTRACT.items():
        if isinstance(wanted, set):
            assert wanted <= set(got[key])
        elif isinstance(wanted, list):
            assert got[key] and all(wanted[0] <= set(row) for row in got[key])
        else:
            assert isinstance(got[key], wanted)
    assert len(got["step_time_interval_s"]) == 2
    assert len(got["memory"]["by_stage"]) == got["job"]["plan"]["pipeline"]


def test_json_of_several_forecasts_is_a_list_in_the_order_asked(call: Call) -> None:
    _, out, _ = call("forecast", *EXAMPLES[::-1], *FORMULA, "--json")
    assert [one["job"]["name"] for one in strictly(out)] == [path.stem for path in EXAMPLES[::-1]]


def test_a_job_that_does_not_fit_says_so_first_and_fails_only_when_asked(call: Call, tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(TOO_BIG, encoding="utf-8")
    code, out, said = call("forecast", "big.yaml", *FORMULA)
    assert (code, said) == (0, "")
    assert re.match(r"DOES NOT FIT: needs [\d,]+ of 79\.7 GiB \([\d.,]+ %\)\n", out)
    code, out, _ = call("forecast", "big.yaml", *FORMULA, "--strict", "--json")
    assert code == 3 and strictly(out)["memory"]["fits"] is False
    code, out, _ = call("forecast", "big.yaml", str(EXAMPLES[0]), *FORMULA, "--strict")
    assert code == 3 and out.startswith("1 of 2 DO NOT FIT: big\n")
    code, out, _ = call("forecast", str(EXAMPLES[0]), *FORMULA, "--strict")
    assert code == 0 and "NOT FIT" not in out


def test_a_table_names_every_number_that_json_leads_with(call: Call) -> None:
    _, out, _ = call("forecast", str(EXAMPLES[0]), *FORMULA)
    for word in ("step time", "tokens/s", "MFU", "HFU", "all-to-all", "routing", "per 1B tokens", "peak", "rests on"):
        assert word in out
    assert "\x1b" not in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_of_a_command_works(command: str, call: Call, tmp_path: Path) -> None:
    code, out, _ = call(command, "--help")
    found = re.search(r"Example: moecast (.*)", " ".join(out.split()))
    assert code == 0 and found and "--json" in out
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    code, out, said = call(*shlex.split(found.group(1).partition(" > ")[0]))
    assert (code, said) == (0, "") and out


def test_every_command_is_listed_and_tried_here_or_in_tests_of_the_trainer(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    listed = re.findall(r"^  ([a-z-]+)  ", out.partition("Commands:")[2], re.MULTILINE)
    runs = ["train", "measure", "bench", "calibrate", "validate"]
    plans = ["plan", "compare", "whatif", "sensitivity", "size"]
    assert listed == [*COMMANDS[:-2], "convert", "import", "compile", "report", "scale", *plans, *runs]
    assert call()[0] in (0, 2)
    code, out, _ = call("--version")
    assert code == 0 and re.fullmatch(r"moecast \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("models",), {"models", "unavailable"}),
        (("models", "mixtral-8x7b"), {"model", "parameters"}),
        (("chips",), {"name", "peak_tflops", "memory_gib", "usd_per_chip_hour"}),
        (("chips", "h100"), {"name", "peak_tflops", "scale_up", "efficiency"}),
        (("clusters",), {"name", "chip", "devices", "levels"}),
        (("clusters", "v5p-128"), {"name", "chip", "devices", "levels", "torus"}),
        (("schema",), {"title", "properties", "$defs", "additionalProperties"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_json_of_a_catalogue_has_the_names_of_its_table(arguments: tuple[str, ...], keys: set[str], call: Call) -> None:
    code, out, said = call(*arguments, "--json")
    data = strictly(out)
    rows = data if isinstance(data, list) else [data]
    assert (code, said) == (0, "") and rows and all(keys <= set(row) for row in rows)
    code, table, said = call(*arguments)
    assert (code, said) == (0, "") and table
    names = [row["name"] for row in (data["models"] if arguments == ("models",) else rows) if "name" in row]
    assert all(name in table for name in names)


def validate(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether `value` fits `schema`: the few words of JSON Schema that pydantic writes."""
    if "$ref" in schema:
        return validate(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(validate(value, branch, root) for branch in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds: dict[str, type | tuple[type, ...]] = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": (list, tuple),
        "null": type(None),
    }  # fmt: skip
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict):
        known, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(value) and all(
            validate(inner, known[key], root) if key in known else extra is not False for key, inner in value.items()
        )
    if isinstance(value, list):
        return all(validate(inner, schema.get("items", {}), root) for inner in value)
    if isinstance(value, (int, float)):
        return schema.get("exclusiveMinimum", -1) < value <= schema.get("maximum", value)
    return True


def test_the_schema_takes_the_examples_and_refuses_what_the_reader_refuses(call: Call) -> None:
    """By `jsonschema` where it is installed, and by the few rules above."""
    schema = strictly(call("schema")[1])
    assert set(schema["properties"]) == set(Job.model_fields) and schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "cluster", "batch"}
    assert set(schema["$defs"]["Model"]["properties"]) == set(Model.model_fields)
    for definition in schema["$defs"].values():
        assert definition.get("type") != "object" or definition["additionalProperties"] is False
    checks: list[Callable[[Any], bool]] = [partial(validate, schema=schema, root=schema)]
    try:
        import jsonschema
    except ImportError:
        pass
    else:
        checks.append(jsonschema.Draft202012Validator(schema).is_valid)
    for path in EXAMPLES:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
        for valid in checks:
            assert valid(job)
            assert not valid(job | {"plann": {}})
            assert not valid(job | {"batch": job["batch"] | {"sequences": -1}})
            assert not valid(job | {"training": {"precision": "fp7"}})
            assert not valid({key: value for key, value in job.items() if key != "cluster"})


def test_a_page_is_written_beside_the_table(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("forecast", str(EXAMPLES[0]), str(EXAMPLES[1]), *FORMULA, "--html", "page.html")
    assert code == 0 and out.endswith("report: page.html\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and all(path.stem in text for path in EXAMPLES[:2])


@pytest.mark.parametrize("where", ["simulator.analysis.forecast.forecast", "simulator.job.load.load_job"])
def test_an_interruption_exits_with_130_and_says_nothing(
    where: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert call("forecast", str(EXAMPLES[0]), *FORMULA) == (130, "", "")


def _start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, **options)


def test_a_real_interruption_exits_with_130_and_says_nothing() -> None:
    """SIGINT while a job is read."""
    code = """
import os, signal, sys, threading
from moecast import cli
import simulator.job.load as load
def slow(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(30)
load.load_job = slow
sys.argv = ["moecast", "forecast", "examples/t5-base.yaml"]
cli.main()
"""
    running = _start("-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, said = running.communicate(timeout=25)
    assert (running.returncode, out, said) == (130, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("forecast", "examples/t5-base.yaml", *FORMULA),
        ("forecast", "examples/t5-base.yaml", *FORMULA, "--json"),
        ("schema",),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_failure(arguments: tuple[str, ...]) -> None:
    running = _start("-m", "moecast", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    with running.stderr:
        said = running.stderr.read()
    assert (running.wait(timeout=30), said) == (0, "")


def test_output_is_plain_where_the_terminal_knows_ascii_only() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moecast", "forecast", "examples/deepseek-v3.yaml", *FORMULA],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.isascii() and b"step time" in done.stdout and not done.stderr


def test_the_design_documents_own_example_is_a_job(tmp_path: Path) -> None:
    """Every field written out, defaults as null where they are null."""
    text = """
model: switch-base-128
cluster: tpu-v3-32
plan: {data: 32, tensor: 1, context: 1, pipeline: 1, expert: 32, expert_tensor: 1, sequence_parallel: false,
  shard: none, shard_degree: null, microbatch_sequences: 1, schedule: 1f1b, virtual_stages: 1, stages: null,
  placement: null}
batch: {sequences: 2048, length: {encoder: 512, decoder: 114}}
training:
  precision: bf16
  optimizer: adafactor
  remat: none
  capacity: {factor: 1.25, eval_factor: 2.0, basis: tokens, group_tokens: 8192, rounding: floor, minimum: 4}
  dispatch: {layout: slots, transport: collective}
  routing: {model: chance}
software: {stack: t5x, release: null, graphs: null, overlap: {all_to_all: false, gradients: true, parameters: true}}
"""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    job = load_job(path)
    assert job.plan.placement is None and forecast(job).step_time_s > 0
