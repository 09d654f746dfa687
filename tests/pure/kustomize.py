"""What `kubectl kustomize` does with the files in deploy/kubernetes, as far as they ask:
resources, components, namespace, strategic merge and JSON patches, image tags. Anything else is an error.

tests/golden/kubernetes.json holds the output of kubectl itself, so the two cannot drift apart.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}
CLUSTER_WIDE = {"Namespace"}
MERGED_BY = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}
"""Lists whose elements are merged by this key; others are replaced."""


def build(folder: Path) -> list[Resource]:
    """The resources of a kustomization, sorted by kind and name."""
    found = _build(folder)
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def _build(folder: Path, base: list[Resource] | None = None) -> list[Resource]:
    """`base`: what a component is applied to."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(wanted) <= KNOWN, f"{folder}: {set(wanted) - KNOWN} is not understood here"
    found = list(base or [])
    for name in wanted.get("resources", ()):
        path = folder / name
        found += _build(path) if path.is_dir() else documents(path)
    for name in wanted.get("components", ()):
        found = _build(folder / name, found)
    for patch in wanted.get("patches", ()):
        assert set(patch) <= {"path", "target"}, f"{folder}: {patch} is not understood here"
        for document in documents(folder / patch["path"]):
            target = patch.get("target") or {
                "kind": document["kind"], "name": document["metadata"]["name"],
            }  # fmt: skip
            (one,) = [each for each in found if _fits(each, target)]
            _patch(one, document)
    for each in found:
        if "namespace" in wanted and each["kind"] not in CLUSTER_WIDE:
            each["metadata"]["namespace"] = wanted["namespace"]
        for image in wanted.get("images", ()):
            _retag(each, image["name"], image["newTag"])
    return found


def documents(path: Path) -> list[Any]:
    """The documents of a file. One that is a list of JSON patches counts as one."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def containers(resource: Resource) -> list[dict[str, Any]]:
    """Those of a Deployment."""
    found: list[dict[str, Any]] = resource["spec"]["template"]["spec"]["containers"]
    return found


def _fits(resource: Resource, target: dict[str, str]) -> bool:
    return (resource["kind"], resource["metadata"]["name"]) == (target["kind"], target["name"])


def _patch(resource: Resource, patch: Any) -> None:
    if isinstance(patch, list):
        for step in patch:
            _add(resource, step)
    else:
        merged = merge(resource, patch)
        resource.clear()
        resource.update(merged)


def merge(old: Any, new: Any, key: str = "") -> Any:
    """A strategic merge patch."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = {name: merge(old[name], new[name], name) for name in old.keys() & new.keys()}
        return {**old, **copy.deepcopy(new), **both}
    by = MERGED_BY.get(key)
    if by is None or not isinstance(old, list):
        return copy.deepcopy(new)
    changed = {each[by]: each for each in new}
    kept = [merge(each, changed.pop(each[by], {})) for each in old]
    return kept + copy.deepcopy(list(changed.values()))


def _add(resource: Resource, step: dict[str, Any]) -> None:
    """One step of a JSON patch: an element at the end of a list."""
    assert step["op"] == "add", f"{step} is not understood here"
    *path, last = step["path"].strip("/").split("/")
    assert last == "-", f"{step} is not understood here"
    place: Any = resource
    for each in path:
        place = place[int(each)] if isinstance(place, list) else place[each]
    place.append(copy.deepcopy(step["value"]))


def _retag(resource: Resource, name: str, tag: str) -> None:
    if resource["kind"] == "Deployment":
        for each in containers(resource):
            if each["image"].partition(":")[0] == name:
                each["image"] = f"{name}:{tag}"
