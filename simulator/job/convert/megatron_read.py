"""Megatron-LM's arguments out of a command line, a shell script, or a YAML of arguments."""

from __future__ import annotations

from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.convert.megatron_flags import BARE, OPPOSITE, SOURCE
from simulator.job.convert.settings import Settings
from simulator.job.convert.shell import read_flags

SECTIONS = ("MODEL_ARGS", "model_args", "args", "language_model", "model_parallel")
LISTS = frozenset({"recompute-modules", "moe-router-load-balancing-type", "moe-aux-loss-coeff", "cp-comm-type"})


def read_command(text: str, where: str) -> Settings:
    """The flags of a command line or script; QuestionError where one is given twice with different values."""
    data: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for flag in read_flags(text, where):
        if flag.name in BARE:
            value: Any = True
        elif not flag.values:
            value = True
        elif flag.name in LISTS:
            value = list(flag.values)
        else:
            value = flag.values[0]
        if flag.name in data and data[flag.name] != value:
            raise QuestionError(
                f"{where}, line {flag.line}: --{flag.name} = {value}: line {lines[flag.name]} has"
                f" {data[flag.name]}; one of them must go"
            )
        data[flag.name], lines[flag.name] = value, flag.line
    return Settings(data, where, SOURCE, "--", lines)


def read_mapping(data: dict[str, Any], where: str) -> Settings:
    """Arguments in a YAML mapping, by flag or by destination, at the top or in one of `SECTIONS`."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        inner = value if key in SECTIONS and isinstance(value, dict) else {key: value}
        for name, raw in inner.items():
            flag, given = str(name).lstrip("-").replace("_", "-"), raw
            if flag in OPPOSITE and isinstance(given, bool):
                flag, given = OPPOSITE[flag], not raw
            if flag in found and found[flag] != given:
                raise QuestionError(f"{where}: {name} = {given}: given twice, before as {found[flag]}")
            found[flag] = given
    return Settings(found, where, SOURCE, "--")
