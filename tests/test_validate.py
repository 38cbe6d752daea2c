"""Validation of forecasts: our own tables, what a fit has seen, jobs left out, and bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibration_worlds import plain_world, small_job
from hw_profiles import Chip, QuestionError, load_chip
from hw_profiles.fitted_rows import rows_used
from hw_profiles.loader import load_chip_file
from hw_profiles.schema import Calibration, FittedTable
from simulator.analysis.forecast import forecast
from simulator.calibration.published import read_rows
from simulator.calibration.tables import write_table
from simulator.calibration.validate import Options, leave_one_job_out, validate
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.results.measurement import NETWORK, Measurement, MeasurementTable, measurement_hash
from simulator.results.validation import ValidationResult

Call = Callable[..., tuple[int, str, str]]
EXAMPLES = Path(__file__).parents[1] / "examples" / "small"
KEYS = {
    "rows", "forecast", "skipped", "median_abs_error", "mean_abs_error", "p90_abs_error", "bias", "spearman", "groups",
    "per_row", "baseline", "constants", "fitted_rows", "held_out", "reasons", "coverage", "notes",
}  # fmt: skip


@pytest.fixture
def call(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """In a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return call


def a_job(name: str) -> Job:
    return load_job(EXAMPLES / f"{name}.yaml")


def of_jobs(
    names: Sequence[str] = ("mixtral-8x7b", "t5-base", "switch-base-128"), factor: float = 1.25
) -> MeasurementTable:
    """A table in which everything takes `factor` times its closed-form forecast."""
    rows, jobs = [], {}
    for name in names:
        job = a_job(name)
        found = forecast(job, engine="closed-form")
        jobs[job.hash] = job.model_dump(mode="json", exclude_defaults=True)
        common = {
            "source": "made",
            "date": "2026-11-22",
            "chip": found.job.chip,
            "software": "none",
            "job_hash": job.hash,
        }
        rows.append(Measurement(f"{name} step", kind="step", name="step", seconds=factor * found.step_time_s, **common))
        for op in found.ops[:5]:
            rows.append(
                Measurement(
                    f"{name} {op.scope} {op.phase}", kind="op", name=op.scope, phase=op.phase,
                    seconds=factor * op.time_s, **common,
                )
            )  # fmt: skip
        sent = next(c for c in found.collectives if c.time_s > 0)
        # Two passes, measured apart, a quarter second late: the forecast knows their sum, and no waiting.
        for phase, share in (("forward", 0.25), ("backward", 0.75)):
            total = sum(c.time_s for c in found.collectives if c.scope == sent.scope)
            rows.append(
                Measurement(
                    f"{name} {sent.scope} {phase}", kind="op", name=sent.scope, phase=phase, level=NETWORK,
                    seconds=share * factor * total + 0.25, note="waited 0.250000000 s of it", **common,
                )
            )  # fmt: skip
        # On a CPU XLA's peak is the arguments alone; what it allocates is the forecast's peak.
        held = {"peak": found.memory.argument_bytes, "allocated": found.memory.peak_bytes}
        rows += [
            Measurement(f"{name} {what}", kind="memory", name=what, bytes=factor * n, **common)
            for what, n in held.items()
        ]
    return MeasurementTable(tuple(rows), jobs, {}, "made")


def run(table: MeasurementTable, folder: Path, options: Options | None = None, **choice: Any) -> ValidationResult:
    path = folder / "made.parquet"
    write_table(table, path)
    return validate([read_rows(path, **choice)], options)


def test_our_own_table_comes_back_as_it_was_made(tmp_path: Path) -> None:
    made = of_jobs()
    bad = replace(made.rows[1], id="nothing", name="decoder.moe.nothing")
    orphan = replace(made.rows[0], id="orphan", job_hash="f" * 64)
    found = run(replace(made, rows=(*made.rows, bad, orphan)), tmp_path)
    assert {round(r.error, 9) for r in found.scored} == {-0.2}
    assert found.scores.median_abs_error == pytest.approx(0.2) and found.scores.spearman is None
    assert found.rows == len(made.rows) + 2 == len(found.scored) + len(found.skipped)
    reasons = {s.id: s.reason for s in found.skipped}
    assert "no op decoder.moe.nothing" in reasons["nothing"] and "does not carry the row's job" in reasons["orphan"]
    assert sum("counted with the first pass" in r for r in reasons.values()) == 3
    assert {g.name for g in found.groups if g.by == "quantity"} == {"step_time", "time", "peak", "allocated"}
    # One constant explains what is off by one factor, where it multiplies the right thing.
    step = next(g for g in found.groups if g.by == "quantity" and g.name == "step_time")
    assert step.baseline is not None and step.scores.rows == 3


