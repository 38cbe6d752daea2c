"""Which layers sit on which pipeline stage: even by default, by counts, or by a layout text.

A layout text has one part per virtual stage, split by `|`: E embedding, t decoder layer, m MTP module, L logits and
loss; `x*n` repeats a letter or a bracketed group, as in Megatron-LM's `--pipeline-model-parallel-layout`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hw_profiles.errors import QuestionError

MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one virtual stage holds: layers `first` to `first + layers - 1` of the model, and the ends of it."""

    first: int
    layers: int
    embedding: bool
    logits: bool
    mtp: int


def _expand(text: str) -> str:
    """`text` without repetitions."""
    if len(text) > MAX_TEXT:
        raise QuestionError(f"plan.stages: a layout has at most {MAX_TEXT} characters")
    pattern = re.compile(r"(?:\(([^()]*)\)|([EtmL|]))\*(\d+)")
    while True:
        new = pattern.sub(
            lambda m: (m.group(1) if m.group(1) is not None else m.group(2)) * min(int(m.group(3)), MAX_TEXT), text
        )
        if new == text or len(new) > MAX_TEXT:
            break
        text = new
    if len(new) > MAX_TEXT or not re.fullmatch(r"[EtmL|]*", new):
        raise QuestionError(f"plan.stages = {text[:60]!r}: a layout has only E, t, m, L, |, brackets and *n")
    return new


def even_split(layers: int, parts: int) -> list[int]:
    """`layers` over `parts`, as even as possible, the longer ones first.

    Longer stages first: the last stages also hold the logits and keep fewer microbatches in flight.
    """
    base, extra = divmod(layers, parts)
    return [base + (1 if i < extra else 0) for i in range(parts)]


def lay_out(stages: tuple[int, ...] | str | None, layers: int, mtp: int, parts: int) -> tuple[Chunk, ...]:
    """The `parts` virtual stages of a model with `layers` layers and `mtp` MTP modules, in order of execution.

    Raises QuestionError where counts or letters do not add up to the model.
    """
    if isinstance(stages, str):
        texts = _expand(stages).split("|")
        if len(texts) != parts:
            raise QuestionError(
                f"plan.stages = {stages!r:.60}: {len(texts)} parts; pipeline x virtual_stages is {parts}"
            )
        counts = [t.count("t") for t in texts]
        if "".join(texts) != "E" + "t" * layers + "m" * mtp + "L":
            raise QuestionError(
                f"plan.stages = {stages!r:.60}: has {sum(counts)} layers t and {''.join(texts).count('m')} m;"
                f" the model needs E, {layers} t, {mtp} m, L in that order"
            )
        ends = [("E" in t, "L" in t, t.count("m")) for t in texts]
    else:
        counts = list(stages) if stages is not None else even_split(layers, parts)
        start = f"plan.stages = {counts!s:.60}"
        if len(counts) != parts:
            raise QuestionError(f"{start}: {len(counts)} entries; pipeline x virtual_stages is {parts}")
        if sum(counts) != layers:
            raise QuestionError(f"{start}: {sum(counts)} layers in all; the model has {layers}")
        ends = [(i == 0, i == parts - 1, mtp if i == parts - 1 else 0) for i in range(parts)]
    chunks, first = [], 0
    for count, (embedding, logits, modules) in zip(counts, ends, strict=True):
        chunks.append(Chunk(first, count, embedding, logits, modules))
        first += count
    return tuple(chunks)
