"""Reading of fields of a config.json: each is checked as it is read, and what was not read is looked at in the end."""

from __future__ import annotations

import re
from typing import Any, Never

from hw_profiles.errors import QuestionError, nearest

# Parts of field names that speak of shapes, parts that make a name harmless all the same, and whole harmless names.
_SHAPES = re.compile(
    "att(ention|n)|block|chunk|compress|conv|depth|dim|experts?|freq|gat(e|ing)|hc|heads?|hidden|hybrid|index|interval|"
    "latent|layers?|linear|lora|mamba|mlp|moe|mtp|n|nextn|num|pattern|rank|ratio|shared?|size|sparse|ssm|step|stride|"
    "types|width|window"
)
_HARMLESS = re.compile(
    "beams?|cache|coeff?|dropout|dtype|eps|epsilon|ids?|init|initializer|implementation|jitter|labels?|length|loss|map|"
    "ngram|pdrop|positions?|quantization|relative|rope|rotary|scal(e|ing)|softcapping|temperature|theta|tokens?|version"
)
_IGNORED = frozenset(
    {"chunk_size_feed_forward", "ep_size", "expert_capacity", "is_full_sparse", "n_ctx", "num_return_sequences"}
)


class Fields:
    """The fields of one config, which remembers those that were read; `alias` gives the name a field has here."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self.alias: dict[str, str] = {}
        self._read: set[str] = set(_IGNORED)

    def refuse(self, name: str, rule: str) -> Never:
        """QuestionError that names field, value and `rule`."""
        name = self.alias.get(name, name)
        value = repr(self.data.get(name))
        raise QuestionError(f"{self.where}: {name} = {value if len(value) <= 60 else value[:57] + '...'}: {rule}")

    def missing(self, name: str) -> Never:
        """QuestionError for a field without a value."""
        raise QuestionError(f"{self.where}: {self.alias.get(name, name)}: required, and missing")

    def skip(self, *names: str) -> None:
        """Mark fields as understood that change nothing here."""
        self._read.update(self.alias.get(name, name) for name in names)

    def get(self, name: str) -> Any:
        """The value as it stands, None where it is missing."""
        self.skip(name)
        return self.data.get(self.alias.get(name, name))

    def optional(self, name: str, least: int = 1, most: int = 10**9) -> int | None:
        """A whole number, or None where the field is missing or null."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(name, f"a whole number from {least} to {most} is needed")
        return value

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """A whole number; `default` where the field is missing or null."""
        value = self.optional(name, least, most)
        if value is not None:
            return value
        if default is None:
            self.missing(name)
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false is needed")
        return default if value is None else value

    def one_of(self, name: str, known: dict[str, str], default: str) -> str:
        """What `known` makes of the text in the field."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in known:
            self.refuse(name, f"not known{nearest(str(value), known)}; known: {', '.join(known)}")
        return known[value]

    def layer_numbers(self, name: str, layers: int) -> list[int] | None:
        """A list of numbers of layers, or None where the field is missing or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < layers for i in value):
            self.refuse(name, f"a list of layer numbers from 0 to {layers - 1} is needed")
        return value

    def check_all_read(self) -> None:
        """QuestionError for the first field that looks like a shape and was not read."""
        for name, value in self.data.items():
            words = str(name).lower().split("_")
            shape = any(map(_SHAPES.fullmatch, words)) and not any(map(_HARMLESS.fullmatch, words))
            if shape and value and name not in self._read and not isinstance(value, float):
                rule = "not understood for this architecture, and it may change the cost; take it out if it does not"
                self.refuse(str(name), rule)
