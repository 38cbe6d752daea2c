"""How often a while loop of a compiled program runs: what XLA says, or else the loop's own counter, followed.

XLA:CPU writes `known_trip_count` on a loop. XLA:TPU (libtpu 0.0.42) does not, and may carry the bound or the step in
the loop's state; so the whole numbers of the state that the condition needs are computed until the condition fails.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import cached_property

from trainer.hlo_text import Computation, HloError, Instruction, Module

_KNOWN = re.compile(r'"?known_trip_count\\?"?[:=]\s*\{\\?"n\\?":\\?"(\d+)')
_MOST = 1_000_000
_DEPTH = 60
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "maximum": max, "minimum": min,
    "and": operator.and_, "or": operator.or_,
}  # fmt: skip
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip
_SAME = {"copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "optimization-barrier", "copy-start"}


class Loops:
    """The loops of one module."""

    def __init__(self, module: Module):
        self._module = module

    def trip_count(self, inside: Computation, loop: Instruction) -> int:
        """How often the body of `loop`, an instruction of `inside`, runs; HloError naming it if the text does not say.

        XLA's own note first (`known_trip_count`), then the loop's counter (at most a million steps).
        """
        known = _KNOWN.search(loop.attribute_text)
        if known:
            return int(known[1])
        condition = self._module.computation(loop.only_called("condition"))
        body = self._module.computation(loop.only_called("body"))
        state = _State(self, inside, loop)
        read: set[int] = set()
        going = self._value(condition, condition.root, state, 0, read)
        needed = self._closure(body, state, read)
        count = 0
        while going and count < _MOST:
            count += 1
            following = {k: self._value(body, _element(body, body.root, k), state, 0, set()) for k in needed}
            state.known.update(following)
            going = self._value(condition, condition.root, state, 0, set())
        if going is None or count == _MOST:
            where = f" ({loop.op_name:.120})" if loop.op_name else ""
            raise HloError(f"while loop {loop.name!r:.80}{where}: how often it runs cannot be read from the program")
        return count

    def _closure(self, body: Computation, state: _State, read: set[int]) -> list[int]:
        """Elements of the state that the condition needs, directly or over the body."""
        found: set[int] = set()
        while read - found:
            for k in sorted(read - found):
                found.add(k)
                self._value(body, _element(body, body.root, k), state, 0, read)
        return sorted(found)

    def _value(self, inside: Computation, made: Instruction | None, state: _State | None, depth: int, read: set[int]
               ) -> int | None:  # fmt: skip
        """A whole number, or None where it depends on data; `read` collects the elements of the state it needs."""
        if made is None or depth > _DEPTH:
            return None
        if made.opcode == "constant":
            text = made.literal.strip()
            return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
        args: list[int | None] = []
        if made.opcode in ("get-tuple-element", "parameter"):
            return self._element_value(inside, made, state, depth, read)
        if made.opcode in _SAME or made.opcode in _BINARY or made.opcode in ("compare", "fusion", "call", "not"):
            args = [
                self._value(inside, inside.operand(made, k), state, depth + 1, read) for k in range(len(made.operands))
            ]
        if made.opcode in _SAME:
            return args[0]
        if made.opcode in ("fusion", "call"):
            called = self._module.computation(made.only_called("calls", "to_apply"))
            return self._value(called, called.root, _Arguments(args), depth + 1, set())
        if made.opcode == "not":
            return None if args[0] is None else int(not args[0])
        if len(args) != 2 or args[0] is None or args[1] is None:
            return None
        if made.opcode == "compare":
            compare = _COMPARE.get(made.attributes.get("direction", ""))
            return int(compare(args[0], args[1])) if compare else None
        return _BINARY[made.opcode](args[0], args[1])

    def _element_value(self, inside: Computation, made: Instruction, state: _State | None, depth: int, read: set[int]
                       ) -> int | None:  # fmt: skip
        if made.opcode == "parameter":
            return state.argument(int(made.literal)) if isinstance(state, _Arguments) else None
        index = made.integers("index")
        if not index:
            return None
        number, source = index[0], inside.operand(made, 0)
        if source.opcode != "parameter":
            element = _element(inside, source, number)
            return self._value(inside, element, state, depth + 1, read)
        if state is not None and not isinstance(state, _Arguments):
            read.add(number)
            return state.element(number)
        # Outside the loop in question: what an enclosing loop hands on unchanged is what it began with.
        loop_inside, loop = self._caller.get(inside.name, (None, None))
        if loop is None or loop_inside is None:
            return None
        body = self._module.computation(loop.only_called("body"))
        handed_on = _element(body, body.root, number)
        if handed_on is None or not _is_own_element(body, handed_on, number):
            return None
        return self._value(loop_inside, _element(loop_inside, loop_inside.operand(loop, 0), number), None, depth + 1,
                           set())  # fmt: skip

    @cached_property
    def _caller(self) -> dict[str, tuple[Computation, Instruction]]:
        """The loop that runs a body or condition, where there is one only."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self._module.computations.values():
            for instruction in computation.instructions.values():
                if instruction.opcode == "while":
                    for name in (*instruction.called("body"), *instruction.called("condition")):
                        found.setdefault(name, []).append((computation, instruction))
        return {name: callers[0] for name, callers in found.items() if len(callers) == 1}


class _State:
    """A loop's state: what each element holds now, computed from the loop's operand when first asked for."""

    def __init__(self, loops: Loops, inside: Computation, loop: Instruction):
        self._loops, self._inside, self._loop = loops, inside, loop
        self.known: dict[int, int | None] = {}

    def element(self, number: int) -> int | None:
        if number not in self.known:
            first = _element(self._inside, self._inside.operand(self._loop, 0), number)
            self.known[number] = self._loops._value(self._inside, first, None, 0, set())
        return self.known[number]


class _Arguments(_State):
    """What a called computation is given."""

    def __init__(self, arguments: list[int | None]):
        self._arguments = arguments

    def argument(self, number: int) -> int | None:
        return self._arguments[number] if number < len(self._arguments) else None


def _element(inside: Computation, made: Instruction, number: int) -> Instruction | None:
    """What makes element `number` of a tuple, copies looked through; None if that is not to be seen."""
    while made.opcode in ("copy", "optimization-barrier"):
        made = inside.operand(made, 0)
    return inside.operand(made, number) if made.opcode == "tuple" else None


def _is_own_element(body: Computation, made: Instruction, number: int) -> bool:
    while made.opcode in _SAME:
        made = body.operand(made, 0)
    is_element = made.opcode == "get-tuple-element" and made.integers("index")[:1] == (number,)
    return is_element and body.operand(made, 0).opcode == "parameter"
