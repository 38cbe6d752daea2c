"""How often every instruction of a compiled program runs in one execution: fusions, calls, loops, branches followed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from trainer.hlo_flops import product_flops
from trainer.hlo_loops import Loops
from trainer.hlo_text import Computation, HloError, Instruction, Module

COLLECTIVES = (
    "ragged-all-to-all", "all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# The scope of loops that run as often as tokens ask for: no program's text knows how often.
BY_TOKENS = "loop_by_tokens"
_CALLS = {"fusion", "call", "call-start", "async-start"}


def collective_kind(instruction: Instruction) -> str:
    """`all-gather` for all-gather and all-gather-start; an empty string for all else, the -done half too."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


class Walk:
    """Which computation runs how often, from the entry down.

    Of a conditional the branch with the most FLOPs counts, then the most collectives: `assumptions` names it. A loop
    whose count cannot be read is an error only if a product or a collective runs in it; else it counts once. Loops of
    the scope `loop_by_tokens` are left out: `by_tokens` names them.
    """

    def __init__(self, module: Module):
        self.module = module
        self.assumptions: list[str] = []
        self.by_tokens: list[str] = []
        self._loops = Loops(module)
        self._called: dict[str, list[tuple[str, int]]] = {}
        self._weights: dict[str, tuple[int, int]] = {}

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, in its computation, with how often."""
        for name, times in self.times.items():
            computation = self.module.computation(name)
            for instruction in computation.instructions.values():
                yield computation, instruction, times

    @cached_property
    def times(self) -> dict[str, int]:
        """How often each computation that is reached runs; HloError for computations that call each other in a ring."""
        self._weight(self.module.entry)
        times = dict.fromkeys(self._called, 0)
        times[self.module.entry] = 1
        # Weights are finished callees first, so the other way round every caller stands before what it calls.
        order = list(reversed(self._called))
        for name in order:
            for called, count in self._called[name]:
                times[called] += times[name] * count
        return {name: times[name] for name in order if times[name]}

    def _weight(self, name: str) -> tuple[int, int]:
        """FLOPs and collectives of one run, to choose a branch by."""
        if name in self._weights:
            if self._weights[name] == (-1, -1):
                raise HloError(f"computation {name!r:.80} calls itself")
            return self._weights[name]
        self._weights[name] = (-1, -1)
        computation = self.module.computation(name)
        flops = collectives = 0
        called: list[tuple[str, int]] = []
        for instruction in computation.instructions.values():
            flops += product_flops(computation, instruction)
            collectives += bool(collective_kind(instruction))
            called += self._calls_of(computation, instruction)
        for inner, count in called:
            inner_flops, inner_collectives = self._weight(inner)
            flops += count * inner_flops
            collectives += count * inner_collectives
        self._called[name] = called
        self._weights[name] = (flops, collectives)
        return flops, collectives

    def _calls_of(self, computation: Computation, instruction: Instruction) -> list[tuple[str, int]]:
        if instruction.opcode in _CALLS:
            return [(name, 1) for name in instruction.called("calls", "to_apply", "called_computations")]
        if instruction.opcode == "while":
            body, condition = instruction.only_called("body"), instruction.only_called("condition")
            try:
                count = self._loops.trip_count(computation, instruction)
            except HloError:
                if BY_TOKENS in instruction.op_name and not self._weight(body)[1]:
                    self.by_tokens.append(instruction.name)
                    return []
                if self._weight(body) != (0, 0) or self._weight(condition) != (0, 0):
                    raise
                count = 1
            return [(body, count), (condition, count + 1)]
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations") or tuple(
                name for key in ("true_computation", "false_computation") for name in instruction.called(key)
            )
            if not branches:
                raise HloError(f"conditional {instruction.name!r:.80} has no branches")
            heaviest = max(branches, key=self._weight)
            if self._weight(heaviest) != (0, 0):
                self.assumptions.append(
                    f"conditional {instruction.name}: branch {branches.index(heaviest)} of {len(branches)} counts, "
                    "the one with the most work"
                )
            return [(heaviest, 1)]
        return []
