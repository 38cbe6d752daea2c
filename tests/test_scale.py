"""The small sibling of every model runs on every number of devices, and is the same job when read back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.job.load import load_job
from simulator.job.presets import load_preset, preset_names
from simulator.job.rules import resolve
from simulator.job.scale import changes, scale_job
from trainer.mesh import make_axes
from trainer.refuse import check_runnable

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_every_preset_has_a_sibling_that_the_trainer_takes(name: str, devices: int) -> None:
    model = load_preset(name)
    batch = {"sequences": 64, "length": {"encoder": 512, "decoder": 114} if model.encoder else 2048}
    plan = {"expert": 8} if model.moes and all(m.experts % 8 == 0 for m in model.moes) else {}
    job = load_job({"model": name, "cluster": {"chip": "h100-sxm", "nodes": 8}, "plan": plan, "batch": batch})
    small = scale_job(job, devices)
    degrees = resolve(small, resolve_cluster(small.cluster))
    assert degrees.devices == devices
    check_runnable(small, degrees, "cpu")
    axes = make_axes(small, degrees)
    assert axes.size(axes.names) == devices
    assert small.model.family == job.model.family and bool(small.model.moes) == bool(job.model.moes)
    for here, there in zip(small.model.moes, job.model.moes, strict=True):
        assert here.router.kind == there.router.kind and here.top_k <= there.top_k
        assert bool(here.shared_hidden) == bool(there.shared_hidden)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_written_file_is_the_same_job(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.yaml"
    command = [sys.executable, "-m", "moecast", "scale", str(path), "--devices", "4", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    big, small = load_job(path), load_job(out)
    assert small.hash == scale_job(big, 4).hash
    assert f"{len(changes(big, small))} fields changed" in done.stderr


def test_big_degrees_stay_degrees_where_they_fit() -> None:
    small = scale_job(load_job(EXAMPLES / "qwen3-235b-a22b.yaml"), 8)
    p = small.plan
    assert (p.data, p.tensor, p.pipeline, p.expert, p.sequence_parallel, p.shard) == (2, 2, 2, 4, True, "optimizer")
    odd = scale_job(load_job(EXAMPLES / "qwen3-235b-a22b.yaml"), 5).plan
    assert (odd.data, odd.tensor, odd.pipeline) == (5, 1, 1)
    with pytest.raises(QuestionError, match="from 1 to 64"):
        scale_job(small, 65)
