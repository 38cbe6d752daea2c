"""GraphML as plain nodes and edges; document types and entities are refused before they can mean anything."""

from __future__ import annotations

from typing import Any
from xml.parsers import expat

from hw_profiles.errors import QuestionError

Attributes = dict[str, Any]
Nodes = list[tuple[str, Attributes]]
Edges = list[tuple[str, str, Attributes]]

MAX_DEPTH = 16
NUMBERS = {"int": int, "long": int, "float": float, "double": float}


def read_graphml(data: bytes, where: str) -> tuple[bool, Nodes, Edges]:
    """Whether edges have a direction, and nodes and edges with their attributes.

    Raises QuestionError, one line beginning with `where`, for what is not XML, holds a DOCTYPE, or is no single graph.
    """
    reader = _Reader(where)
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise QuestionError(f"{where}, line {error.lineno}: not XML: {expat.ErrorString(error.code)}") from None
    if reader.graphs != 1:
        raise QuestionError(f"{where}: {reader.graphs} graphs; one is needed")
    reader.fill_defaults()
    return reader.directed, reader.nodes, reader.edges


class _Reader:
    """Callbacks of the XML parser."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.directed, self.graphs, self.depth = True, 0, 0
        self.nodes: Nodes = []
        self.edges: Edges = []
        # Key id: (name, of nodes, of edges, type, default)
        self.keys: dict[str, list[Any]] = {}
        self.key, self.text = "", ""
        self.holder: Attributes | None = None
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.EntityDeclHandler = self._doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters

    def _fail(self, rule: str) -> QuestionError:
        return QuestionError(f"{self.where}, line {self.parser.CurrentLineNumber}: {rule}")

    def _doctype(self, *_: Any) -> None:
        raise self._fail("document types and entities are not allowed")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._fail(f"nested deeper than {MAX_DEPTH} levels")
        name = tag.rpartition(" ")[2]
        if name == "graph":
            self.graphs += 1
            self.directed = attributes.get("edgedefault", "directed") != "undirected"
            if self.graphs > 1:
                raise self._fail("a graph within or beside another; one is needed")
        elif name == "key":
            self.key = self._needed(attributes, "id", name)
            of = attributes.get("for", "all")
            meaning = attributes.get("attr.name", self.key)
            self.keys[self.key] = [meaning, of in ("node", "all"), of in ("edge", "all"), attributes.get("attr.type")]
        elif name == "node":
            self.holder = {}
            self.nodes.append((self._needed(attributes, "id", name), self.holder))
        elif name == "edge":
            if "directed" in attributes and (attributes["directed"] != "false") != self.directed:
                raise self._fail("edges with and without direction in one graph; draw both ways as two edges")
            self.holder = {}
            ends = (self._needed(attributes, "source", name), self._needed(attributes, "target", name))
            self.edges.append((*ends, self.holder))
        elif name == "data":
            self.key = self._needed(attributes, "key", name)
        elif name in ("hyperedge", "port"):
            raise self._fail(f"<{name}> is not supported")
        self.text = ""

    def _end(self, tag: str) -> None:
        self.depth -= 1
        name = tag.rpartition(" ")[2]
        if name == "data" and self.holder is not None:
            if self.key not in self.keys:
                raise self._fail(f"<data key={self.key!r:.40}>: no such key")
            self.holder[self.keys[self.key][0]] = self._value(self.key, self.text)
        elif name == "default" and self.key in self.keys:
            self.keys[self.key].append(self._value(self.key, self.text))
        elif name in ("node", "edge"):
            self.holder = None

    def _characters(self, text: str) -> None:
        self.text += text

    def _needed(self, attributes: dict[str, str], key: str, tag: str) -> str:
        if key not in attributes:
            raise self._fail(f"<{tag}> without {key}")
        return attributes[key]

    def _value(self, key: str, text: str) -> Any:
        name, _, _, kind = self.keys[key][:4]
        try:
            return NUMBERS[kind](text) if kind in NUMBERS else text
        except ValueError:
            raise self._fail(f"{name} = {text!r:.40}: must be a number") from None

    def fill_defaults(self) -> None:
        """Give nodes and edges the values that their keys have by default."""
        for name, of_nodes, of_edges, _, *default in self.keys.values():
            if default:
                holders = [a for _, a in self.nodes] * of_nodes + [a for *_, a in self.edges] * of_edges
                for holder in holders:
                    holder.setdefault(name, default[-1])
