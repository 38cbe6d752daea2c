"""Events of a trace in Chrome's JSON format, one at a time: a trace is far larger as Python objects than as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hw_profiles.errors import QuestionError

MAX_EVENTS = 20_000_000
# Microseconds since 1970 have 16 digits and Kineto adds three of nanoseconds: more than a float holds.
_LONGEST_US = 10**17
_SPACE = re.compile(r"[ \t\r\n]*")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=_no_constant)


@dataclass(slots=True)
class TraceText:
    """The text of a trace; what stands beside its events is in `beside` once they have been read."""

    text: str
    start: str
    beside: dict[str, Any] = field(default_factory=dict)

    def events(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every event with its number; QuestionError, naming the number or the character, for what is no trace."""
        if self._at(0) == "[":
            yield from self._array(self._skip(0))
            return
        at = self._after(0, "{")
        if self._at(at) == "}":
            raise QuestionError(f"{self.start}: an empty JSON object is no trace")
        found = False
        while True:
            key, at = self._value(at)
            at = self._after(at, ":")
            if key == "traceEvents":
                if found:
                    raise QuestionError(f"{self.start}: has traceEvents twice")
                found = True
                at = yield from self._array(self._skip(at))
            else:
                self.beside[str(key)], at = self._value(at)
            if self._at(at) != ",":
                break
            at = self._after(at, ",")
        self._after(at, "}")
        if not found:
            raise QuestionError(f"{self.start}: JSON without traceEvents: not a trace in Chrome's format")

    def _array(self, at: int) -> Any:
        """Yields the events of the array at `at`; returns where it ends."""
        at = self._after(at, "[")
        if self._at(at) == "]":
            return self._after(at, "]")
        number = 0
        while True:
            event, at = self._value(at, f"event {number}")
            if not isinstance(event, dict):
                raise QuestionError(f"{self.start}, event {number}: is not an object")
            yield number, event
            number += 1
            if number > MAX_EVENTS:
                raise QuestionError(f"{self.start}: more than {MAX_EVENTS:,} events; at most that many are read")
            if self._at(at) != ",":
                return self._after(at, "]")
            at = self._after(at, ",")

    def _skip(self, at: int) -> int:
        found = _SPACE.match(self.text, at)
        return found.end() if found else at

    def _at(self, at: int) -> str:
        at = self._skip(at)
        return self.text[at : at + 1]

    def _after(self, at: int, wanted: str) -> int:
        at = self._skip(at)
        if self.text[at : at + 1] != wanted:
            raise QuestionError(f"{self.start}, character {at:,}: {self._broken(at)}, {wanted!r} expected")
        return at + 1

    def _value(self, at: int, what: str = "") -> tuple[Any, int]:
        at = self._skip(at)
        try:
            return _DECODER.raw_decode(self.text, at)
        except json.JSONDecodeError as error:
            rule = self._broken(error.pos)
        except RecursionError:
            rule = "nested too deeply"
        except ValueError as error:
            rule = str(error).partition(";")[0]
        raise QuestionError(f"{self.start}, {what or f'character {at:,}'}: {rule}")

    def _broken(self, at: int) -> str:
        # A string that is cut is reported where it begins.
        cut = self._skip(at) >= len(self.text) or '"' not in self.text[at + 1 :]
        return "truncated JSON" if cut else "not JSON"


def nanoseconds(event: dict[str, Any], name: str, where: str) -> int:
    """`event[name]`, microseconds in the file, as whole nanoseconds; QuestionError where it is no such number."""
    value = event.get(name)
    if isinstance(value, str):
        raise QuestionError(f"{where}: {name} = {value!r:.40}: not a number")
    if value is None:
        raise QuestionError(f"{where}: has no {name}")
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise QuestionError(f"{where}: {name}: not a number")
    if not -_LONGEST_US < value < _LONGEST_US:
        raise QuestionError(f"{where}: {name}: not a time in microseconds")
    return round(value * 1000)
