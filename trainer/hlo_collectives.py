"""The collectives of a compiled program: kind, count, bytes, groups and scopes.

Bytes are those of the values, per device and per call, in nccl-tests' convention: all-reduce the buffer, all-gather the
gathered output, reduce-scatter the full input, all-to-all the full send buffer, a permute what is sent. XLA:TPU's tile
padding is left out. Wire bytes are a ring's: (g-1)/g of that, twice for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.hlo_flops import target_of, widest
from trainer.hlo_groups import Groups, replica_groups
from trainer.hlo_scopes import phase_of, scopes_of
from trainer.hlo_text import Computation, Instruction, Module
from trainer.hlo_walk import Walk, collective_kind

_PRIMITIVES = {
    "all_gather": "all-gather", "all_gather_invariant": "all-gather", "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all", "ppermute": "collective-permute", "psum": "all-reduce",
    "psum_invariant": "all-reduce", "ragged_all_to_all": "ragged-all-to-all",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of the program, with all its runs in one execution.

    `bytes` are per call and device, all operands of a merged collective together. `scopes` holds one for each operation
    that was merged, as far as XLA kept the names; `scopes_inferred` says that they are those of its reducer or
    producers. `asked`: the kind that the program asked for, as far as it shows, where XLA:TPU runs another: it turns
    wide all-gathers and reduce-scatters into all-reduces. `is_upper_bound`: a ragged all-to-all, whose buffer is
    static. `asynchronous`: started and awaited apart.
    """

    name: str
    kind: str
    asked: str
    count: int
    bytes: int
    wire_bytes: float
    dtype: str
    operands: int
    groups: Groups
    scopes: tuple[str, ...]
    phase: str
    asynchronous: bool = False
    scopes_inferred: bool = False
    is_upper_bound: bool = False

    @property
    def group_size(self) -> int:
        """Devices that take part together; of unequal groups the most."""
        return max(map(len, self.groups), default=1)

    @property
    def total_bytes(self) -> int:
        """Bytes of all runs."""
        return self.bytes * self.count

    @property
    def total_wire_bytes(self) -> float:
        """Wire bytes of all runs."""
        return self.wire_bytes * self.count

    def to_dict(self) -> dict[str, Any]:
        """As JSON; of the groups their number and the first one."""
        return {
            "name": self.name, "kind": self.kind, "asked": self.asked, "count": self.count, "bytes": self.bytes,
            "wire_bytes": self.wire_bytes, "total_bytes": self.total_bytes, "total_wire_bytes": self.total_wire_bytes,
            "dtype": self.dtype, "operands": self.operands, "group_size": self.group_size, "groups": len(self.groups),
            "first_group": list(self.groups[0]) if self.groups else [], "scopes": list(self.scopes),
            "phase": self.phase, "asynchronous": self.asynchronous, "scopes_inferred": self.scopes_inferred,
            "is_upper_bound": self.is_upper_bound,
        }  # fmt: skip


def collectives(module: Module, walk: Walk | None = None) -> tuple[Collective, ...]:
    """Every collective that runs, in the program's order of computations; an asynchronous one counts once.

    HloError for groups of no known form. XLA:TPU's fused all-reduce and slice is its reduce-scatter, and counts so.
    """
    walk = walk or Walk(module)
    callers = _callers(module)
    chains = {
        chain
        for computation in module.computations.values()
        for chain in map(_chain, computation.instructions.values())
        if chain and _starts_chain(computation)
    }
    seen: set[str] = set()
    found = []
    for computation, instruction, times in walk.executed():
        kind = collective_kind(instruction)
        chain = _chain(instruction) if kind else ""
        # XLA:TPU cuts an asynchronous collective over several fusions of one chain: start, steps, end.
        if not kind or (chain and (not _starts_chain(computation) if chain in chains else chain in seen)):
            continue
        seen.add(chain)
        found.append(_read(module, computation, instruction, times, callers.get(computation.name)))
    return tuple(found)


def _chain(instruction: Instruction) -> str:
    if not collective_kind(instruction):
        return ""
    fields = instruction.attributes.get("frontend_attributes", "")
    _, _, rest = fields.partition('chain_id="')
    return rest.partition('"')[0]


def _starts_chain(computation: Computation) -> bool:
    return any(target_of(i) == "AsyncCollectiveStart" for i in computation.instructions.values())


