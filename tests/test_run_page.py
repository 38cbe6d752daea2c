"""The page of a training run: what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from hw_profiles.errors import QuestionError
from reports.run_page import write_run_page


def a_run(folder: Path) -> Path:
    """A run of 40 steps: two layers with four experts."""
    folder.mkdir()
    lines = [{"step": s, "nats": 6 - 0.1 * s, "held_out": {"nats": 3.5}} for s in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    (folder / "entropies.json").write_text('{"unigram entropy": 3.25, "bigram entropy": 2.5}', encoding="utf-8")
    rows = [
        {"step": s, "layer": layer, "wanted": 100, "dropped": 7, "load": 1.5, "rank_load": 1.25, "entropy_nats": 1.3,
         "wanted_E": [40, 30, 20, 10]}
        for s in range(1, 41) for layer in (1, 3)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "router.parquet")
    return folder


def test_the_page_shows_losses_entropies_drops_and_loads(tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    write_run_page(a_run(tmp_path / "run"), out)
    text = out.read_text(encoding="utf-8")
    body = text[text.index("<main>") :]
    # Steps 21 to 40 lose 6 - 0.1 x 30.5.
    assert "2.9500" in body and "3.2500" in body and "7.00%" in body
    assert len(re.findall(r'<div id="(?:loss|drops|load|ranks|entropy|heat1|heat3)"', body)) == 7
    assert "default-src 'none'" in text
    write_run_page(tmp_path / "run", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == out.read_bytes()


def test_a_dense_run_has_no_routers(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / "router.parquet").unlink()
    write_run_page(folder, tmp_path / "run.html")
    assert "<h2>Routers</h2>" not in (tmp_path / "run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", None, "is no run's folder"),
        ("metrics.jsonl", b'{"step": 1}\n', "not a run's metrics"),
        ("metrics.jsonl", b"{", "not a run's metrics"),
        ("metrics.jsonl", b"", "has no steps yet"),
        ("router.parquet", b"PAR1", "not a run's telemetry"),
    ],
)
def test_what_is_no_run_is_named(file: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(QuestionError, match=said):
        write_run_page(folder, tmp_path / "run.html")
    assert not (tmp_path / "run.html").exists()
