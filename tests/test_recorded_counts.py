"""Recorded counts of experts: averaged, replayed as loads, and every fault that a table can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from load_questions import question
from simulator.engine.loads import expert_loads
from simulator.job.recorded import read_counts

Array = NDArray[np.float64]
GOOD = "step,layer,expert,tokens\n" + "".join(
    f"{s},{i},{e},{10 * e + s}\n" for s in (5, 6) for i in (1, 3) for e in range(4)
)


def counts_of(folder: Path, text: str | bytes, name: str = "t.csv") -> Array:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_counts(name, folder, [1, 3], 4, [100, 100])


def test_recorded_steps_are_averaged(tmp_path: Path) -> None:
    assert counts_of(tmp_path, GOOD).tolist() == [[5.5, 15.5, 25.5, 35.5]] * 2
    head, *rows = GOOD.splitlines()
    assert counts_of(tmp_path, "\n".join([head, *reversed(rows)])).tolist() == [[5.5, 15.5, 25.5, 35.5]] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("step,layer,expert,tokens\n", "has no rows"),
        ("step,layer,expert\n1,1,1\n", "has no column tokens"),
        ("step,layer,expert,token\n1,1,1,1\n", "unknown column 'token'; did you mean 'tokens'?"),
        ("step,layer,expert,tokens,tokens\n1,1,1,1,1\n", "unknown column"),
        (GOOD.replace("5,1,2,25", "5,1,2,nan"), "line 4: tokens = nan: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,inf"), "line 4: tokens = inf: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,-1"), "line 4: tokens = -1: must not be negative"),
        (GOOD.replace("5,1,2,25", "5,1,2,many"), "line 4: tokens = 'many': must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,"), "line 4: tokens = nan: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2"), "line 4: tokens = nan: must be a finite number"),
        (GOOD.replace("5,1,2,25", "5,1,2,25,7"), "not a CSV table"),
        (GOOD.replace("5,1,2,25", '5,1,2,"25'), "not a CSV table"),
        (GOOD.replace("5,1,2,25", "5,1,2,1e300"), "line 4: tokens = 1e+300: is too large"),
        (GOOD.replace("5,1,2,25", "5,1,2," + "9" * 30), "line 4: tokens = 1e+30: is too large"),
        (GOOD.replace("5,1,2,25", "5,1,1.5,25"), "line 4: expert = 1.5: must be a whole number"),
        (GOOD.replace("5,1,2,25", "5,1,9,25"), "line 4: expert = 9: the model's experts are 0 to 3"),
        (GOOD.replace("5,1,2,25", "5,2,2,25"), "line 4: layer = 2: the model's layers with experts are 1, 3"),
        (GOOD.replace("5,1,2,25", "5,-1,2,25"), "line 4: layer = -1: the model's layers"),
        (GOOD.replace("5,1,2,25\n", ""), "step 5, layer 1, expert 2 is missing"),
        (GOOD.replace("6,3,3,36\n", ""), "step 6, layer 3, expert 3 is missing"),
        (GOOD.replace("5,1,2,25", "5,1,1,25"), "step 5, layer 1, expert 1 appears twice"),
        (GOOD.replace("5,1,2,25", "5,1,2,99"), "step 5, layer 1 has 154 tokens x k; the job sends 100"),
        ("step,layer,expert,tokens\n" + "".join(f"0,{i},{e},0\n" for i in (1, 3) for e in range(4)), "has no tokens"),
        (GOOD.replace("5,1,2,25\n", "\n5,1,2,25\n"), "line 4: step = nan: must be a finite number"),
        (b"\x00\x01\x02" * 50, "not a text file (NUL byte)"),
        (b"step,layer,expert,tokens\n\xff\xfe,1,1,1\n", "not a text file (UTF-8)"),
        ("\x1b[2J" * 5 + "\n1\n", "unknown column"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(QuestionError) as refused:
        counts_of(tmp_path, text)
    said = str(refused.value)
    assert says in said and said.startswith("training.routing.file = 't.csv'")
    assert said.isprintable() and len(said) < 300


def test_files_that_are_no_table_of_the_job_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "job"
    inner.mkdir()
    (tmp_path / "t.csv").write_text(GOOD)
    (inner / "link.csv").symlink_to(tmp_path / "t.csv")
    (inner / "t.txt").write_text(GOOD)
    (inner / "t.parquet").write_text(GOOD)
    (inner / "long.csv").write_text(GOOD)
    monkeypatch.setattr("simulator.job.recorded.MAX_BYTES", 50)
    for name, says in {
        "../t.csv": "must lie in the job's folder", "link.csv": "must lie in the job's folder",
        str(tmp_path / "t.csv"): "must lie in the job's folder", "a\0b.csv": "not a path", "x" * 5000: "name too long",
        "none.csv": "no such file", ".": "not a file", "long.csv": "bytes; at most 50 are read",
    }.items():  # fmt: skip
        with pytest.raises(QuestionError) as refused:
            read_counts(name, inner, [1, 3], 4, [100, 100])
        assert says in str(refused.value) and str(refused.value).isprintable()
    monkeypatch.undo()
    for name, says in {"t.txt": "must end in .csv or .parquet", "t.parquet": "not a Parquet table"}.items():
        with pytest.raises(QuestionError, match=says):
            read_counts(name, inner, [1, 3], 4, [100, 100])


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd

    expected = counts_of(tmp_path, GOOD)
    table = pd.read_csv(tmp_path / "t.csv")
    table.to_parquet(tmp_path / "t.parquet")
    assert (read_counts("t.parquet", tmp_path, [1, 3], 4, [100, 100]) == expected).all()
    table.assign(tokens=-table.tokens - 1.5).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(QuestionError, match=r"row 0: tokens = -6\.5: must not be negative"):
        read_counts("t.parquet", tmp_path, [1, 3], 4, [100, 100])


def test_replayed_loads_are_the_recorded_ones(tmp_path: Path) -> None:
    """Without noise each microbatch has its part of the recorded counts; contiguous is by the experts' own index."""
    counts = np.arange(64.0) + 1
    sent = 256 * 1024 * 4
    rows = [f"0,{i},{e},{counts[e] / counts.sum() * sent}" for i in range(2) for e in range(64)]
    (tmp_path / "t.csv").write_text("\n".join(["step,layer,expert,tokens", *rows]))
    job, degrees, _ = question({"model": "replay", "file": "t.csv"}, layers=2)
    still = expert_loads(job, degrees, 2, 0, folder=tmp_path, noise=False)
    by_rank = counts.reshape(16, 4).sum(axis=1) / counts.sum()
    assert still.rank_loads(1, 3, 1) == pytest.approx(by_rank * 16 * 1024 * 4)
    assert still.excess(0, 0, 0) == pytest.approx(by_rank.max() * 16 - 1)
    noisy = expert_loads(job, degrees, 2, 0, folder=tmp_path)
    assert noisy.busiest_overall() == pytest.approx(still.busiest_overall(), rel=0.01)
