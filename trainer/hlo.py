"""What a compiled program will execute, read from its text: FLOPs, collectives, memory; see docs/compile.md.

`read_program(compiled, platform)` reads a `jax.stages.Compiled`; everything below it is text and imports no JAX.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.hlo_collectives import Collective, collectives
from trainer.hlo_flops import is_ragged_dot, product_flops, target_of
from trainer.hlo_memory import Memory, compile_lowered, peak_memory
from trainer.hlo_scopes import PHASES, phase_of, scope_of, scopes_of
from trainer.hlo_text import Computation, HloError, Instruction, Module, parse_module
from trainer.hlo_walk import Walk

__all__ = [
    "Collective",
    "CompiledProgram",
    "ExecutedFlops",
    "HloError",
    "Memory",
    "collectives",
    "compile_lowered",
    "executed_flops",
    "parse_module",
    "peak_memory",
    "read_program",
    "read_text",
    "scope_of",
]

# Custom calls that move or mark data and multiply nothing.
_IDLE_TARGETS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "LayoutConstraint", "MoveToDevice", "MoveToHost", "PrepareAsyncCallDone", "PrepareAsyncCallStart", "Sharding",
    "SPMDFullToShardShape", "SPMDShardToFullShape", "SliceToDynamic", "PadToStatic", "TopK", "X64Combine",
    "X64SplitHigh", "X64SplitLow", "annotate_device_placement",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExecutedFlops:
    """FLOPs of products per device in one execution, recompute and padding included.

    `by_scope`: scope (an empty string for none) -> phase (forward, recompute, backward) -> FLOPs. `uncounted` are
    custom calls that may multiply and cannot be read, with how often each runs, and loops that run as often as tokens
    ask for; `assumptions` say where a choice was
    made.
    """

    total: int
    by_scope: Mapping[str, Mapping[str, int]]
    uncounted: Mapping[str, int]
    assumptions: tuple[str, ...]

    def of(self, *, scope: str | None = None, phase: str | None = None) -> int:
        """The part of a scope, of a phase, or of both."""
        return sum(
            flops
            for name, phases in self.by_scope.items()
            for at, flops in phases.items()
            if scope in (None, name) and phase in (None, at)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "total": self.total,
            "by_phase": {phase: self.of(phase=phase) for phase in PHASES},
            "by_scope": {scope: dict(phases) for scope, phases in self.by_scope.items()},
            "uncounted": dict(self.uncounted),
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """All that is read from one compiled program, per device."""

    name: str
    platform: str
    devices: int
    flops: ExecutedFlops
    collectives: tuple[Collective, ...]
    memory: Memory | None

    def bytes_by_kind(self, *, asked: bool = False) -> dict[str, int]:
        """Bytes of all runs of each kind of collective, nccl-tests' size; `asked`: by the kind that was asked for."""
        out: dict[str, int] = defaultdict(int)
        for one in self.collectives:
            out[one.asked if asked else one.kind] += one.total_bytes
        return dict(sorted(out.items()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "platform": self.platform,
            "devices": self.devices,
            "executed_flops_per_device": self.flops.to_dict(),
            "collectives": [one.to_dict() for one in self.collectives],
            "collective_bytes_by_kind": self.bytes_by_kind(),
            "collective_bytes_by_kind_asked": self.bytes_by_kind(asked=True),
            "memory": None if self.memory is None else self.memory.to_dict(),
        }


def executed_flops(module: Module, walk: Walk | None = None) -> ExecutedFlops:
    """FLOPs of dots, convolutions and product calls, times the loops round them.

    HloError for a loop round a product whose trip count the program does not show. Departs from `cost_analysis()`,
    which counts a loop's body once and elementwise work too.
    """
    walk = walk or Walk(module)
    by_scope: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(PHASES, 0))
    uncounted: dict[str, int] = {}
    total = 0
    for computation, instruction, times in walk.executed():
        flops = product_flops(computation, instruction) * times
        if flops:
            total += flops
            name = instruction.op_name or _user_name(computation, instruction)
            by_scope[(scopes_of(name) or ("",))[0]][phase_of(name)] += flops
        elif instruction.opcode == "custom-call" and _may_multiply(instruction):
            uncounted[f"{target_of(instruction)} {instruction.name}"] = times
    uncounted |= dict.fromkeys((f"loop by tokens {name}" for name in walk.by_tokens), 1)
    return ExecutedFlops(total, {k: by_scope[k] for k in sorted(by_scope)}, uncounted, tuple(walk.assumptions))


def _user_name(inside: Computation, instruction: Instruction) -> str:
    """The name of the first that reads a value: XLA:CPU drops a product's own name where it turns it round."""
    readers = [instruction]
    while readers and not readers[0].op_name:
        readers = inside.users.get(readers[0].name, [])
    return readers[0].op_name if readers else ""


def _may_multiply(instruction: Instruction) -> bool:
    is_helper = instruction.name.startswith("ragged-dot-metadata")
    return target_of(instruction) not in _IDLE_TARGETS and not is_ragged_dot(instruction) and not is_helper


def read_text(text: str, platform: str, memory: Memory | None = None) -> CompiledProgram:
    """Read the text of a compiled, optimised module; HloError names what cannot be read."""
    module = parse_module(text)
    walk = Walk(module)
    flops = executed_flops(module, walk)
    return CompiledProgram(module.name, platform, module.devices, flops, collectives(module, walk), memory)


def read_program(compiled: Any, platform: str, report: str | None = None) -> CompiledProgram:
    """Read a `jax.stages.Compiled`; for `tpu` with the memory-usage report that `compile_lowered` returns beside it."""
    return read_text(compiled.as_text(), platform, peak_memory(compiled, platform, report))
