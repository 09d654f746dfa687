"""JSON schema: a client's schema as a grammar can enforce it. Plain values in, plain values out.

    closed       an object that names properties has no others, unless the schema says so with
                 additionalProperties. Read literally, any schema allows any further key, and a small
                 model then writes keys until its tokens are used up.
    annotations  a `format` that the grammar does not know describes, as the standard says
    refused      a keyword that asserts and cannot be enforced, by its name

Parts of one schema that describe one object (allOf, or anyOf and $ref beside properties) are closed
together: each alone would forbid what the others name. Where such a part is a definition that stands
elsewhere, too, the part refers to a copy of it that is not closed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.errors import RequestError

INVALID = "invalid_grammar"
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid",
                     "uri", "unknown"})  # fmt: skip
"""Those that are enforced."""
NO_ASSERTION = frozenset({"$schema", "$id", "$anchor", "$defs", "$comment", "definitions", "title",
                          "default", "description", "deprecated", "examples", "readOnly",
                          "writeOnly"})  # fmt: skip
ONE = ("items", "additionalItems", "additionalProperties")
"""Keywords that hold a schema (`items` also a list of them), ..."""
SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
TOGETHER = ("allOf", "anyOf", "oneOf")
"""... and those whose schemas describe the same value."""
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,), "contains": (), "propertyNames": (True, {}), "not": (False,),
    "dependentRequired": ({},), "dependentSchemas": ({},), "dependencies": ({},),
    "unevaluatedItems": (True, {}), "unevaluatedProperties": (True, {}, False),
    "$dynamicRef": (), "$recursiveRef": (),
}  # fmt: skip
"""What cannot be enforced, and its values that need not be. `unevaluatedProperties: false` is what
closing means."""
MOST_STEPS = 20_000
"""Parts of parts that are looked at: references may make more of them than a schema has."""
OPEN = "open:"


def enforceable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with closed objects and without annotations that would be refused. Raises RequestError
    that names the first keyword which cannot be enforced, and its place."""
    return _Rewriting(schema).whole()


def _is(value: Any, known: Sequence[Any]) -> bool:
    """Is it one of them? 0 is not false here."""
    return any(type(value) is type(each) and value == each for each in known)


@dataclass(slots=True)
class _Shape:
    """What the parts that describe one object say about its keys."""

    names: dict[str, None] = field(default_factory=dict)  # in their order
    patterns: dict[str, None] = field(default_factory=dict)
    shaped: bool = False  # some part names properties
    said: bool = False  # some part says itself what else is allowed

    def add(self, node: Mapping[str, Any]) -> None:
        properties, patterns = node.get("properties"), node.get("patternProperties")
        self.shaped = self.shaped or isinstance(properties, dict) or isinstance(patterns, dict)
        self.said = self.said or "additionalProperties" in node
        self.names |= dict.fromkeys(properties if isinstance(properties, dict) else ())
        self.patterns |= dict.fromkeys(patterns if isinstance(patterns, dict) else ())
        required = node.get("required")
        if isinstance(required, list):  # what is required is allowed
            self.names |= dict.fromkeys(each for each in required if isinstance(each, str))


