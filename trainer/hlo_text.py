"""The text of a compiled HLO module (`compiled.as_text()`) as computations and instructions; pure text, no JAX.

Read alike: XLA:CPU and XLA:TPU of jaxlib 0.10.2, whose operands carry no shapes, and older texts, whose operands do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# Bits of a value in a buffer; token and opaque hold nothing.
_BITS = {"token": 0, "opaque": 0, "pred": 8, "c64": 64, "c128": 128, "bf16": 16, "f8e8m0fnu": 8}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[((?:(?:<=)?\d+,?)*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_START = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*\) -> .* )?\{$")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}()\[\],]')
_NAME = re.compile(r"%?([\w.\-]+)$")


class HloError(RuntimeError):
    """The compiled program cannot be read, or says too little; one line naming the instruction or line."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One array: element type, dimensions, and the layout as written (`{1,0:T(8,128)(2,1)S(1)}`)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the values, without a tile's padding; HloError for an unknown type."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            width = re.match(r"(?:[suf]|f8e|f4e)(\d+)", self.dtype)
            if width is None:
                raise HloError(f"the element type {self.dtype!r:.40} is unknown")
            bits = {"f8e": 8, "f4e": 4}.get(self.dtype[:3], int(width[1]))
        return -(-self.elements * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are the arrays of the result, a tuple's in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attribute_text: str
    is_root: bool

    @cached_property
    def attributes(self) -> dict[str, str]:
        """`calls`, `metadata`, `replica_groups`, ... as written."""
        pairs = (part.partition("=") for part in split_list(self.attribute_text))
        return {key.strip(): value.strip() for key, _, value in pairs if key.strip()}

    @cached_property
    def op_name(self) -> str:
        """The path of names JAX gave the operation, or an empty string."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""

    def called(self, *keys: str) -> tuple[str, ...]:
        """Names of the computations under the first of `keys` that is there."""
        for key in keys:
            if key in self.attributes:
                return tuple(part.strip().lstrip("%") for part in self.attributes[key].strip("{}").split(","))
        return ()

    def only_called(self, *keys: str) -> str:
        """The one computation under the first of `keys` that is there; HloError if there is none, or several."""
        called = self.called(*keys)
        if len(called) != 1:
            raise HloError(f"{self.opcode} {self.name!r:.80} does not say which computation is its {keys[0]}")
        return called[0]

    def integers(self, key: str) -> tuple[int, ...]:
        """The whole numbers under `key`: `{0,1}` as (0, 1); empty where it is absent."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attributes.get(key, "")))


@dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in the order of the text (the schedule, if the module is scheduled)."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the result; HloError if there is none."""
        for instruction in self.instructions.values():
            if instruction.is_root:
                return instruction
        raise HloError(f"computation {self.name!r:.80} has no ROOT")

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read a value, by its name."""
        out: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                out.setdefault(operand, []).append(instruction)
        return out

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Names of the parameters and their numbers."""
        return {i.name: int(i.literal) for i in self.instructions.values() if i.opcode == "parameter"}

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """The instruction that makes an operand; HloError if the text lacks it."""
        if number >= len(instruction.operands):
            raise HloError(f"{instruction.opcode} {instruction.name!r:.80} has no operand {number}")
        name = instruction.operands[number]
        if name not in self.instructions:
            raise HloError(f"{instruction.opcode} {instruction.name!r:.80} reads {name!r:.80}, which is not there")
        return self.instructions[name]

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """The arrays an instruction reads, tokens left out."""
        made = (self.operand(instruction, k) for k in range(len(instruction.operands)))
        return tuple(s for one in made for s in one.shapes if s.dtype != "token")


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    name: str
    entry: str
    computations: dict[str, Computation]
    header: str

    @cached_property
    def devices(self) -> int:
        """Devices the program runs on: partitions x replicas."""
        counts = (re.search(rf"\b{key}=(\d+)", self.header) for key in ("num_partitions", "replica_count"))
        return math.prod(int(found[1]) if found else 1 for found in counts)

    def computation(self, name: str) -> Computation:
        """A computation by name; HloError if it is absent."""
        if name not in self.computations:
            raise HloError(f"computation {name!r:.80} is called, but is not in module {self.name!r:.80}")
        return self.computations[name]


def split_list(text: str) -> list[str]:
    """Parts between the commas that stand outside brackets and quotes; HloError for brackets that do not close."""
    parts, depth, start = [], 0, 0
    for found in _STRUCTURE.finditer(text):
        mark = found[0]
        if mark in ("{", "(", "["):
            depth += 1
        elif mark in ("}", ")", "]"):
            depth -= 1
        elif mark == "," and depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    if depth:
        raise HloError(f"brackets do not match in {text!r:.80}")
    return [part for part in (*parts, text[start:]) if part.strip()]


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`(f32[2]{0}, token[])` as its arrays, nested tuples flattened; a bound (`<=8`) counts as the size."""
    found = _ARRAY.findall(text)
    return tuple(Shape(t, tuple(int(n.lstrip("<=")) for n in d.split(",") if n), lay) for t, d, lay in found)


def parse_module(text: str) -> Module:
    """Read the whole text; HloError names the line that cannot be read."""
    lines = text.splitlines()
    header = next((line for line in lines if line.startswith("HloModule ")), None)
    if header is None:
        raise HloError("this is no HLO text: no line begins with 'HloModule'")
    computations: dict[str, Computation] = {}
    entry = ""
    for name, is_entry, body in _blocks(lines):
        computations[name] = Computation(name, body)
        entry = name if is_entry else entry
    if not entry:
        raise HloError(f"module {header.split()[1].rstrip(','):.80} has no ENTRY computation")
    return Module(header.split()[1].rstrip(","), entry, computations, header)


def _blocks(lines: list[str]) -> Iterator[tuple[str, bool, dict[str, Instruction]]]:
    head: re.Match[str] | None = None
    body: dict[str, Instruction] = {}
    pending, pending_number = "", 0
    for number, line in enumerate(lines, 1):
        if head is None:
            is_header = line[:1] not in ("", " ", "}") and line.endswith("{") and not line.startswith("HloModule")
            head = _HEADER.match(line) if is_header else None
            body = {}
        elif line.startswith("}"):
            if pending:
                _add(body, pending, pending_number)
            yield head[2], bool(head[1]), body
            head, pending = None, ""
        elif _START.match(line):
            if pending:
                _add(body, pending, pending_number)
            pending, pending_number = line, number
        elif line.strip():
            # A constant's rows may run over several lines.
            if not pending:
                raise HloError(f"line {number} is no HLO instruction: {line.strip()!r:.80}")
            pending += " " + line.strip()
    if head is not None:
        raise HloError(f"the text ends inside computation {head[2]!r:.80}: it is cut short")


def _add(body: dict[str, Instruction], line: str, number: int) -> None:
    try:
        instruction = _parse_instruction(line)
    except HloError as error:
        raise HloError(f"line {number}: {error}") from None
    body[instruction.name] = instruction


def _parse_instruction(line: str) -> Instruction:
    line = _COMMENT.sub("", line)
    start = _START.match(line)
    assert start is not None
    shape_end = _closing(line, start.end()) if line.startswith("(", start.end()) else line.find(" ", start.end())
    opened = line.find("(", shape_end + 1) if shape_end > 0 else -1
    opcode = line[shape_end:opened].strip()
    if opened < 0 or not re.fullmatch(r"[a-z][a-z0-9\-]*", opcode):
        raise HloError(f"this is no HLO instruction: {line.strip()!r:.80}")
    closed = _closing(line, opened)
    inner = line[opened + 1 : closed - 1]
    holds_names = opcode not in ("constant", "parameter", "iota")
    names = [_NAME.search(part.strip()) for part in split_list(inner)] if holds_names else []
    operands = tuple(found[1] for found in names if found)
    shapes = parse_shapes(line[start.end() : shape_end])
    return Instruction(start[2], opcode, shapes, operands, "" if holds_names else inner, line[closed:], bool(start[1]))


def _closing(line: str, opened: int) -> int:
    """Where the bracket at `opened` closes, one past it."""
    depth = 0
    for found in _STRUCTURE.finditer(line, opened):
        depth += (found[0] in "({[") - (found[0] in ")}]")
        if depth == 0 and found[0] == ")":
            return found.end()
    raise HloError(f"brackets do not match in {line.strip()!r:.80}")
