"""From the path of names on a compiled instruction to the scopes of `simulator.job.scopes` and the phase of the step.

A path is what JAX wrote: `jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/decoder.moe.combine`.
An instruction that XLA made of several has several: `jit(f)/shard_map/(a/psum:b/psum)`.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

from simulator.job.scopes import all_scopes

FORWARD, RECOMPUTE, BACKWARD = PHASES = ("forward", "recompute", "backward")

# What transformations put between two parts of a scope, as in `decoder/while/body/closed_call/moe.experts.up`.
_NOISE = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "remat", "jvp", "transpose"}
_NOISE |= {"shard_map", "vmap", "jit", "pjit", "custom_jvp_call", "custom_vjp_call", "scan", ""}
_BRANCH = re.compile(r"branch_\d+_fun")


@cache
def _by_length() -> tuple[tuple[str, ...], ...]:
    return tuple(sorted((tuple(name.split(".")) for name in all_scopes()), key=len, reverse=True))


def paths(op_name: str) -> tuple[str, ...]:
    """The paths joined in one: `a/(b:c)/d` as a/b/d and a/c/d; parentheses with names before them are calls."""
    pieces: list[list[str]] = []
    start = at = 0
    while at < len(op_name):
        if op_name[at] == "(":
            closed = _closing(op_name, at)
            if at == 0 or op_name[at - 1] in "/:":
                pieces += [[op_name[start:at]], _alternatives(op_name[at + 1 : closed])]
                start = closed + 1
            at = closed
        at += 1
    pieces.append([op_name[start:]])
    return tuple(dict.fromkeys("".join(parts) for parts in product(*pieces)))


def _closing(text: str, opened: int) -> int:
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)


def _alternatives(text: str) -> list[str]:
    out, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ":" and depth == 0:
            out.append(text[start:at])
            start = at + 1
    return [path for part in (*out, text[start:]) for path in paths(part)]


@cache
def scope_of(path: str) -> str:
    """The scope whose name ends last in one path, the longest of these; an empty string if it holds none."""
    parts = [p for p in re.split(r"[/.()]", path) if p not in _NOISE and not _BRANCH.fullmatch(p)]
    for end in range(len(parts), 0, -1):
        for name in _by_length():
            if tuple(parts[max(0, end - len(name)) : end]) == name:
                return ".".join(name)
    return ""


def scopes_of(op_name: str) -> tuple[str, ...]:
    """The scopes of all paths in an instruction's name, in order, each once; empty if it holds none."""
    return tuple(dict.fromkeys(scope for scope in map(scope_of, paths(op_name)) if scope))


def phase_of(op_name: str) -> str:
    """`recompute`, `backward`, or `forward` for all else (an optimiser's update too); of several the last in a step.

    JAX marks what `checkpoint` computes again `rematted_computation`, and its own backward pass `checkpoint` alone.
    """
    found = {RECOMPUTE if "rematted_computation" in p else BACKWARD if "transpose(" in p else FORWARD
             for p in paths(op_name)}  # fmt: skip
    return max(found, key=PHASES.index)
