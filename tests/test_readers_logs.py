"""nccl-tests, training logs and CSV as rows: by hand, broken, and through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.calibration.readers.found import Found, Told
from simulator.calibration.readers.read import read_file
from simulator.calibration.readers.training_logs import Step, settled
from simulator.calibration.tables import read_table
from simulator.results.measurement import Measurement

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/samples"


def read(path: Path, form: str = "auto", **told: Any) -> Found:
    return read_file(path, Told(chip="h100-sxm", **told), form)


def refused(path: Path, rule: str, form: str = "auto", **told: Any) -> None:
    with pytest.raises(QuestionError, match=rule) as error:
        read(path, form, **told)
    assert "\n" not in str(error.value)


def rewritten(tmp_path: Path, name: str, *changes: tuple[str, str]) -> Path:
    text = (SAMPLES / name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text)
    return path


# nccl-tests -----------------------------------------------------------------------------------------------------------


def test_an_all_reduce_by_hand() -> None:
    found = read(SAMPLES / "all_reduce_perf.txt")
    assert (found.format, found.notes) == ("nccl-tests", ("8 ranks on 2 hosts",))
    assert [(r.bytes, round(1e6 * (r.seconds or 0), 6), r.note) for r in found.rows] == [
        (1048576, 85.12, "out of place, 2 hosts"), (1048576, 84.37, "in place, 2 hosts"),
        (16777216, 251.4, "out of place, 2 hosts"), (16777216, 250.1, "in place, 2 hosts"),
        (268435456, 2270.5, "out of place, 2 hosts"), (268435456, 2268.8, "in place, 2 hosts"),
    ]  # fmt: skip
    alike = {(r.kind, r.name, r.group_size, r.devices, r.dtype, r.statistic, r.samples, r.software) for r in found.rows}
    assert alike == {("collective", "all_reduce", 8, 8, "fp32", "mean", 20, "nccl-tests 2.17.6, NCCL 22803")}


def test_an_old_version_without_the_name_of_its_test() -> None:
    old = SAMPLES / "alltoall_old.txt"
    refused(old, r"alltoall_old.txt, line 16: no line names the test \(all_reduce_perf ...\): say --collective")
    found = read(old, collective="all_to_all")
    assert [(r.name, r.bytes, r.group_size, r.note) for r in found.rows] == [
        ("all_to_all", 67108864, 8, "out of place"), ("all_to_all", 67108864, 8, "in place"),
        ("all_to_all", 134217728, 8, "out of place"),
    ]  # fmt: skip
    assert found.notes == ("line 17: wrong results in place, left out",)
    # The bandwidths beside the times tell another collective, or another group.
    refused(old, "busbw / algbw is 0.875, all_reduce over 8 has 1.750: another collective", collective="all_reduce")
    refused(old, "all_to_all over 4 has 0.750", collective="all_to_all", group_size=4)
    refused(old, "known: all_reduce.*did you mean 'all_to_all'", collective="all_too_all")


def test_wrong_results_and_a_launcher(tmp_path: Path) -> None:
    """Twelve wrong values are one row less; mpirun's marks and late warnings of the executable change nothing."""
    wrong = rewritten(tmp_path, "all_reduce_perf.txt", ("21.56       0", "21.56      12"))
    found = read(wrong)
    assert len(found.rows) == 5 and "line 19: wrong results out of place, left out" in found.notes
    text = (SAMPLES / "all_reduce_perf.txt").read_text()
    lines = [f"[1,0]<stdout>:{line}" for line in text.splitlines()]
    lines.insert(20, "[1,0]<stderr>:./build/all_reduce_perf: libnl-3.so.200: no version information available")
    wrong.write_text("\n".join(lines))
    assert read(wrong).rows == tuple(read(SAMPLES / "all_reduce_perf.txt", date=read(wrong).rows[0].date).rows)


