"""Flags in a shell script or on a command line: `--flag value` in order, shell variables filled in.

Nothing is run. Assignments, `${NAME}`, `${NAME:-default}`, arrays of flags and products such as `$((A*B))` are
understood; conditions and loops are not, so that flags in both branches of a condition are both read.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from hw_profiles.errors import QuestionError

MOST_TOKENS = 20_000
_ASSIGNED = re.compile(r"^\s*(?:export\s+|local\s+|declare\s+)?([A-Za-z_]\w*)=(?![(])(.*)$")
_NAME = re.compile(r"\$\{(\w+)(?::?[-=]([^{}]*))?\}|\$(\w+)")
_PRODUCT = re.compile(r"\$\(\(([\w\s$*{}]+)\)\)")
_ENDS = {";", "&&", "||", "|", "&", ">", "2>&1", ")", "done", "fi"}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag, the words that follow it, and its line; `values` is empty for a bare flag."""

    name: str
    values: tuple[str, ...]
    line: int


def _fill(text: str, variables: dict[str, str]) -> str:
    """`text` with the values of known variables; unknown ones stay as they are."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] if match[2] is not None else match[0])

    def product(match: re.Match[str]) -> str:
        factors = [variables.get(f.strip(" ${}"), f.strip(" ${}")) for f in match[1].split("*")]
        if not all(f.isdecimal() and len(f) < 10 for f in factors) or len(factors) > 9:
            return match[0]
        number = 1
        for f in factors:
            number *= int(f)
        return str(number)

    return _NAME.sub(value, _PRODUCT.sub(product, text))


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines with their numbers; those that end in a backslash are joined with the next."""
    out: list[tuple[int, str]] = []
    start, held = 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        if not held:
            start = number
        if line.rstrip().endswith("\\"):
            held += line.rstrip()[:-1] + " "
            continue
        out.append((start, held + line))
        held = ""
    if held:
        out.append((start, held))
    return out


def tokens(text: str, where: str) -> list[tuple[int, str]]:
    """Words of the script with their line, comments gone, variables filled in."""
    variables: dict[str, str] = {}
    out: list[tuple[int, str]] = []
    for number, line in _lines(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            raise QuestionError(f"{where}, line {number}: a quotation mark is not closed") from None
        assigned = _ASSIGNED.match(line) if len(words) <= 2 and "--" not in line.partition("=")[0] else None
        if assigned and words and (len(words) == 1 or words[0] in ("export", "local", "declare")):
            name, _, value = words[-1].partition("=")
            variables[name] = _fill(value, variables)
            # A variable may hold flags itself: MODEL="--num-layers 2".
            words = shlex.split(variables[name]) if variables[name].lstrip().startswith("--") else []
        for word in words:
            filled = _fill(word, variables)
            # A variable that holds flags is many words, as the shell makes them.
            many = filled.split() if filled != word and filled.lstrip().startswith("--") else [filled]
            out += [(number, one) for one in many]
        if len(out) > MOST_TOKENS:
            raise QuestionError(f"{where}: more than {MOST_TOKENS:,} words")
    return out


def _opens_array(word: str) -> str:
    """`ARGS=(--flag` as `--flag`, `--flag)` as `--flag`."""
    word = re.sub(r"^\w+\+?=\(", "", word)
    return word[:-1] if word.endswith(")") and "(" not in word else word


def read_flags(text: str, where: str) -> list[Flag]:
    """The flags of `text` in order; QuestionError where quotation marks do not match."""
    out: list[Flag] = []
    values: list[str] = []
    name, at = "", 0
    for line, raw in [*tokens(text, where), (0, "--")]:
        word = _opens_array(raw)
        if re.match(r"--[A-Za-z]", word) or raw == "--":
            if name:
                out.append(Flag(name, tuple(values), at))
            name, equals, value = word[2:].partition("=")
            name, values, at = name.replace("_", "-"), [value] if equals else [], line
        elif word in _ENDS or word.endswith((".py", ".sh")):
            if name:
                out.append(Flag(name, tuple(values), at))
            name, values = "", []
        elif name and word and not re.fullmatch(r"\$\{\w+\[@\]\}|\$\w*ARGS\w*", word):
            values.append(word)
    return out


def read_pairs(text: str, where: str) -> list[tuple[int, str, str]]:
    """The `key=value` words of a command line, with their line."""
    found = []
    for line, word in tokens(text, where):
        key, equals, value = word.partition("=")
        if equals and re.fullmatch(r"[A-Za-z_][\w.]*", key):
            found.append((line, key, value))
    return found
