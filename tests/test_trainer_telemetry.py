"""What a run records of its experts and its losses, through resumes and cuts; layers numbered as the simulator does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.engine.loads import moe_layers
from simulator.job.load import job_from_mapping
from simulator.job.rules import resolve
from trainer.metrics import MetricsFile, read_lines
from trainer.telemetry import LayerSeen, Telemetry, imbalance, layer_numbers


@pytest.mark.parametrize(
    ("preset", "length", "plan"),
    [
        ("switch-base-128", {"encoder": 64, "decoder": 64}, {}),
        ("st-moe-l", {"encoder": 64, "decoder": 64}, {}),
        ("deepseek-v3", 64, {}),
        ("moe-32", 64, {}),
        ("mixtral-8x7b", 64, {"pipeline": 2, "data": 1}),
    ],
)
def test_layers_have_the_numbers_that_the_simulator_gives_them(preset: str, length: Any, plan: dict[str, int]) -> None:
    data = {"model": preset, "cluster": {"chip": "cpu-host", "devices": 2}, "batch": {"sequences": 8, "length": length}}
    job = job_from_mapping(data | {"plan": plan})
    degrees = resolve(job, resolve_cluster(job.cluster))
    numbers = layer_numbers(job, degrees)
    found = sorted(int(n) for reports in numbers.values() for report in reports for n in report)
    layers = len(job.model.encoder_layers) + len(job.model.decoder_layers)
    # MTP modules come after the last layer, and the trainer has none.
    assert found == sorted(x.number for x in moe_layers(job, degrees) if x.number < layers)


def seen(step: int) -> LayerSeen:
    counts = np.array([3, 1])
    return LayerSeen(step, 0, counts, counts, 0.5, 1.0, 2.0, imbalance(counts, 2), imbalance(counts, 1))


def test_telemetry_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [int(s) for s in pq.read_table(tmp_path / "routing.parquet")["step"].to_pylist()[::2]]

    first = Telemetry(tmp_path, 0)
    for step in range(1, 8):
        first.add([seen(step)])
        if step % 3 == 0:
            first.publish()
    first.flush()
    assert steps() == [1, 2, 3, 4, 5, 6]
    # Killed after step 7, resumed after step 4; a part that was damaged is dropped.
    (tmp_path / "telemetry" / "routing-00000007.parquet").write_bytes(b"PAR1")
    second = Telemetry(tmp_path, 4)
    second.add([seen(5)])
    second.publish()
    assert steps() == [1, 2, 3, 4, 5]
    assert pq.read_table(tmp_path / "router.parquet")["step"].to_pylist() == [1, 2, 3, 4, 5]
    assert imbalance(np.array([3, 1]), 2) == 1.5 and imbalance(np.array([0, 0]), 2) == 1


def test_telemetry_files_hold_the_newest_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.telemetry.MOST_ROWS", 6)
    telemetry = Telemetry(tmp_path, 0)
    for step in range(1, 10):
        telemetry.add([seen(step)])
        telemetry.flush()
    telemetry.publish()
    assert set(pq.read_table(tmp_path / "routing.parquet")["step"].to_pylist()) == {7, 8, 9}
    assert isinstance(pq.read_schema(tmp_path / "routing.parquet"), pa.Schema)


def test_a_metrics_file_that_was_cut_goes_on_after_the_step(tmp_path: Path) -> None:
    lines = [json.dumps({"step": n, "nats": 1.0}) + "\n" for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "na')
    file = MetricsFile(tmp_path, 2, tensorboard=False)
    file.write({"step": 3, "nats": 2.0}, board=False)
    file.close()
    assert [r["nats"] for _, r in read_lines(tmp_path / "metrics.jsonl")] == [1.0, 1.0, 2.0]
    (tmp_path / "metrics.jsonl").write_text("no\n")
    with pytest.raises(QuestionError, match=r"metrics\.jsonl, line 1: not a line of a run's metrics"):
        read_lines(tmp_path / "metrics.jsonl")