def test_two_tests_in_one_log(tmp_path: Path) -> None:
    both = tmp_path / "both.txt"
    old = (SAMPLES / "alltoall_old.txt").read_text()
    both.write_text((SAMPLES / "all_reduce_perf.txt").read_text() + "$ ./build/alltoall_perf -g 8\n" + old)
    found = read(both)
    assert [(r.name, r.note) for r in found.rows[4:8]] == [
        ("all_reduce", "out of place, 2 hosts"), ("all_reduce", "in place, 2 hosts"),
        ("all_to_all", "out of place"), ("all_to_all", "in place"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("   85.12", "   -5.12"), "line 19: time = -5.12: must be a finite number, at least 0"),
        (("   85.12", "    0.00"), "line 19: time = 0: must be greater than 0"),
        (("   85.12", "   eightyfive"), "line 19: time = 'eightyfive': not a number"),
        (("#  Rank  4 ", "#  Rank  3 "), "line 11: rank 3 appears twice: built without MPI"),
        (("   2270.5", "   4270.5"), "line 21, out of place: 268435456 bytes in 4270.5 us are not 118.23 GB/s"),
        (("float     sum      -1    85.12   12.32", "float    85.12"), "line 19: has 10 fields, the header 13"),
        (("#       size", "#       seize"), "no row of sizes and times"),
    ],
)
def test_broken_output_of_nccl_tests(tmp_path: Path, change: tuple[str, str], rule: str) -> None:
    refused(rewritten(tmp_path, "all_reduce_perf.txt", change), rule)


# Training logs --------------------------------------------------------------------------------------------------------


def test_a_megatron_log_by_hand() -> None:
    """Of six lines the first two go by number, the third (8.7 s, above 1.5 x 4.31) by its time."""
    [row] = read(SAMPLES / "megatron.log", "megatron").rows
    assert (row.kind, row.seconds, row.samples, row.devices, row.date) == (
        "step", pytest.approx(4.310), 3, 64, "2025-03-14",
    )  # fmt: skip
    assert (row.p10_s, row.p90_s) == (pytest.approx(4.294), pytest.approx(4.326))
    assert row.flops == pytest.approx(4.310 * 405.0e12) and row.note.startswith("global batch of 128; ")
    [row] = read(SAMPLES / "megatron.log", warmup=1).rows
    assert (row.seconds, row.samples) == (pytest.approx(4.330), 5)


def test_a_log_that_begins_with_a_bracket_is_no_json(tmp_path: Path) -> None:
    text = (SAMPLES / "megatron.log").read_text()
    path = tmp_path / "megatron.log"
    path.write_text("".join(f"[default0]:{line}\n" for line in text.splitlines()))
    [row], [plain] = read(path).rows, read(SAMPLES / "megatron.log").rows
    assert (row.seconds, row.samples, row.devices) == (plain.seconds, plain.samples, plain.devices)


def test_a_maxtext_log_by_hand() -> None:
    """Step 1 is faster than it can be: it is timed before step 0 has ended."""
    [row] = read(SAMPLES / "maxtext.log").rows
    assert (row.seconds, row.samples, row.devices) == (pytest.approx(2.050), 3, 16)
    assert row.flops == pytest.approx(2.050 * 123.350e12, rel=1e-4)
    assert row.note == "8192 tokens a device; FLOPs by MaxText's own count"


def test_a_log_that_goes_on(tmp_path: Path) -> None:
    """Begun again at step 1, it warms up again. Another batch is another row."""
    text = (SAMPLES / "megatron.log").read_text()
    again = text.replace("global batch size:   128", "global batch size:   256").replace(
        "iteration        ", "iteration       1"
    )
    lower = text.replace("elapsed time per iteration (ms): 43", "elapsed time per iteration (ms): 53")
    path = tmp_path / "megatron.log"
    path.write_text(text + lower + again)
    found = read(path)
    assert [(r.note.partition(";")[0], r.samples) for r in found.rows] == [
        ("global batch of 128", 6), ("global batch of 256", 6)
    ]  # fmt: skip
    assert found.notes[0] == "6 of 18 lines left out as warm-up, in 2 run(s)"


