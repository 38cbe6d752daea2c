"""Reading a job: from a file or a mapping, with overrides, presets and Hugging Face configurations filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.files import inside
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import find_not_finite, parse_yaml, read_text, read_yaml
from simulator.job.job import Job
from simulator.job.model import Model
from simulator.job.presets import load_preset


def _read_model_file(path: Path) -> Model:
    from simulator.job.huggingface import is_huggingface, model_from_huggingface

    if path.suffix == ".json":
        try:
            data = json.loads(read_text(path))
        except QuestionError:
            raise
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise QuestionError(f"{path}{line}: not JSON") from None
    else:
        data = read_yaml(path)
    if not isinstance(data, dict) or not is_huggingface(data):
        return validate(Model, data, str(path))
    name = path.resolve().parent.name if path.stem == "config" else path.stem
    try:
        return model_from_huggingface(data, name)
    except QuestionError as error:
        raise QuestionError(f"{path}{str(error).removeprefix(name)}") from None


def _model_mapping(value: Any, folder: Path) -> Any:
    """The model section as a mapping, whatever form the job gives it in."""
    if isinstance(value, str):
        if value.endswith((".json", ".yaml", ".yml")):
            start = f"model = {value!r:.60}"
            return _read_model_file(inside(value, folder, start, "a model file must lie in the job's folder"))
        return load_preset(value)
    if isinstance(value, dict) and "preset" in value:
        base = load_preset(str(value["preset"])).model_dump(exclude_unset=True)
        return merge(base, {k: v for k, v in value.items() if k != "preset"})
    if isinstance(value, dict):
        return {"name": "inline"} | value
    if isinstance(value, Model):
        return value
    kinds = "a preset's name, a model file in the job's folder, or a mapping of keys"
    raise QuestionError(f"model = {'null' if value is None else repr(value)[:60]}: must be {kinds}")


def merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, mapping by mapping."""
    out = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(dict(out[key]), value) if both else value
    return out


def parse_override(text: str) -> tuple[list[str], Any]:
    """`plan.expert=16` as (["plan", "expert"], 16); QuestionError for anything else."""
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise QuestionError(f"--set {text}: write it as field.name=value")
    return path, parse_yaml(value, f"--set {name.strip()}")


def _apply(data: dict[str, Any], path: Sequence[str], value: Any, folder: Path) -> None:
    here = data
    for depth, key in enumerate(path[:-1]):
        inner = here.get(key)
        if isinstance(inner, str) and depth == 0 and key == "model":
            inner = _model_mapping(inner, folder).model_dump(exclude_unset=True)
        elif isinstance(inner, str) and depth == 0 and key == "cluster":
            from hw_profiles.loader import cluster_mapping

            inner = cluster_mapping(inner)
        elif isinstance(inner, str) and list(path[: depth + 1]) == ["cluster", "chip"]:
            inner = {"name": inner}
        elif inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise QuestionError(f"--set {'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a section")
        here[key] = dict(inner)
        here = here[key]
    here[path[-1]] = value


def job_from_mapping(
    data: Any, *, overrides: Sequence[str] = (), folder: Path = Path(), where: str = "job", name: str = "job"
) -> Job:
    """The validated job in `data`, with `overrides` such as `plan.expert=16` applied first.

    Raises QuestionError, one line naming field, value and rule. Model files are looked for in `folder` only.
    """
    if not isinstance(data, dict):
        raise QuestionError(f"{where}: a job is a mapping with model, cluster and batch")
    data = dict(data)
    for text in overrides:
        path, value = parse_override(text)
        _apply(data, path, value, folder)
    bad = find_not_finite(data)
    if bad:
        raise QuestionError(f"{where}: {bad}: must be a finite number")
    if "model" in data:
        data["model"] = _model_mapping(data["model"], folder)
    data.setdefault("name", name)
    return validate(Job, data, where)


def load_job(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Job:
    """The job in a YAML file or mapping, with `overrides` applied.

    >>> job = load_job({"model": "mixtral-8x7b", "cluster": {"chip": "h100-sxm", "nodes": 8},
    ...                 "batch": {"sequences": 256, "length": 4096}}, ["plan.expert=8"])
    >>> job.plan.expert
    8

    Raises QuestionError for anything that is not a valid job; rules that need the cluster are checked by `forecast`.
    """
    if isinstance(source, Mapping):
        return job_from_mapping(dict(source), overrides=overrides)
    path = Path(source)
    return job_from_mapping(read_yaml(path), overrides=overrides, folder=path.parent, where=str(path), name=path.stem)


def job_schema() -> dict[str, Any]:
    """JSON Schema of a job file: the job, with `model` also as a preset's name, a file's, or a change of a preset."""
    schema = Job.model_json_schema()
    schema["title"] = "moecast job"
    schema["properties"]["model"] = {
        "description": "a preset's name, a Hugging Face config.json or YAML file in the job's folder, or a mapping",
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/Model"}, {"type": "object", "required": ["preset"]}],
    }
    return schema
