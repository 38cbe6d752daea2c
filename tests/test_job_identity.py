"""The same question has the same answer and hash however it is written; another has another; anything may be asked."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles import QuestionError
from job_draws import Data, answer, jobs
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job

ROOT = Path(__file__).parents[1]


@given(jobs(), st.randoms(use_true_random=False))
def test_the_order_of_keys_and_of_listed_layers_changes_nothing(data: Data, random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    other = shuffled(data)
    if isinstance(other["model"], dict) and "layers" in other["model"]["decoder"].get("moe", {}):
        listed = other["model"]["decoder"]["moe"]
        listed["layers"] = listed["layers"][::-1]
    one, two = answer(data).to_dict(), answer(other).to_dict()
    one["job"]["hash"] = two["job"]["hash"]
    assert json.dumps(one) == json.dumps(two)


@given(jobs())
def test_the_same_job_has_the_same_answer_and_hash_however_it_is_written(data: Data) -> None:
    """Byte for byte; from YAML; from the resolved job's own mapping; the name is not part of the question."""
    job = load_job(data)
    text = json.dumps(forecast(job, engine="closed-form").to_dict())
    assert json.dumps(answer(copy.deepcopy(data)).to_dict()) == text
    written = load_job(yaml.safe_load(yaml.safe_dump(data)))
    resolved = load_job(job.model_dump(mode="json"))
    named = load_job(data | {"name": "other"})
    assert job.hash == written.hash == resolved.hash == named.hash and len(job.hash) == 64
    assert resolved == job


def test_the_answer_does_not_depend_on_the_order_of_sets() -> None:
    code = (
        "import json, moecast; job = moecast.load_job('examples/deepseek-v3.yaml');"
        "print(json.dumps(moecast.forecast(job, engine='closed-form').to_dict()))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(answers) == 1


BASE: Data = {
    "model": {
        "hidden": 512, "vocab": 1024,
        "decoder": {
            "layers": 4, "attention": {"heads": 8, "kv_heads": 4, "head_dim": 64},
            "ffn": {"hidden": 1024, "activation": "gelu"},
            "moe": {"experts": 8, "top_k": 2, "expert": {"hidden": 512, "activation": "relu"}, "every": 2},
        },
    },
    "cluster": {"chip": {"name": "h100-sxm", "peak_tflops": {"bf16": 900.0}}, "nodes": 1},
    "plan": {
        "data": 2, "tensor": 2, "pipeline": 2, "expert": 2, "shard": "optimizer", "microbatch_sequences": 1,
        "stages": [2, 2], "placement": {"order": ["tensor", "context", "data", "pipeline"]},
    },
    "batch": {"sequences": 8, "length": 256},
    "training": {
        "precision": "bf16", "remat": {"recompute": ["norms"]}, "dtypes": {"master": "fp32"},
        "capacity": {"factor": 1.25, "basis": "tokens", "group_tokens": 64},
        "dispatch": {"layout": "slots"}, "routing": {"model": "zipf", "exponent": 1.0},
    },
    "software": {"stack": "megatron", "overlap": {"all_to_all": True}},
}  # fmt: skip


def test_the_hash_changes_with_every_field() -> None:
    base = load_job(BASE).hash
    seen = {base}
    for changes in (
        "model.hidden=1024", "model.vocab=2048", "model.decoder.layers=5", "model.decoder.attention.head_dim=32",
        "model.decoder.moe.top_k=1", "model.decoder.moe.expert.bias=true", "cluster.nodes=2", "cluster.chip=h800",
        "cluster.chip.peak_tflops.bf16=901", "plan.data=4", "plan.stages=null", "plan.shard=none",
        "plan.placement.order=[context, tensor, data, pipeline]", "batch.sequences=16", "batch.length=128",
        "training.precision=fp32", "training.remat=full", "training.dtypes.master=bf16", "training.capacity=dropless",
        "training.capacity.eval_factor=2", "training.dispatch.transport=deepep", "training.routing.exponent=2",
        "software.stack=maxtext", "software.overlap.all_to_all=false", "software.release='26.02'",
    ):  # fmt: skip
        changed = load_job(BASE, [changes]).hash
        assert changed not in seen, changes
        seen.add(changed)
    assert load_job(BASE, ["name=x", "model.name=y", "model.notes=z", "model.source=w"]).hash == base


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in `data`, sections included."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    out = copy.deepcopy(data)
    here = out
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return out


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 20), st.sampled_from([10**9, 10**10, -(10**30), 10**400]),
    st.floats(), st.text(max_size=5), st.lists(st.integers(-1, 9), max_size=3), st.just({}),
    st.dictionaries(st.sampled_from(["name", "model", "layers", "factor", "preset"]), st.integers(0, 3), max_size=2),
    st.sampled_from(["full", "dropless", "parameters", "interleaved", "Et|tttL", "t*9", "x2", "../x.yaml", "\0.json"]),
)  # fmt: skip


@settings(max_examples=400)
@given(st.data())
def test_any_field_may_hold_anything(more: st.DataObject) -> None:
    """A job with some of its entries replaced is answered or refused in one line, and nothing else."""
    data: Data = more.draw(st.one_of(st.just(BASE), jobs()))
    for _ in range(more.draw(st.integers(1, 3))):
        data = replaced(data, more.draw(st.sampled_from(list(leaves(data)))), more.draw(ANYTHING))
        if not isinstance(data, dict):
            break
    said = "answered"
    try:
        json.dumps(answer(data).to_dict(), allow_nan=False)
    except QuestionError as error:
        said = str(error)
    assert said and "\n" not in said and len(said) < 2000
