"""Megatron-LM's ways to say which layer has experts and which stage has which layers."""

from __future__ import annotations

import re
from typing import Any

from simulator.job.convert.settings import Settings
from simulator.job.rules import MOST_LAYERS


def expand_pattern(text: str) -> list[int] | None:
    """`([0]*3+[1]*58)` as ones and zeros; None where it is no such pattern, or longer than any model."""
    text = text.replace(" ", "")
    if len(text) > 4096:
        return None
    for _ in range(20):
        # Innermost brackets first: a list and its factor becomes digits.
        new = re.sub(r"\[([01](?:,[01])*)\](?:\*(\d{1,5}))?", lambda m: _repeat(m[1].replace(",", ""), m[2]), text)
        new = re.sub(r"\(([01+]*)\)(?:\*(\d{1,5}))?", lambda m: _repeat(m[1].replace("+", ""), m[2]), new)
        if new == text or len(new) > MOST_LAYERS + 4096:
            break
        text = new
    digits = text.replace("+", "")
    return [int(d) for d in digits] if re.fullmatch(r"[01]+", digits) and len(digits) <= MOST_LAYERS else None


def _repeat(digits: str, times: str | None) -> str:
    return digits * min(int(times or 1), MOST_LAYERS)


def which_layers(s: Settings, layers: int) -> dict[str, Any]:
    """`--moe-layer-freq` as a job's rule of layers with experts."""
    text = str(s.get("moe-layer-freq", 1))
    if text.isdecimal() and int(text) >= 1:
        return {} if text == "1" else {"every": int(text)}
    found = expand_pattern(text)
    if found is None:
        s.refuse("moe-layer-freq", "must be a whole number, or a pattern such as ([0]*3+[1]*58)")
    if len(found) != layers:
        s.refuse("moe-layer-freq", f"has {len(found)} layers; --num-layers is {layers}")
    return rule_of([bool(x) for x in found])


def rule_of(marks: list[bool]) -> dict[str, Any]:
    """The shortest rule of a job for these layers: none, `first_dense`, `every` with `offset`, or a list."""
    first = marks.index(True) if True in marks else len(marks)
    if all(marks[first:]) and first < len(marks):
        return {"first_dense": first} if first else {}
    for every in range(2, min(len(marks), 64) + 1):
        for offset in range(every):
            if marks == [i % every == offset for i in range(len(marks))]:
                return {"every": every} | ({"offset": offset} if offset else {})
    return {"layers": [i for i, mark in enumerate(marks) if mark]}


def pattern_of(marks: list[bool]) -> str:
    """`--moe-layer-freq` for these layers: 1, a number, or a pattern of runs."""
    rule = rule_of(marks)
    if not rule:
        return "1"
    if set(rule) == {"every"}:
        return str(rule["every"])
    runs: list[list[int]] = []
    for mark in marks:
        if runs and runs[-1][0] == int(mark):
            runs[-1][1] += 1
        else:
            runs.append([int(mark), 1])
    if len(runs) <= 8:
        return "(" + "+".join(f"[{mark}]*{n}" for mark, n in runs) + ")"
    return "[" + ",".join(str(int(m)) for m in marks) + "]"


def stages(s: Settings, layers: int, pipeline: int) -> dict[str, Any]:
    """Virtual stages, and the layers on each, as a plan says them."""
    layout = s.get("pipeline-model-parallel-layout")
    per_rank = s.count("num-virtual-stages-per-pipeline-rank")
    per_stage = s.count("num-layers-per-virtual-pipeline-stage")
    first = s.count("decoder-first-pipeline-num-layers", least=0)
    last = s.count("decoder-last-pipeline-num-layers", least=0)
    ways = [n for n, v in (
        ("pipeline-model-parallel-layout", layout), ("num-virtual-stages-per-pipeline-rank", per_rank),
        ("num-layers-per-virtual-pipeline-stage", per_stage)) if v is not None]  # fmt: skip
    if len(ways) > 1:
        s.refuse(ways[1], f"goes not together with --{ways[0]}")
    if pipeline == 1:
        for name in (*ways, "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"):
            if s.given(name) and not (name == "num-virtual-stages-per-pipeline-rank" and per_rank == 1):
                s.leave(name, "there is one pipeline stage")
        return {}
    if layout is not None:
        text = str(layout).replace(",", "")
        parts = _parts(text)
        if parts % pipeline:
            s.refuse(
                "pipeline-model-parallel-layout", f"has {parts} stages; not a multiple of the pipeline's {pipeline}"
            )
        return _virtual(parts // pipeline) | {"stages": text}
    if per_stage is not None:
        if layers % (pipeline * per_stage):
            rule = f"times the pipeline's {pipeline} must divide the {layers} layers"
            s.refuse("num-layers-per-virtual-pipeline-stage", rule)
        per_rank = layers // pipeline // per_stage
    virtual = per_rank or 1
    if first is not None or last is not None:
        return _virtual(virtual) | {"stages": _uneven(s, layers, pipeline, virtual, first, last)}
    if layers % (pipeline * virtual):
        s.refuse("pipeline-model-parallel-size", f"times {virtual} virtual stages must divide the {layers} layers")
    return _virtual(virtual)


def _parts(text: str) -> int:
    """Stages of a layout text, repetitions counted."""
    pattern = re.compile(r"\(([^()]*)\)\*(\d{1,4})|([A-Za-z|])\*(\d{1,4})")
    for _ in range(10):
        new = pattern.sub(lambda m: (m[1] if m[2] else m[3]) * int(m[2] or m[4]), text)
        if new == text or len(new) > MOST_LAYERS:
            break
        text = new
    return text.count("|") + 1


def _virtual(number: int) -> dict[str, Any]:
    return {"virtual_stages": number, "schedule": "interleaved"} if number > 1 else {}


def _uneven(s: Settings, layers: int, pipeline: int, virtual: int, first: int | None, last: int | None) -> list[int]:
    """Layers per chunk where the first or the last rank has another number, each spread over its virtual stages."""
    ends = (first is not None) + (last is not None)
    middle, rest = layers - (first or 0) - (last or 0), pipeline - ends
    if middle < 0 or (rest == 0 and middle) or (rest and middle % rest):
        name = "decoder-first-pipeline-num-layers" if first is not None else "decoder-last-pipeline-num-layers"
        s.refuse(name, f"leaves {middle} of {layers} layers for {rest} stages")
    each = middle // rest if rest else 0
    ranks = [first if first is not None else each, *[each] * (pipeline - 2), last if last is not None else each]
    for name, n in zip(("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"),
                       (ranks[0], ranks[-1]), strict=True):  # fmt: skip
        if n % virtual:
            s.refuse(name, f"must be a multiple of the {virtual} virtual stages")
    if each % virtual:
        s.refuse("num-virtual-stages-per-pipeline-rank", f"must divide the {each} layers of a stage")
    return [n // virtual for _ in range(virtual) for n in ranks]