@given(st.lists(st.floats(0.5, 2.0), min_size=8, max_size=30), st.integers(0, 6), st.floats(6.5, 100.0))
def test_slow_first_steps_never_count(times: list[float], slow: int, factor: float) -> None:
    """However many of the first third are slow, none of them is left, and nothing after the first one that is."""
    slow = min(slow, len(times) // 3)
    steps = [Step(i, i, t * (factor if i < slow else 1), 1, None, "", "") for i, t in enumerate(times)]
    kept = settled(steps, None)
    assert kept == steps[len(steps) - len(kept) :]
    # At most 2 s in the later half and at least 0.5 x 6.5 s before: more than 1.5 times its median.
    assert kept and kept[0].number >= max(slow, 2)


def test_logs_that_say_too_little(tmp_path: Path) -> None:
    world = ("using world size: 64", "using a world")
    refused(rewritten(tmp_path, "megatron.log", world), "does not say how many devices there were: say --devices")
    assert read(rewritten(tmp_path, "megatron.log", world), devices=32).rows[0].devices == 32
    slow = ("(ms): 4310.0", "(ms): -4310.0")
    refused(
        rewritten(tmp_path, "megatron.log", slow),
        r"line 6: elapsed time per iteration \(ms\) = -4310: must be a finite",
    )
    refused(rewritten(tmp_path, "maxtext.log", ("seconds: 2.050", "seconds: nan")), "line 4: seconds = nan: must be")
    refused(SAMPLES / "megatron.log", "all are warm-up", warmup=6)
    refused(SAMPLES / "megatron.log", "no line of a training step: not a log of MaxText", "maxtext")
    refused(SAMPLES / "README.md", "of none of the known formats; --format says which of kineto")


# CSV ------------------------------------------------------------------------------------------------------------------

MAPPED: dict[str, Any] = {"kind": "kernel", "columns": {"seconds": "time_us", "name": "what"}, "unit": "us"}


def test_a_table_by_hand() -> None:
    found = read(SAMPLES / "products.csv", **MAPPED)
    assert [(r.id, r.name, r.bytes) for r in found.rows] == [
        ("products.csv:2", "product", 2**20), ("products.csv:3", "grouped_product", 2**21)
    ]  # fmt: skip
    assert [r.seconds for r in found.rows] == [pytest.approx(41.5e-6), pytest.approx(212.25e-6)]
    assert found.notes == ("columns left out: groups, m, gpu_note",)


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        ({"columns": {"seconds": "time_mus"}}, r"has no column 'time_mus'; did you mean 'time_us'\?"),
        ({"columns": {"second": "time_us"}}, r"no column 'second' of the table; did you mean 'seconds'\?"),
        ({"columns": {"seconds": "what"}}, "line 2: what = 'product': not a number"),
        ({"columns": {"seconds": "time_us"}}, "line 2: no name"),
        ({"columns": {"name": "what"}}, "line 2: seconds is empty"),
        ({"kind": "kernle"}, r"line 2: kind = 'kernle': known: .*; did you mean 'kernel'\?"),
        ({"kind": ""}, "line 2: no kind: say --kind"),
        ({"unit": "min"}, "--unit 'min': known: s, ms, us, ns"),
    ],
)
def test_wrong_mappings(told: dict[str, Any], rule: str) -> None:
    refused(SAMPLES / "products.csv", rule, **{**MAPPED, **told})


def test_broken_tables(tmp_path: Path) -> None:
    refused(rewritten(tmp_path, "products.csv", ("212.25", "-1")), "line 3: seconds = -1e-06: must be", **MAPPED)
    refused(rewritten(tmp_path, "products.csv", ("8,4096,,", "8,4096,")), "line 3: has not as many fields", **MAPPED)
    refused(rewritten(tmp_path, "products.csv", ("groups", "what")), "a column appears twice", **MAPPED)
    refused(rewritten(tmp_path, "products.csv", ("first", '"first')), "not a CSV table", **MAPPED)


# The command ----------------------------------------------------------------------------------------------------------


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "moecast", "import", *arguments]
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_the_command(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    samples = [f"tests/samples/{n}" for n in ("kineto.json", "megatron.log", "all_reduce_perf.txt")]
    out, _ = run(*samples, "--chip", "H100", "-o", str(table), "--json", "--job", "examples/tiny-moe.yaml")
    said = json.loads(out)
    assert [(f["format"], f["rows"]) for f in said["files"]] == [
        ("kineto", {"op": 5, "collective": 1, "step": 1}), ("megatron", {"step": 1}), ("nccl-tests", {"collective": 6})
    ]  # fmt: skip
    back = read_table(table)
    assert len(back.rows) == said["rows"] == 14
    assert {r.chip for r in back.rows} == {"h100-sxm"} and {r.job_hash for r in back.rows} == set(back.jobs)
    assert all(isinstance(r, Measurement) for r in back.rows)
    out, _ = run(samples[0], samples[0], "--chip", "h800")
    assert max(map(len, out.splitlines())) <= 80
    assert "the chip is said to be h800, the trace was taken on NVIDIA H100 80GB HBM3" in " ".join(out.split())
    before = table.read_bytes()
    _, err = run(str(SAMPLES / "README.md"), "--chip", "h100-sxm", "-o", str(table), code=2)
    assert err.startswith("moecast: ") and err.count("\n") == 1 and table.read_bytes() == before
    assert "did you mean 'h800'" in run(samples[0], "--chip", "h8000", code=2)[1]
    assert "must end in .parquet or .csv" in run(samples[0], "--chip", "h800", "-o", "t.json", code=2)[1]
    assert "no such file" in run("absent.json", "--chip", "h800", code=2)[1]
    assert "write it as NAME=COLUMN" in run(samples[0], "--chip", "h800", "--column", "seconds", code=2)[1]
