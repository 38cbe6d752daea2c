"""What a trainer's configuration cannot say, kept in its comments: `# moecast: plan.schedule = "dualpipe"`.

A later import of the same text reads these lines, so that nothing of the job is lost on the way there and back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hw_profiles.errors import QuestionError

START = "# moecast:"


def write_notes(kept: Mapping[str, Any]) -> str:
    """One comment line for each path and value."""
    return "".join(f"{START} {path} = {json.dumps(value)}\n" for path, value in kept.items())


def read_notes(text: str, where: str) -> dict[str, Any]:
    """The paths and values in the comments of `text`."""
    found: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(START):
            path, equals, value = line[len(START) :].partition("=")
            try:
                found[path.strip()] = json.loads(value)
            except ValueError:
                equals = ""
            if not equals or not all(path.strip().split(".")):
                raise QuestionError(f"{where}, line {number}: write it as `{START} field.name = value`, in JSON")
    return found


def put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `path` in nested mappings, which are made where they are missing."""
    *outer, last = path.split(".")
    for key in outer:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, dict) else {}
        data = data[key]
    data[last] = value


def differences(one: Any, other: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Paths at which two nested mappings differ, with both values; lists and free keys are compared whole."""
    if isinstance(one, dict) and isinstance(other, dict) and path.rpartition(".")[2] not in ("cluster", "variants"):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**one, **other}:
            found |= differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if one == other else {path: (one, other)}
