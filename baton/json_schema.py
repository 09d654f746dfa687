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

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any
from urllib.parse import quote, unquote

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
FORMS_OF: Sequence[tuple[Sequence[str], tuple[Any, str]]] = (
    (NAMED, (dict, "an object")), (ONE, (dict | bool, "a schema")), (SEVERAL, (list, "a list")),
)  # fmt: skip
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,), "contains": (), "not": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "dependentRequired": ({},), "dependentSchemas": ({},), "dependencies": ({},),
    "unevaluatedItems": (True, {}), "unevaluatedProperties": (True, {}, False),
    "$dynamicRef": (), "$recursiveRef": (),
}  # fmt: skip
"""What cannot be enforced, and its values that need not be. `unevaluatedProperties: false` is what
closing means."""
MOST_STEPS = 20_000
"""Parts of parts that are looked at: references may make more of them than a schema has."""
MOST_PARTS = 50_000
"""Schemas and names of keys that are written or looked at to close objects, a long name for several: a
schema of 64 KiB has at most 10,000, but each of a thousand references may repeat a thousand names."""
NAME = 32
"""Characters of a name that count as one of these."""
OPEN = "open:"
PLAIN = "/~!$&'()*+,;=:@?"
"""Characters that stand for themselves in a reference, beside letters, digits and `-._~`."""


