"""Reading of YAML that people hand us: bounded in size and depth, no tags, no aliases, no duplicate keys.

Aliases are refused as a whole: a job or profile never needs them, and nested ones expand without bound.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from hw_profiles.errors import QuestionError
from hw_profiles.files import read_bytes

MAX_BYTES = 1_000_000
MAX_DEPTH = 40

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """Safe loader that reads 1e9 as a number (YAML 1.1 wants 1.0e+9) and refuses duplicate keys."""


_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
# Dates stay text: a profile's `date: 2026-11` and `date: 2026-11-21` are both strings to us. So do `<<` and `=`, which
# YAML 1.1 reads as instructions.
_PREFIX = "tag:yaml.org,2002:"
_TEXT = (f"{_PREFIX}timestamp", f"{_PREFIX}merge", f"{_PREFIX}value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in pairs if tag not in _TEXT]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            duplicate = key in out
        except TypeError:
            raise QuestionError(f"line {key_node.start_mark.line + 1}: a key must be a plain word") from None
        if duplicate:
            raise QuestionError(f"line {key_node.start_mark.line + 1}: key {key!r} appears twice")
        out[key] = loader.construct_object(value_node, deep=True)
    return out


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The data in `text`; QuestionError, one line beginning with `where`, for anything but plain YAML."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            mark = event.start_mark
            line = mark.line + 1 if mark is not None else 0
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise QuestionError(f"{where}, line {line}: anchors and aliases are not allowed; write the value out")
            if getattr(event, "tag", None):
                tag = str(getattr(event, "tag", "")).replace(_PREFIX, "!!")
                raise QuestionError(f"{where}, line {line}: tag {tag:.60} is not allowed; use plain values")
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
                if depth > MAX_DEPTH:
                    raise QuestionError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a safe loader
    except QuestionError as error:
        raise error if str(error).startswith(where) else QuestionError(f"{where}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_text = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if mark and "".join(text.splitlines()[mark.line : mark.line + 1]).lstrip(" ").startswith("\t"):
            problem = "indented with a tab; use spaces"
        raise QuestionError(f"{where}{line_text}: not YAML: {problem}") from None
    except (RecursionError, ValueError):
        # Python refuses to read integers of more than 4,300 digits.
        raise QuestionError(f"{where}: a number in it is too long to read") from None


def read_text(path: Path, where: str = "") -> str:
    """The text in the file `path`; QuestionError for one that is missing, no file, large, or binary."""
    where = where or str(path)
    try:
        text = read_bytes(path, MAX_BYTES, where).decode("utf-8")
    except UnicodeDecodeError:
        raise QuestionError(f"{where}: not a text file (UTF-8)") from None
    if "\x00" in text:
        raise QuestionError(f"{where}: not a text file (NUL byte)")
    return text


def read_yaml(path: Path) -> Any:
    """The data in the file `path`; QuestionError for a missing, large, binary or malformed file."""
    return parse_yaml(read_text(path), str(path))


def find_not_finite(data: Any, path: str = "") -> str | None:
    """`batch.sequences = nan` for the first NaN or infinity in `data`, or None."""
    if isinstance(data, float) and not math.isfinite(data):
        return f"{path} = {data}"
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found = find_not_finite(value, f"{path}.{key}" if path else str(key))
        if found:
            return found
    return None