def test_a_job_measured_twice_is_scored_twice(tmp_path: Path) -> None:
    made = of_jobs()
    sent = [r for r in made.rows if r.level == NETWORK]
    twice = tuple(replace(r, id=f"{r.id.split()[0]}#{i}:{r.id}") for i in (1, 2) for r in sent)
    found = run(replace(made, rows=twice), tmp_path)
    assert [round(r.error, 9) for r in found.scored] == [-0.2] * 6 and len(found.skipped) == 6


def test_a_job_goes_by_its_tables_hash(tmp_path: Path) -> None:
    """A later schema hashes a job otherwise than the version that wrote the table."""
    made = plain_world().table([small_job(64, 128, 4)])
    (known,) = made.jobs
    rows = tuple(replace(r, job_hash="e" * 64) for r in made.rows)
    old = replace(made, rows=rows, jobs={"e" * 64: made.jobs[known]})
    first, second = ([(r.id, r.error) for r in run(t, tmp_path).scored] for t in (made, old))
    assert first == second and len(first) > 20


def test_choices_and_the_order_of_rows(tmp_path: Path) -> None:
    made = of_jobs()
    steps = run(made, tmp_path, where=[("kind", "step")])
    assert [r.op_class for r in steps.scored] == ["step"] * 3 and steps.tables[0].table_rows == len(made.rows)
    first = run(made, tmp_path, first_per="kind")
    assert [r.id for r in first.scored] == [made.rows[0].id, made.rows[1].id, f"{made.rows[0].id[:-4]}peak"]
    again = run(replace(made, rows=tuple(reversed(made.rows))), tmp_path)
    assert again.scores.median_abs_error == pytest.approx(0.2) and again.rows == len(made.rows)
    halved = replace(
        made, rows=tuple(replace(r, seconds=r.seconds and (r.seconds + r.waited_s) / 2) for r in made.rows)
    )
    by_id = {r.id: r.error for r in run(halved, tmp_path).scored if r.unit == "s"}
    assert all(e == pytest.approx(2 * 0.8 - 1) for e in by_id.values())


def streams(name: str, rate: float, n: int = 3) -> list[Measurement]:
    """Streams of a job at `rate` of the data sheet's bandwidth."""
    chip = load_chip("cpu-host")
    return [
        Measurement(
            f"{name}{i}", "made", "2026-11-22", "cpu-host", "none", "kernel", "stream",
            2.0**k / (chip.device_memory_bytes_per_s * rate) + chip.kernel_overhead_us.value * 1e-6, bytes=2.0**k,
            job_hash=name,
        )
        for i, k in enumerate(range(28, 28 + n))
    ]  # fmt: skip


def with_memory(rate: float, used: Sequence[Measurement] = ()) -> Chip:
    """The CPU's profile with that share of the bandwidth, fitted on `used`."""
    chip = load_chip("cpu-host")
    memory = chip.efficiency.memory.model_copy(update={"value": rate})
    record = None
    if used:
        hashes = tuple(measurement_hash(r) for r in used)
        table = FittedTable(name="made", sha256="0" * 64, rows=len(hashes), ids_sha256=hashes)
        record = Calibration(tables=(table,), date="2026-11-22", moecast_version="0")
    efficiency = chip.efficiency.model_copy(update={"memory": memory})
    return chip.model_copy(update={"efficiency": efficiency, "calibration": record})


