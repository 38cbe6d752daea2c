"""Who talks to whom in a collective: the three ways XLA writes replica groups, and the pairs of a permute."""

from __future__ import annotations

import math
import re

from trainer.hlo_text import HloError, Instruction

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r"\[(\d+(?:,\d+)*)\]<=\[(\d+(?:,\d+)*)\](?:T\((\d+(?:,\d+)*)\))?$")
_MESH = re.compile(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}$")
_ORDERED = re.compile(r"mesh\[([^\]]*)\], device_ids=\(\[(\d+(?:,\d+)*)\](?:T\((\d+(?:,\d+)*)\))?\)\s*\{([^}]*)\}$")
_MESH_AXIS = re.compile(r"'?\"?([\w\-]+)'?\"?\s*=\s*(\d+)")
_USED_AXIS = re.compile(r"'?\"?([A-Za-z_][\w\-]*)'?\"?(?::\((\d+)\)(\d+))?")


def replica_groups(instruction: Instruction, devices: int) -> Groups:
    """The groups of a collective; HloError if the text is of no known form.

    Numbers are places in the order of the mesh's devices, not identities of devices, whatever order the mesh has.
    `{{0,1},{2,3}}`; iota `[2,2]<=[2,2]T(1,0)`; `mesh['a'=2,'b'=2] {'b'}`, with `'a':(1)2` for a part of an axis, and
    with `device_ids=([4,2]T(1,0))` where the mesh lies over the devices in another order. No groups, or an empty list,
    is all devices at once.
    """
    if instruction.opcode.startswith("collective-permute"):
        return _rings(instruction)
    text = instruction.attributes.get("replica_groups", "{}")
    if text in ("{}", "{{}}"):
        return (tuple(range(devices)),)
    if text.startswith("{{"):
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{(\d+(?:,\d+)*)\}", text))
    iota, mesh = _IOTA.match(text), _MESH.match(text)
    if iota:
        groups, size = _ints(iota[1])[0], math.prod(_ints(iota[1])[1:])
        dims = _ints(iota[2])
        flat = _transposed(range(math.prod(dims)), dims, _ints(iota[3]) if iota[3] else range(len(dims)))
        return _cut(flat, groups, size, instruction)
    if mesh:
        return _of_mesh(mesh, instruction)
    ordered = _ORDERED.match(f"{text}, device_ids={instruction.attributes.get('device_ids', '')}")
    if ordered:
        dims = _ints(ordered[2])
        place = _transposed(range(math.prod(dims)), dims, _ints(ordered[3]) if ordered[3] else range(len(dims)))
        plain = _MESH.match(f"mesh[{ordered[1]}] {{{ordered[4]}}}")
        assert plain is not None
        return tuple(tuple(sorted(place[n] for n in group)) for group in _of_mesh(plain, instruction))
    raise HloError(f"{instruction.opcode} {instruction.name!r:.80}: replica_groups={text!r:.80} is of no known form")


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _transposed(flat: range | list[int], dims: list[int], order: range | list[int]) -> list[int]:
    """Row-major values of shape `dims`, their axes in another order."""
    strides = [math.prod(dims[k + 1 :]) for k in range(len(dims))]
    out = [0]
    for axis in order:
        out = [base + k * strides[axis] for base in out for k in range(dims[axis])]
    return [flat[k] for k in out]


def _cut(flat: list[int], groups: int, size: int, instruction: Instruction) -> Groups:
    if groups * size != len(flat):
        raise HloError(f"{instruction.opcode} {instruction.name!r:.80}: its replica groups do not cover the devices")
    return tuple(tuple(flat[k * size : (k + 1) * size]) for k in range(groups))


def _of_mesh(mesh: re.Match[str], instruction: Instruction) -> Groups:
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh[1])}
    pieces: dict[str, list[tuple[int, bool]]] = {name: [(size, False)] for name, size in sizes.items()}
    wanted: list[tuple[str, int]] = []
    for name, before, size in _USED_AXIS.findall(mesh[2]):
        if name not in sizes or any(name == other for other, _ in wanted):
            raise HloError(f"{instruction.opcode} {instruction.name!r:.80}: mesh axis {name!r:.40} is not there once")
        if before:
            after = sizes[name] // (int(before) * int(size))
            pieces[name] = [(int(before), False), (int(size), True), (after, False)]
            wanted.append((name, 1))
        else:
            pieces[name] = [(sizes[name], True)]
            wanted.append((name, 0))
    dims: list[int] = []
    place: dict[tuple[str, int], int] = {}
    for name, parts in pieces.items():
        for k, (size, _) in enumerate(parts):
            place[name, k] = len(dims)
            dims.append(size)
    inner = [place[key] for key in wanted]
    outer = [k for k in range(len(dims)) if k not in inner]
    size = math.prod(dims[k] for k in inner)
    return _cut(_transposed(range(math.prod(dims)), dims, outer + inner), math.prod(dims) // size, size, instruction)


def _rings(instruction: Instruction) -> Groups:
    """The devices that a permute's pairs join, one group for each ring or chain."""
    pairs = re.findall(r"\{(\d+),\s*(\d+)\}", instruction.attributes.get("source_target_pairs", ""))
    following = {int(a): int(b) for a, b in pairs}
    starts = [a for a in following if a not in following.values()] + list(following)
    seen: set[int] = set()
    out = []
    for start in starts:
        ring = []
        at: int | None = start
        while at is not None and at not in seen:
            seen.add(at)
            ring.append(at)
            at = following.get(at)
        if ring:
            out.append(tuple(ring))
    return tuple(out)