def enforceable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with closed objects and without annotations that would be refused. Raises RequestError
    that names the first keyword which cannot be enforced or read, and its place, or the limit."""
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
        self._parts_left = MOST_PARTS
        self._copies: dict[str, str] = {}  # pointers that are needed open, and their copies' names
        self._to_copy: list[tuple[str, Any]] = []  # their pointers and schemas
        self._targets: dict[str, tuple[str, Any]] = {}  # by reference

    def whole(self) -> dict[str, Any]:
        found: dict[str, Any] = self._schema(self._root, "", closing=True)
        copied: dict[str, Any] = {}
        while self._to_copy:
            pointer, target = self._to_copy.pop()
            copied[self._copies[pointer]] = self._schema(target, pointer, closing=False)
        if copied:
            found["$defs"] = found.get("$defs", {}) | copied
        return found

    def _schema(self, node: Any, place: str, *, closing: bool) -> Any:
        """`place`: its JSON pointer. `closing`: not for a part of what is closed elsewhere."""
        if not isinstance(node, dict):
            return node
        self._spend(1)
        found = {k: v for k, v in node.items() if not _ignored(k, v, node)}
        _check_forms(found, place)
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
        if "$ref" in found:
            spelled = self._spelled if closing and alone else self._opened
            found["$ref"] = spelled(found["$ref"])
        return self._closed(node, found, alone=alone) if closing else found

    def _closed(
        self, node: Mapping[str, Any], found: dict[str, Any], *, alone: bool
    ) -> dict[str, Any]:
        shape = _Shape()
        for part in [node] if alone else self._parts(node):
            if not alone:
                self._spend_names(part.get("properties"), part.get("patternProperties"))
            shape.add(part)
        if not shape.shaped or shape.said:
            return found
        known = found.get("properties", {})
        self._spend_names([name for name in shape.names if name not in known])
        found["properties"] = known | {name: {} for name in shape.names if name not in known}
        if shape.patterns:
            matched = found.get("patternProperties", {})
            self._spend_names([each for each in shape.patterns if each not in matched])
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
            pointer, target = self._target(part.get("$ref"))
            if target is not None and pointer not in seen:
                seen.add(pointer)
                inner.append(target)
            waiting += [each for each in reversed(inner) if isinstance(each, dict)]

    def _sources(self, node: Mapping[str, Any]) -> int:
        """How many places of a schema say which keys its object has."""
        own = bool(node.keys() & {"properties", "patternProperties", "additionalProperties"})
        several = sum(key in node for key in ("anyOf", "oneOf", "$ref"))
        return own + several + len(_listed(node.get("allOf")))

    def _opened(self, reference: Any) -> Any:
        """A reference to the same without its closing."""
        pointer, target = self._target(reference)
        if not isinstance(target, dict):
            return self._spelled(reference)
        if pointer not in self._copies:
            self._copies[pointer] = next(self._free_names)
            self._to_copy.append((pointer, target))
        return f"#/$defs/{self._copies[pointer]}"

    def _spelled(self, reference: Any) -> Any:
        """A reference as the grammar reads it, which demands a valid URI."""
        pointer, target = self._target(reference)
        return reference if target is None else f"#{quote(pointer, safe=PLAIN)}"

    @cached_property
    def _free_names(self) -> Iterator[str]:
        """Names for copies: no definition of the client's has one, and no reference of its means one."""
        definitions = self._root.get("$defs")
        taken = set(definitions) if isinstance(definitions, dict) else set[str]()
        waiting: list[Any] = [self._root]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                if isinstance(reference := value.get("$ref"), str):
                    taken.update(unquote(reference).split("/"))
                waiting.extend(value.values())
            elif isinstance(value, list):
                waiting.extend(value)
        return (name for number in count() if (name := f"{OPEN}{number}") not in taken)

    def _target(self, reference: Any) -> tuple[str, Any]:
        """What a reference within the schema means, after its JSON pointer, which is the same for all
        spellings; None for any other, which the grammar refuses."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return "", None
        if reference not in self._targets:
            self._targets[reference] = self._found(reference[1:])
        return self._targets[reference]

    def _found(self, reference: str) -> tuple[str, Any]:
        """By RFC 6901 a reference is percent-decoded first, and then it is a pointer. Where this finds
        nothing: some encode each name alone, `/` too, and others write names as they are."""
        steps = reference.split("/")
        for each in (unquote(reference).split("/"), [unquote(step) for step in steps], steps):
            pointer, target = self._walked(each[1:]) if not each[0] else ("", None)
            if target is not None:
                return pointer, target
        return "", None

    def _walked(self, steps: Sequence[str]) -> tuple[str, Any]:
        found: Any = self._root
        pointer = [""]
        for step in steps:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal():
                index = int(name.lstrip("0")[:9] or "0")
                name, found = str(index), found[index] if index < len(found) else None
            else:
                found = found.get(name) if isinstance(found, dict) else None
            pointer.append(name.replace("~", "~0").replace("/", "~1"))
        return "/".join(pointer), found

    def _spend_names(self, *names: Any) -> None:
        """Those of a mapping or list; anything else has none."""
        known = [each for each in names if isinstance(each, dict | list)]
        self._spend(sum(1 + len(name) // NAME for each in known for name in each))

    def _spend(self, parts: int) -> None:
        self._parts_left -= parts
        if self._parts_left < 0:
            text = (
                f"the schema, with its objects closed, has more than {MOST_PARTS:,} parts, the limit: "
                "use fewer references and alternatives beside properties, or set additionalProperties"
            )
            raise RequestError(text, code=INVALID)


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


def _check_forms(node: Mapping[str, Any], place: str) -> None:
    """Whether the keywords that hold schemas have the form that the standard demands."""
    for key in node.keys() & {*NAMED, *SEVERAL, *ONE}:
        forms = [form for keys, form in FORMS_OF if key in keys]
        if not any(isinstance(node[key], kind) for kind, _ in forms):
            wanted = " or ".join(name for _, name in forms)
            text = f"the schema's {f'{place}/{key}'[:100]} must be {wanted}"
            raise RequestError(f"{text}, got {json.dumps(node[key])[:40]}", code=INVALID)


def _refuse(node: Mapping[str, Any], place: str) -> None:
    asserting = (*WITHOUT_EFFECT, "if", "minContains", "maxContains")
    named = next((key for key in node if key in asserting), None)
    if named is not None:
        where = f" at {place[:100]}" if place else ""
        text = f"the schema's keyword {named}{where} cannot be enforced: leave it out"
        raise RequestError(text, code=INVALID)