def _callers(module: Module) -> dict[str, tuple[Computation, Instruction]]:
    """What fuses or calls a computation, the first such."""
    out: dict[str, tuple[Computation, Instruction]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("fusion", "call-start", "async-start", "while"):
                for name in instruction.called("calls", "to_apply", "body"):
                    out.setdefault(name, (computation, instruction))
    return out


def _read(module: Module, inside: Computation, instruction: Instruction, times: int,
          caller: tuple[Computation, Instruction] | None) -> Collective:  # fmt: skip
    kind = collective_kind(instruction)
    groups = replica_groups(instruction, module.devices)
    size = max(map(len, groups), default=1)
    shapes = inside.operand_shapes(instruction)
    # A ragged all-to-all's other operands are its output and the offsets.
    sent = shapes[:1] if kind == "ragged-all-to-all" else shapes
    count_bytes = sum(s.bytes for s in sent) * (size if kind == "all-gather" else 1)
    is_fused_scatter = (
        kind == "all-reduce" and inside.name.startswith("all-reduce-scatter") and inside.root.opcode == "dynamic-slice"
    )
    kind = "reduce-scatter" if is_fused_scatter else kind
    op_name, inferred = _op_name(module, inside, instruction, caller)
    phase = _phase(op_name)
    if phase == "forward" and inferred and caller:
        # Without a name of its own it is at least of its loop's phase.
        phase = phase_of(caller[1].op_name)
    is_async = instruction.opcode.endswith("-start") or bool(_chain(instruction))
    return Collective(
        name=instruction.name,
        kind=kind,
        asked=_asked(module, inside, instruction, op_name, caller) or kind,
        count=times,
        bytes=count_bytes,
        wire_bytes=_wire(kind, count_bytes, size),
        dtype=widest(sent).dtype if sent else "",
        operands=len(sent),
        groups=groups,
        scopes=tuple(dict.fromkeys(scope for name in op_name for scope in scopes_of(name))),
        phase=phase,
        asynchronous=is_async or (caller is not None and caller[1].opcode.endswith("-start")),
        scopes_inferred=inferred,
        is_upper_bound=kind == "ragged-all-to-all",
    )


def _wire(kind: str, size_bytes: int, group: int) -> float:
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size_bytes if group > 1 else 0)
    return size_bytes * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _phase(op_names: tuple[str, ...]) -> str:
    phases = [phase_of(name) for name in op_names]
    return next((p for p in ("backward", "recompute") if p in phases), "forward")


def _op_name(module: Module, inside: Computation, instruction: Instruction,
             caller: tuple[Computation, Instruction] | None) -> tuple[tuple[str, ...], bool]:  # fmt: skip
    """The names on the collective or on the fusion round it; or, as XLA:TPU drops them where it merges, its makers'."""
    if instruction.op_name:
        return (instruction.op_name,), False
    if caller and caller[1].opcode != "while" and caller[1].op_name:
        return (caller[1].op_name,), False
    makers = tuple(_named_maker(inside, inside.operand(instruction, k)) for k in range(len(instruction.operands)))
    # The reducer keeps the name of one of those that were merged, without the mark of the phase.
    reducers = (module.computations.get(name) for name in instruction.called("to_apply"))
    names = tuple(i.op_name for r in reducers if r for i in r.instructions.values() if scopes_of(i.op_name))
    makers = tuple(name for name in makers if name)
    if names:
        path = next((name.partition("while/body")[0] for name in makers if phase_of(name) != "forward"), "")
        return (f"{path}{names[0]}",), True
    return makers, True


def _asked(module: Module, inside: Computation, instruction: Instruction, op_names: tuple[str, ...],
           caller: tuple[Computation, Instruction] | None) -> str:  # fmt: skip
    """The JAX primitive at the end of a name; or a gather, where an all-reduce adds up slices of a buffer of zeros."""
    for name in op_names:
        if (primitive := name.rpartition("/")[2]) in _PRIMITIVES:
            return _PRIMITIVES[primitive]
    if instruction.opcode != "all-reduce" or not instruction.operands:
        return ""
    made = _origin(inside, inside.operand(instruction, 0))
    if made.opcode == "parameter" and caller and caller[1].opcode.endswith("-start"):
        # On 7x the SparseCore runs it, in a computation of its own.
        made = _origin(caller[0], caller[0].operand(caller[1], inside.parameters[made.name]))
    if made.opcode == "fusion":
        fused = module.computation(made.only_called("calls"))
        made = _origin(fused, fused.root)
    return "all-gather" if made.opcode == "dynamic-update-slice" else ""


def _origin(inside: Computation, made: Instruction) -> Instruction:
    while made.opcode in ("copy", "copy-start", "copy-done", "bitcast", "convert") and made.operands:
        made = inside.operand(made, 0)
    return made


def _named_maker(inside: Computation, made: Instruction) -> str:
    """The name of what made a value, looked for behind copies, elements of tuples and the like."""
    while not made.op_name and made.operands:
        made = inside.operand(made, 0)
    return made.op_name
