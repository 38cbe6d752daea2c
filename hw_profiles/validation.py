"""From plain data to a validated record, with errors a person can act on: field, value, rule, nearest name."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from hw_profiles.errors import QuestionError, nearest

M = TypeVar("M", bound=BaseModel)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_in(a)]


def _siblings(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names allowed where `location` (without its last part) points."""
    models = [model]
    for part in location[:-1]:
        deeper = [m for x in models if part in x.model_fields for m in _models_in(x.model_fields[part].annotation)]
        models = deeper or models
    return sorted({name for m in models for name in m.model_fields})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for the first problem in `error`, and how many more there are."""
    problems = error.errors(include_url=False)
    # With unions pydantic reports each branch; an unknown key or a rule of ours says most.
    first = next((p for p in problems if p["type"] in ("extra_forbidden", "value_error")), problems[0])
    names = tuple(p for p in first["loc"] if not (isinstance(p, str) and (p.startswith("function-") or "[" in p)))
    field = ".".join(str(p) for p in names) or "top level"
    if first["type"] == "extra_forbidden":
        known = _siblings(model, names)
        rule = "unknown key" + (nearest(str(names[-1]), known) or f"; known: {', '.join(known)}")
        text = f"{where}: {field}: {rule}"
    elif first["type"] == "missing":
        text = f"{where}: {field}: required, and missing"
    elif first["type"] == "value_error":
        rule = first["msg"].removeprefix("Value error, ")
        text = f"{where}: {field}: {rule}"
    else:
        rule = first["msg"][0].lower() + first["msg"][1:]
        text = f"{where}: {field} = {_short(first['input'])}: {rule}"
        expected = first.get("ctx", {}).get("expected")
        if first["type"] == "literal_error" and isinstance(first["input"], str) and expected:
            text += nearest(first["input"], [w.strip("' ") for w in expected.replace(" or ", ", ").split(",")])
    return text if len(problems) == 1 else f"{text} (and {len(problems) - 1} more)"


def validate(model: type[M], data: Any, where: str) -> M:
    """`data` as an instance of `model`; QuestionError with one line beginning with `where` if it is not one."""
    if not isinstance(data, dict):
        raise QuestionError(f"{where}: a mapping of keys is needed, not {_short(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise QuestionError(" ".join(describe(error, model, where).split())) from None
