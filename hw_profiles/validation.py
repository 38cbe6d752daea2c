"""From plain data to a validated record, with errors a person can act on: field, value, rule, nearest name."""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from hw_profiles.errors import QuestionError, nearest

M = TypeVar("M", bound=BaseModel)
Problem = dict[str, Any]
Path = tuple[str | int, ...]

_UNKNOWN = ("extra_forbidden", "invalid_key")
# What each kind of value is called, by the end or the whole of pydantic's name for the error.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "finite": "a finite number",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_NAMED_KEYS = 8
# Branches of a union are called by their type, such as Capacity, constrained-int and tuple[...].
_FIELD = re.compile(r"[a-z0-9_]+")
_BRANCHES = ("str", "int", "float", "bool", "none")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_in(a)]


def _keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """Field names allowed in the mapping at `path`."""
    models = [model]
    for part in path:
        fields = [x.model_fields[str(part)] for x in models if part in x.model_fields]
        if fields:
            models = [m for f in fields for m in _models_in(f.annotation)]
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def _short(value: Any) -> str:
    if value is None:
        return "null"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, or a list within itself
        return "(too long to print)"
    return text if len(text) <= 60 else text[:57] + "..."


def _path(problem: Problem, data: Any) -> Path:
    """Where `problem` is in `data`: its location without the names that pydantic gives to the branches of a union."""
    out: list[str | int] = []
    here = data
    for i, part in enumerate(problem["loc"]):
        if isinstance(here, dict) and part in here:
            here = here[part]
        elif isinstance(here, (list, tuple)) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif problem["type"] in _UNKNOWN and i == len(problem["loc"]) - 1:
            here = None  # a key that is no text, such as null
        elif not _FIELD.fullmatch(str(part)) or part in _BRANCHES:
            continue
        out.append(part)
    return tuple(out)


def _rule(problem: Problem, keys: list[str]) -> str:
    """What would be right: the words after `must be`."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind in _LIMITS:
        words, bound = _LIMITS[kind]
        return f"{words} {context[bound]:,.12g}"
    if kind == "dict_type":
        return "a mapping of keys"
    if kind in ("model_type", "model_attributes_type"):
        return "a mapping of keys" + (f" ({', '.join(keys)})" if len(keys) <= _NAMED_KEYS else "")
    if kind.partition("_")[0] in _KINDS and kind != "int_parsing_size":
        return _KINDS[kind.partition("_")[0]]
    return str(problem["msg"]).removeprefix("Input should be ")


def _choices(problem: Problem) -> list[str]:
    """The values of a literal, from `'a', 'b' or 'c'`."""
    if problem["type"] != "literal_error":
        return []
    return [word.strip("' ") for word in problem["ctx"]["expected"].replace(" or ", ", ").split(",")]


def _is_unknown(problem: Problem) -> bool:
    """Whether it is the key that is wrong, of a record or of a mapping from names that are known."""
    return problem["type"] in _UNKNOWN or problem["loc"][-1:] == ("[key]",)


def _sentence(field: str, problems: list[Problem], keys: list[str]) -> str:
    """`field = value: rule` from all `problems` of one field, which are the branches of a union."""
    first = next((p for p in problems if p["type"] == "value_error"), problems[0])
    if first["type"] == "missing":
        return f"{field}: required, and missing"
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}"
    limits = [p for p in problems if p["type"] in _LIMITS]
    rules = dict.fromkeys(_rule(p, keys) for p in limits or problems)
    near = (
        nearest(first["input"], [x for p in problems for x in _choices(p)]) if isinstance(first["input"], str) else ""
    )
    return f"{field} = {_short(first['input'])}: must be {', or '.join(rules)}{near}"


def describe(error: ValidationError, model: type[BaseModel], data: Any, under: str = "") -> str:
    """One line for the first problem in `error`, and how many fields have more; `under` is the section of `data`."""
    found: list[Problem] = [dict(p) for p in error.errors(include_url=False)]
    problems = [(_path(p, data), p) for p in found]
    # Of a union pydantic reports each branch: the one that looked deeper into the value is the one that was meant.
    sections = {path[:depth] for path, _ in problems for depth in range(len(path))}
    problems = [(path, p) for path, p in problems if path not in sections or _is_unknown(p)]
    # An unknown key or a rule of ours says most.
    path, problem = min(problems, key=lambda x: (not _is_unknown(x[1]), x[1]["type"] != "value_error"))
    field = ".".join(str(part) for part in ((under, *path) if under else path)) or "top level"
    if _is_unknown(problem):
        known = _choices(problem) or _keys_at(model, path[:-1])
        hint = nearest(str(path[-1]), known) or (f"; known: {', '.join(known)}" if known else "")
        text = f"{field}: unknown key{hint}"
    else:
        text = _sentence(field, [p for other, p in problems if other == path], _keys_at(model, path))
    more = len({p for p, _ in problems}) - 1
    return f"{text} (and {more} more)" if more else text


def validate(model: type[M], data: Any, where: str, under: str = "") -> M:
    """`data` as an instance of `model`; QuestionError with one line if it is not one.

    The line begins with `where`, and names fields from the section `under` on.
    """
    start = f"{where}: " if where else ""
    if not isinstance(data, dict):
        raise QuestionError(f"{start}{under + ': ' if under else ''}a mapping of keys is needed, not {_short(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise QuestionError(" ".join(f"{start}{describe(error, model, data, under)}".split())) from None