class _Rewriting:
    """One schema, rewritten."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0
        self._copies: dict[
            str, str
        ] = {}  # references that are needed open, and their copies' names
        self._to_copy: list[str] = []

    def whole(self) -> dict[str, Any]:
        found: dict[str, Any] = self._schema(self._root, "", closing=True)
        copied: dict[str, Any] = {}
        while self._to_copy:
            reference = self._to_copy.pop()
            target = self._target(reference)
            copied[self._copies[reference]] = self._schema(target, reference[1:], closing=False)
        if copied:
            found["$defs"] = found.get("$defs", {}) | copied
        return found

    def _schema(self, node: Any, place: str, *, closing: bool) -> Any:
        """`place`: its JSON pointer. `closing`: not for a part of what is closed elsewhere."""
        if not isinstance(node, dict):
            return node
        found = {k: v for k, v in node.items() if not _ignored(k, v, node)}
        _refuse(found, place)
        alone = self._sources(node) <= 1
        for key in NAMED:
            if isinstance(each := found.get(key), dict):
                found[key] = {
                    name: self._schema(inner, f"{place}/{key}/{name}", closing=True)
                    for name, inner in each.items()
                }
        for key in SEVERAL:
            if isinstance(each := found.get(key), list):
                inside = closing and alone if key in TOGETHER else True
                found[key] = [
                    self._schema(inner, f"{place}/{key}/{index}", closing=inside)
                    for index, inner in enumerate(each)
                ]
        for key in ONE:
            if isinstance(found.get(key), dict):
                found[key] = self._schema(found[key], f"{place}/{key}", closing=True)
        if "$ref" in found and not (closing and alone):
            found["$ref"] = self._opened(found["$ref"])
        return self._closed(node, found, alone=alone) if closing else found

    def _closed(
        self, node: Mapping[str, Any], found: dict[str, Any], *, alone: bool
    ) -> dict[str, Any]:
        shape = _Shape()
        for part in [node] if alone else self._parts(node):
            shape.add(part)
        if not shape.shaped or shape.said:
            return found
        known = found.get("properties", {})
        found["properties"] = known | {name: {} for name in shape.names if name not in known}
        if shape.patterns:
            matched = found.get("patternProperties", {})
            found["patternProperties"] = {each: {} for each in shape.patterns} | matched
        return found | {"additionalProperties": False}

    def _parts(self, node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """All that describes the same value, itself first."""
        waiting, seen = [node], set[str]()
        while waiting:
            part = waiting.pop()
            self._steps += 1
            if self._steps > MOST_STEPS:
                text = "the schema has too many references within allOf, anyOf and oneOf"
                raise RequestError(text, code=INVALID)
            yield part
            inner = [each for key in TOGETHER for each in _listed(part.get(key))]
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in seen:
                seen.add(reference)
                inner.append(self._target(reference))
            waiting += [each for each in reversed(inner) if isinstance(each, dict)]

    def _sources(self, node: Mapping[str, Any]) -> int:
        """How many places of a schema say which keys its object has."""
        own = bool(node.keys() & {"properties", "patternProperties", "additionalProperties"})
        several = sum(key in node for key in ("anyOf", "oneOf", "$ref"))
        return own + several + len(_listed(node.get("allOf")))

    def _opened(self, reference: Any) -> Any:
        """A reference to the same without its closing."""
        if not isinstance(self._target(reference), dict):
            return reference
        if reference not in self._copies:
            self._copies[reference] = f"{OPEN}{len(self._copies)}"
            self._to_copy.append(reference)
        return f"#/$defs/{self._copies[reference]}"

    def _target(self, reference: Any) -> Any:
        """What a reference within the schema means; None for any other, which the grammar refuses."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self._root
        for step in reference[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name[:9]) < len(found):
                found = found[int(name[:9])]
            else:
                found = found.get(name) if isinstance(found, dict) else None
        return found if reference == "#" or reference.startswith("#/") else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ignored(key: str, value: Any, node: Mapping[str, Any]) -> bool:
    """Does the keyword assert nothing here?"""
    if key == "format":
        return isinstance(value, str) and value not in FORMATS
    if key in ("then", "else"):
        return "if" not in node
    if key == "if":
        return not node.keys() & {"then", "else"}
    if key in ("minContains", "maxContains"):
        return "contains" not in node
    return _is(value, WITHOUT_EFFECT.get(key, ()))


def _refuse(node: Mapping[str, Any], place: str) -> None:
    asserting = (*WITHOUT_EFFECT, "if", "minContains", "maxContains")
    named = next((key for key in node if key in asserting), None)
    if named is not None:
        where = f" at {place[:100]}" if place else ""
        text = f"the schema's keyword {named}{where} cannot be enforced: leave it out"
        raise RequestError(text, code=INVALID)
