"""A run from its first batch to its folder: losses, evaluation, routing, checkpoints, resuming, fine-tuning."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from hw_profiles.errors import QuestionError, WorkFailed
from hw_profiles.loader import resolve_cluster
from runs import tiny, train, write_tiny
from simulator.analysis.forecast import forecast
from simulator.job.job import Job
from simulator.job.load import job_from_mapping, merge
from simulator.job.rules import resolve
from trainer.checkpoint import MANIFEST, Damaged, newest_good, restore_parameters, verified
from trainer.folder import check_folder, first_difference
from trainer.metrics import read_lines
from trainer.processes import Watch
from trainer.report import Result
from trainer.run import run
from trainer.step import Trainer

STEPS = 60
SETTINGS = [
    f"training.run.steps={STEPS}", "training.run.evaluate_every=30", "training.run.evaluation_batches=2",
    "training.run.checkpoint_every=25", "training.run.keep_checkpoints=2",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run of the tiny job on the default corpus: the standard library."""

    job: Job
    folder: Path
    out: Path
    result: Result

    def lines(self) -> list[dict[str, Any]]:
        return [record for _, record in read_lines(self.out / "metrics.jsonl")]


def devices() -> list[Any]:
    import jax

    return list(jax.devices())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    job, out = tiny(*SETTINGS), folder / "runs" / "tiny"
    return Finished(job, folder, out, run(job, folder, out, devices=devices()))


# What a run does


def test_the_loss_falls_below_the_unigram_entropy_of_the_standard_library(finished: Finished) -> None:
    lines, result = finished.lines(), finished.result
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert lines[0]["nats"] == pytest.approx(math.log(384), abs=0.1)
    assert result.nats == pytest.approx(np.mean([r["nats"] for r in lines[-10:]]))
    assert result.bigram_nats < result.nats < result.unigram_nats < lines[0]["nats"]
    assert result.steps == STEPS and result.checkpoint == STEPS and result.hash == finished.job.hash


def test_a_line_of_metrics_tells_losses_rate_drops_and_speed(finished: Finished) -> None:
    line = finished.lines()[9]
    router = finished.job.training.learning.router
    weighted = router.balance_loss * line["router"]["balance"] + router.z_loss * line["router"]["z"]
    assert line["loss"] == pytest.approx(line["nats"] + 2 * weighted)
    assert line["learning_rate"] == pytest.approx(0.01)
    assert line["tokens_per_s"] == pytest.approx(8 * 32 / line["seconds"])
    assert 0 < line["dropped"] < 1 and 1 <= line["rank_load"] <= line["load"] and line["gradient_norm"] > 0
    assert [r["step"] for r in finished.lines() if "held_out_nats" in r] == [30, 60]
    assert 2 < finished.lines()[-1]["held_out_nats"] < 4
    events = list((finished.out / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1 and events[0].stat().st_size > 1000


def test_a_forecast_replays_what_the_run_recorded(finished: Finished) -> None:
    table = pq.read_table(finished.out / "routing.parquet").to_pandas()
    assert list(table.columns) == ["step", "layer", "expert", "tokens"] and len(table) == STEPS * 2 * 4
    assert (table.groupby(["step", "layer"])["tokens"].sum() == 8 * 32 * 2).all()
    replay = {"model": "replay", "file": "routing.parquet"}
    job = finished.job.model_dump(mode="json")
    job = merge(job, {"training": {"routing": replay}, "cluster": {"devices": 4}, "plan": {"expert": 4}})
    answer = forecast(job_from_mapping(job), folder=finished.out)
    mean = table.groupby(["layer", "expert"])["tokens"].mean().unstack()
    assert answer.routing.max_over_mean_load == pytest.approx((mean.max(axis=1) / mean.mean(axis=1)).max(), rel=0.2)
    assert answer.routing.model == "replay"


def test_a_row_per_step_and_layer_agrees_with_the_metrics(finished: Finished) -> None:
    table = pq.read_table(finished.out / "router.parquet").to_pandas()
    lines = finished.lines()
    assert len(table) == 2 * STEPS and (table.wanted == 512).all() and (table.kept + table.dropped == 512).all()
    for step in (1, STEPS):
        rows = table[table.step == step]
        assert rows.dropped.sum() / 1024 == pytest.approx(lines[step - 1]["dropped"])
        assert rows.load.mean() == pytest.approx(lines[step - 1]["load"])
        assert [sum(x) for x in rows.kept_E] == rows.kept.tolist()
    # A router starts almost undecided.
    assert table.entropy_nats[0] == pytest.approx(math.log(4), abs=0.05) and table.entropy_nats.max() <= math.log(4)
    assert (table.logit_rms <= table.logit_largest).all() and (table.logit_rms > 0).all()


# Checkpoints


def damage_cut(path: Path) -> str:
    file = max((path / "arrays").rglob("*"), key=lambda x: x.stat().st_size * x.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    return r"bytes, not"


def damage_flip(path: Path) -> str:
    file = max((path / "arrays").rglob("*"), key=lambda x: x.stat().st_size * x.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    return r"has other bytes than were written"


def damage_remove(path: Path) -> str:
    (path / "arrays/params/_METADATA").unlink()
    return r"arrays/params/_METADATA: no such file"


def damage_manifest(path: Path) -> str:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"step": 60', '"step": 61'))
    return r"manifest\.json is not as it was written"


def damage_manifest_end(path: Path) -> str:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:-10])
    return r"manifest\.json cannot be read"


DAMAGES = [damage_cut, damage_flip, damage_remove, damage_manifest, damage_manifest_end]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], str], finished: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished.out / "checkpoints", folder)
    assert sorted(x.name for x in folder.iterdir()) == ["00000050", "00000060"]
    said: list[str] = []
    rule = damage(folder / "00000060")
    with pytest.raises(Damaged, match=rule):
        verified(folder / "00000060")
    found = newest_good(folder, said.append)
    assert found is not None and found.step == 50 and len(said) == 1
    assert said[0].startswith("checkpoint of step 60 is damaged: ")
    damage_cut(folder / "00000050")
    with pytest.raises(WorkFailed, match=r"no checkpoint is whole \(2 damaged\)"):
        newest_good(folder, said.append)


