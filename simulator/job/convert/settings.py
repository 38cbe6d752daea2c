"""The settings of another trainer's configuration: each is checked as it is read, and what was not read is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Never

from hw_profiles.errors import QuestionError, nearest

MOST = 10**9
_VARIABLE = re.compile(r"\$\{?\w+")


@dataclass(frozen=True, slots=True)
class Left:
    """Something that has no counterpart on the other side: its name, its value, and why."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Default:
    """A setting that was not given, the value that its trainer takes, and where that stands."""

    name: str
    value: Any
    source: str


class Settings:
    """Names and values of one configuration, and what became of them.

    `mark` is what a name has in front of it (`--`), `source` the file and version that the defaults are from, `lines`
    where a name stands in the file.
    """

    def __init__(
        self, data: Mapping[str, Any], where: str, source: str, mark: str = "", lines: Mapping[str, int] | None = None
    ) -> None:
        self.data, self.where, self.source, self.mark = dict(data), where, source, mark
        self.lines = dict(lines or {})
        self.used: dict[str, Any] = {}
        self.defaults: dict[str, Default] = {}
        self.left: dict[str, Left] = {}

    def refuse(self, name: str, rule: str) -> Never:
        """QuestionError that names file, line, setting, value and `rule`."""
        line = f", line {self.lines[name]}" if name in self.lines else ""
        value = self.data.get(name)
        said = "" if value is None else f" = {str(value)[:60]}"
        raise QuestionError(f"{self.where}{line}: {self.mark}{name}{said}: {rule}")

    def given(self, name: str) -> bool:
        """Whether the configuration has it; null is as good as nothing."""
        return self.data.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or the trainer's default, which is then told."""
        if self.given(name):
            self.used[name] = self.data[name]
            return self.data[name]
        if name in self.data:
            self.used[name] = None
        self.defaults[name] = Default(name, default, self.source)
        return default

    def need(self, name: str) -> Any:
        """The value of a setting that has no default."""
        if not self.given(name):
            raise QuestionError(f"{self.where}: {self.mark}{name}: required, and missing")
        return self.get(name)

    def leave(self, name: str, why: str) -> None:
        """Tell that the value given for `name` cannot be said in a job; nothing where it was not given."""
        if self.given(name):
            self.used.pop(name, None)
            self.left[name] = Left(name, self.data[name], why)

    def _as_number(self, name: str, value: Any, whole: bool) -> float:
        what = "a whole number" if whole else "a number"
        if isinstance(value, bool):
            self.refuse(name, f"must be {what}")
        try:
            number = float(str(value).replace("_", ""))
        except ValueError:
            shell = _VARIABLE.search(str(value))
            self.refuse(name, f"must be {what}" + (f"; {shell[0]} has no value in the file" if shell else ""))
        if not math.isfinite(number) or abs(number) > 1e15 or (whole and number != int(number)):
            self.refuse(name, f"must be {what}")
        return number

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int | None:
        """A whole number of at least `least`, or the default."""
        value = self.get(name, default)
        if not self.given(name):
            return default
        number = int(self._as_number(name, value, True))
        if not least <= number <= most:
            self.refuse(name, f"must be a whole number from {least} to {most}")
        return number

    def needed(self, name: str, default: int | None = None, least: int = 1) -> int:
        """As `count`, where nothing can go on without it."""
        if default is None:
            self.need(name)
        number = self.count(name, default, least)
        assert number is not None
        return number

    def number(self, name: str, default: float | None = None, least: float = -math.inf) -> float | None:
        """A number of at least `least`, or the default."""
        value = self.get(name, default)
        if not self.given(name):
            return default
        number = self._as_number(name, value, False)
        if number < least:
            self.refuse(name, f"must be at least {least:g}")
        return number

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; a bare flag on a command line is true."""
        value = self.get(name, default)
        if isinstance(value, bool):
            return value
        known = {"true": True, "false": False, "1": True, "0": False}
        if str(value).lower() not in known:
            self.refuse(name, "must be true or false")
        return known[str(value).lower()]

    def choice(self, name: str, known: Iterable[str], default: str) -> str:
        """One of the `known` words, or the default."""
        value, words = str(self.get(name, default)), list(known)
        if value not in words:
            self.refuse(name, f"must be one of {', '.join(w or repr('') for w in words)}{nearest(value, words)}")
        return value

    def words(self, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """A list of words, from a list or from a text with blanks or commas between them."""
        value = self.get(name, default)
        if isinstance(value, str):
            return tuple(w for w in re.split(r"[\s,]+", value.strip("[] ")) if w)
        if isinstance(value, (list, tuple)):
            return tuple(str(v) for v in value)
        self.refuse(name, "must be a list of words")

    def unread(self) -> list[str]:
        """Names that were given and neither read nor told about."""
        return [n for n, v in self.data.items() if n not in self.used and n not in self.left and v is not None]