def test_rows_of_a_fit_are_refused_in_copies_and_subsets(tmp_path: Path) -> None:
    rows = [*streams("a", 0.5), *streams("b", 0.5)]
    chip = with_memory(0.5, rows[:3])
    copied = MeasurementTable(tuple(replace(r, id=f"n{i}", date="2027-01-01") for i, r in enumerate(rows[1:])))
    found = run(copied, tmp_path, Options(chip))
    assert [r.id for r in found.scored] == ["n2", "n3", "n4"] and found.fitted_rows == 0
    assert {s.reason for s in found.skipped} == {
        "its profile rests on it: calibration on made (--allow-fitted scores it)"
    }
    allowed = run(copied, tmp_path, Options(chip, allow_fitted=True))
    assert (len(allowed.scored), allowed.fitted_rows) == (5, 2) and "2 of the scored rows" in allowed.notes[0]
    assert allowed.held_out is not None and allowed.held_out.rows == 3 and allowed.to_dict()["allow_fitted"] is True
    with pytest.raises(QuestionError, match="on all of them; --allow-fitted"):
        run(MeasurementTable(tuple(rows[:3])), tmp_path, Options(chip))


def test_a_profile_file_keeps_the_list(tmp_path: Path) -> None:
    rows = streams("a", 0.5)
    path = tmp_path / "mine.yaml"
    data = with_memory(0.5, rows).model_dump(mode="json", exclude_none=True)
    path.write_text(yaml.safe_dump(data))
    assert set(rows_used(load_chip_file(path))) == {measurement_hash(r) for r in rows}
    data["calibration"]["tables"][0]["rows"] = 2
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(QuestionError, match="rows = 2, and ids_sha256 lists 3"):
        load_chip_file(path)