def test_an_unfinished_checkpoint_is_no_checkpoint(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished.out / "checkpoints", folder)
    (folder / "00000060" / MANIFEST).unlink()
    said: list[str] = []
    found = newest_good(folder, said.append)
    assert found is not None and found.step == 50
    assert said == ["checkpoint of step 60: was never finished; looking at the one before"]
    (folder / "00000050" / MANIFEST).unlink()
    assert newest_good(folder, said.append) is None


def test_a_run_goes_on_with_two_devices(tmp_path: Path) -> None:
    job = write_tiny(tmp_path)
    cache = tmp_path / "compiled"
    out = tmp_path / "run"
    one = ("--out", out, "--set", "training.learning.data.files=[text.txt]")
    code, _, error = train(job, *one, "--steps", 6, cache=cache)
    assert code == 0, error
    shutil.copytree(out, tmp_path / "other")
    assert train(job, *one, "--steps", 9, "--resume", cache=cache)[0] == 0
    other = ("--out", tmp_path / "other", "--devices", 2, "--set", "plan.expert=2", "--set", "plan.shard=parameters")
    code, printed, error = train(job, *other, "--steps", 9, "--resume", cache=cache)
    assert code == 0, error
    assert "resumed after 6" in printed and "2 cpu devices" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    expected, found = ([r["nats"] for _, r in read_lines(x / "metrics.jsonl")] for x in (out, tmp_path / "other"))
    assert len(found) == 9 and found == pytest.approx(expected, rel=1e-4)


def test_a_folder_of_another_job_is_refused_by_the_first_field_that_differs(finished: Finished) -> None:
    other = tiny(*SETTINGS, "training.learning.learning_rate.peak=0.02")
    with pytest.raises(QuestionError, match=r"training\.learning\.learning_rate\.peak = 0\.01 there, 0\.02 in the job"):
        check_folder(finished.out, other, resume=True)
    with pytest.raises(QuestionError, match="--resume goes on with it"):
        check_folder(finished.out, finished.job, resume=False)
    # Another plan, software, length of the run: the same run.
    same = tiny("training.run.steps=3", "plan.expert=1", "software.stack=moecast", "name=other")
    assert check_folder(finished.out, same, resume=True)
    assert first_difference({"a": [1], "b": 2}, {"a": [1], "b": 2}) is None


# Fine-tuning


def test_fine_tuning_begins_with_the_parameters_and_keeps_what_is_frozen(finished: Finished) -> None:
    start = "training.learning.start={checkpoint: runs/tiny, freeze: [others]}"
    job = tiny("training.run.steps=3", "training.learning.seed=1", start)
    result = run(job, finished.folder, finished.folder / "tuned", devices=devices())
    assert result.steps == 3 and result.resumed_from is None
    first = next(r["nats"] for _, r in read_lines(finished.folder / "tuned/metrics.jsonl"))
    assert first < finished.result.unigram_nats < finished.lines()[0]["nats"]
    trainer = Trainer.of(job, resolve(job, resolve_cluster(job.cluster)), devices())
    watch = Watch()
    before, after = (
        restore_parameters(finished.folder / name, trainer, watch, print, name) for name in ("runs/tiny", "tuned")
    )
    watch.close()
    assert np.array_equal(before["embedding"]["table"], after["embedding"]["table"])
    experts = [tree["decoder"]["segments"][0][0]["moe"]["experts"]["up"] for tree in (before, after)]
    assert not np.array_equal(*experts)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("training.learning.start={checkpoint: runs/none}", "holds no checkpoint"),
        ("training.learning.start={checkpoint: ../other}", "must lie in the job's folder, without '..'"),
        ("model.vocab=400", r"params\['embedding'\]\['table'\]: shape \[384, 32\] there, \[400, 32\] in the job"),
    ],
)
def test_weights_that_do_not_serve_are_refused_by_name(change: str, rule: str, finished: Finished) -> None:
    start = "training.learning.start={checkpoint: runs/tiny}"
    out = finished.folder / "refused"
    try:
        with pytest.raises(QuestionError, match=rule):
            run(tiny(start, change), finished.folder, out, devices=devices(), steps=1)
    finally:
        shutil.rmtree(out, ignore_errors=True)
