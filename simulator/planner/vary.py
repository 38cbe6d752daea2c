"""What `--vary` may say: a field of the job or a number of its chip, and the values to try.

A value is as after `--set`; `*2` (or `x2`) scales the job's own number, or the profile's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from hw_profiles.cluster_spec import ClusterSpec
from hw_profiles.errors import QuestionError, nearest
from hw_profiles.overrides import quantities
from hw_profiles.schema import Chip
from hw_profiles.yaml_reader import parse_yaml
from simulator.job.job import Job
from simulator.planner.table import get

CHIP = "cluster.chip."
# Short names of a chip's numbers (docs/whatif.md); of several, those that the chip has.
ALIASES: dict[str, tuple[str, ...]] = {
    "hbm_bandwidth": ("memory_bandwidth_gb_per_s",),
    "hbm_size": ("memory_gib", "memory_gb"),
    "link_bandwidth": ("scale_up.link_gb_per_s", "scale_up.total_gb_per_s"),
    "link_latency": ("scale_up.latency_us",),
    "nic_bandwidth": ("scale_out.nic_gb_per_s",),
    "nic_latency": ("scale_out.latency_us",),
    "peak": ("peak_tflops.",),
}
_FACTOR = re.compile(r"[*x]\s*([0-9.]+(?:[eE][+-]?\d+)?)")
MOST_VALUES = 1_000


@dataclass(frozen=True, slots=True)
class Axis:
    """A field with its values, each as it is shown, and as changes: texts after `--set`, or numbers of the chip."""

    field: str
    shown: tuple[Any, ...]
    sets: tuple[tuple[str, ...], ...]
    chip: tuple[Mapping[str, str | float], ...]


def parse_axis(text: str, job: Job, chip: Chip) -> Axis:
    """`plan.expert=8,16` as an axis; QuestionError for an unknown field (with the nearest) or a value that is none."""
    name, equals, values = text.partition("=")
    name, start = name.strip(), f"--vary {name.strip()!r:.80}"
    if not equals or not name or not values.strip():
        raise QuestionError(f"--vary {text!r:.80}: write it as FIELD=VALUE,VALUE,...")
    parts = _split(values)
    if len(parts) > MOST_VALUES:
        raise QuestionError(f"{start}: {len(parts):,} values; at most {MOST_VALUES:,}")
    if name.startswith(CHIP):
        paths = chip_paths(name.removeprefix(CHIP), chip, start)
        shown = tuple(_number(p, start) for p in parts)
        return Axis(name, shown, ((),) * len(parts), tuple(dict.fromkeys(paths, v) for v in shown))
    _check_field(name, start)
    found = [_value(name, p, job, start) for p in parts]
    sets = tuple((f"{name}={written}",) for _, written in found)
    return Axis(name, tuple(v for v, _ in found), sets, ({},) * len(parts))


def chip_paths(name: str, chip: Chip, start: str) -> list[str]:
    """The numbers of `chip` that a name or alias means; QuestionError with the nearest one if there is none."""
    known = dict(quantities(chip))
    wanted = ALIASES.get(name, (name,))
    paths = [k for k in known if any(k == w or (w.endswith(".") and k.startswith(w)) for w in wanted)]
    if not paths:
        hint = nearest(name, [*ALIASES, *known])
        raise QuestionError(f"{start}: {chip.name} has no such number{hint}")
    return paths


def _split(text: str) -> list[str]:
    """`a,[b,c],d` at the commas outside of brackets."""
    out, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            out.append("")
        else:
            out[-1] += c
    return [part.strip() for part in out]


def _number(text: str, start: str) -> str | float:
    factor = _FACTOR.fullmatch(text)
    if factor:
        return f"x{factor.group(1)}"
    try:
        return float(text)
    except ValueError:
        raise QuestionError(f"{start}: {text!r:.40}: a number, or a factor such as *2 or x2") from None


def _value(name: str, text: str, job: Job, start: str) -> tuple[Any, str]:
    """A value of a field, and as it is written after `--set`."""
    if not text:
        raise QuestionError(f"{start}: an empty value")
    factor = _FACTOR.fullmatch(text)
    if factor is None:
        return parse_yaml(text, start), text
    own = get(job, name)
    if isinstance(own, bool) or not isinstance(own, (int, float)):
        raise QuestionError(f"{start}: {text}: the job's own value is {own!r:.40}, which no factor scales")
    scaled = own * float(factor.group(1))
    if isinstance(own, int):
        if scaled != int(scaled):
            raise QuestionError(f"{start}: {text} of {own} is {scaled:g}, and must be a whole number")
        scaled = int(scaled)
    return scaled, repr(scaled)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models(a)]


def _check_field(name: str, start: str) -> None:
    """QuestionError, with the nearest name, where a job has no such field."""
    models: list[type[BaseModel]] = [Job]
    path = name.split(".")
    for depth, part in enumerate(path):
        known = [key for m in models for key in m.model_fields]
        if part not in known:
            of = ".".join(path[:depth]) or "a job"
            hint = nearest(part, known) or (f"; known: {', '.join(known)}" if known else ": it is no section")
            raise QuestionError(f"{start}: {of} has no field {part!r:.40}{hint}")
        if path[: depth + 1] == ["cluster"]:
            models = [ClusterSpec]
        else:
            models = [x for m in models if part in m.model_fields for x in _models(m.model_fields[part].annotation)]