def median_rate(table: MeasurementTable) -> float:
    chip = load_chip("cpu-host")
    extra = chip.kernel_overhead_us.value * 1e-6
    rates = sorted((r.bytes or 0) / ((r.seconds or 0) - extra) / chip.device_memory_bytes_per_s for r in table.rows)
    return rates[len(rates) // 2]


def test_each_job_is_forecast_by_the_others() -> None:
    table = MeasurementTable((*streams("a", 0.4), *streams("b", 0.4), *streams("c", 0.8)), name="made")
    seen: list[set[str]] = []

    def fit(rest: MeasurementTable) -> Chip:
        seen.append({r.job_hash for r in rest.rows})
        return with_memory(median_rate(rest), rest.rows)

    found = leave_one_job_out(table, fit)
    assert seen == [{"b", "c"}, {"a", "c"}, {"a", "b"}] and found.rows == 9 == len(found.scored)
    error = {job: [r.error for r in found.scored if r.job_hash == job] for job in "abc"}
    # Jobs at 0.4 are forecast by a median of 0.8 (upper of two equal halves), the one at 0.8 by 0.4.
    assert error["a"] == pytest.approx([-0.5] * 3, abs=0.01) and error["c"] == pytest.approx([1.0] * 3, abs=0.01)
    with pytest.raises(QuestionError, match="used 3 of its rows"):
        leave_one_job_out(table, lambda rest: with_memory(0.5, table.rows))
    with pytest.raises(QuestionError, match="two jobs or more, not 1"):
        leave_one_job_out(MeasurementTable(tuple(streams("a", 0.5))), fit)


GEMM = {
    "id": "1", "source": "made", "chip": "H100 SXM", "kind": "gemm_dense", "m": "4096", "n": "4096", "k": "4096",
    "groups": "1", "dtype": "bf16", "time_us": "250", "tflops": "", "gbps": "", "bytes": "", "library": "cuBLASLt",
    "topk": "", "ep": "", "tp": "", "routing": "",
}  # fmt: skip


def kernels(path: Path, *changes: dict[str, str], without: str = "") -> Path:
    """A table of kernels in which each row differs from GEMM."""
    rows = [GEMM | {"id": str(i + 1)} | change for i, change in enumerate(changes or ({},))]
    names = [n for n in GEMM if n != without]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_command(call: Call, tmp_path: Path) -> None:
    path = kernels(tmp_path / "k.csv", {}, {"time_us": "300"}, {"chip": "Z80"}, {"time_us": "", "dtype": "bf16"})
    code, out, said = call("validate", str(path), "--json", "--html", str(tmp_path / "k.html"))
    answer = json.loads(out)
    assert (code, said) == (0, "") and set(answer) >= KEYS
    assert answer["rows"] == 4 == answer["forecast"] + len(answer["skipped"])
    assert [s["reason"] for s in answer["skipped"]] == ["no profile of Z80", "neither time nor rate is stated"]
    first, second = answer["per_row"]
    assert first["error"] == pytest.approx(first["forecast"] / 250e-6 - 1) and first["interval"][0] < first["forecast"]
    assert first["forecast"] == second["forecast"] and set(first) >= {"id", "measured", "forecast", "error", "interval"}
    assert set(answer["groups"]) == {"table", "quantity", "chip", "op_class", "kind"}
    page = (tmp_path / "k.html").read_text()
    body = page[page.index("<main>") :]
    assert "no profile of Z80" in body and "k 2" in body and "http" not in body and "default-src 'none'" in page
    code, out, said = call("validate", str(path), "--where", "time_us=300.0")
    assert code == 0 and "1 of 4 rows" in out and "h100-sxm" in out


@pytest.mark.parametrize(
    ("arguments", "make", "rule"),
    [
        (("none.csv",), None, "none.csv: no such file"),
        (("k.csv",), lambda p: kernels(p, without="gbps"), "k.csv: has no column gbps, which a table of kernels needs"),
        (("k.csv",), lambda p: p.write_text("a,b\n1,2\n"), "not a table that can be scored"),
        (("k.csv",), lambda p: p.write_bytes(b"\xff\xfe\x00"), "not a text file"),
        (("k.csv",), lambda p: kernels(p, {}, {"time_us": "-3"}), "line 3: time_us = '-3': must be a finite"),
        (("k.csv",), lambda p: kernels(p, {"time_us": "0"}), "line 2: time_us = '0': must be"),
        (("k.csv",), lambda p: kernels(p, {"m": "nan"}), "line 2: m = 'nan': must be"),
        (("k.csv",), lambda p: kernels(p, {"k": "wide"}), "line 2: k = 'wide': must be"),
        (("k.csv",), lambda p: kernels(p, {}, {"id": "1"}), "line 3: id = '1': appears twice (line 2)"),
        (("k.csv", "--where", "chpi=x"), kernels, "--where chpi: k.csv has no such column; did you mean 'chip'"),
        (("k.csv", "--where", "chip=H200 SXM"), kernels, "leaves no rows; did you mean 'H100 SXM'"),
        (("k.csv", "--where", "chip"), kernels, "must be COLUMN=VALUE"),
        (("k.csv", "--first-per", "Chip"), kernels, "has no such column; did you mean 'chip'"),
        (("k.csv", "--engine", "event"), kernels, "did you mean 'events'"),
        (("k.csv", "k.csv"), kernels, "is given twice"),
        (("k.csv", "--html", "no/where.html"), kernels, "its folder does not exist"),
        (("k.csv", "--profile", "no.yaml"), kernels, "no.yaml"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    call: Call,
    tmp_path: Path,
    arguments: tuple[str, ...],
    make: Callable[[Path], Any] | None,
    rule: str,
) -> None:
    if make is not None:
        make(tmp_path / "k.csv")
    code, out, said = call("validate", *arguments)
    assert code == 2 and not out and rule in said and said.count("\n") == 1


def test_a_profile_of_another_chip(call: Call, tmp_path: Path) -> None:
    profile = tmp_path / "a100.yaml"
    profile.write_text(yaml.safe_dump(load_chip("a100-80").model_dump(mode="json", exclude_none=True)))
    kernels(tmp_path / "k.csv")
    code, _, said = call("validate", "k.csv", "--profile", "a100.yaml")
    assert code == 2 and "a profile of a100-80, and no row is of it; the rows' chips: h100-sxm (1)" in said
    kernels(tmp_path / "k.csv", {}, {"chip": "A100 SXM"}, {"chip": "A100-80 SXM"})
    code, out, _ = call("validate", "k.csv", "--profile", "a100.yaml", "--json")
    answer = json.loads(out)
    assert (code, answer["forecast"]) == (0, 1) and answer["profile"] == "a100.yaml"
    assert "the profile is of a100-80, the row of h100-sxm" in answer["reasons"]


def test_a_row_of_two_tables_counts_once(call: Call, tmp_path: Path) -> None:
    kernels(tmp_path / "one.csv", {}, {"time_us": "300"})
    kernels(tmp_path / "two.csv", {"time_us": "310"}, {"time_us": "300.0"})
    answer = json.loads(call("validate", "one.csv", "two.csv", "--json")[1])
    assert (answer["rows"], answer["forecast"]) == (4, 3)
    assert answer["skipped"] == [{"id": "2", "table": "two", "reason": "the same row is in one.csv"}]
