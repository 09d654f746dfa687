"""Versions below which a dependency is known to be attackable from where we use it.

`pyproject.toml` must not allow an older one, and the lock must not pin one. A new advisory is a row here
and a raised bound there; docs/dependencies.md says why.
"""

from importlib.metadata import version

import pytest
from packaging.version import Version

from tests.pure.test_packaging import declared, lock, version_of

FLOORS = {
    "msgpack": ("1.2.3", "leaks memory on refused maps: any peer could exhaust the router"),
    "h11": ("0.16", "CVE-2025-43859: malformed chunked bodies, request smuggling behind a proxy"),
    "starlette": (
        "0.49.1",
        "CVE-2025-62727: quadratic time on a Range header, for files of the page",
    ),
    "jinja2": ("3.1.6", "CVE-2025-27516: a way out of the sandbox, for templates of models"),
    "torch": ("2.6", "CVE-2025-32434: weights_only=True executes code, for `convert`"),
    "pyyaml": ("5.4", "CVE-2020-14343: code in YAML"),
}
FOUND_BY_OTHERS = {"jinja2"}  # not declared, or by another dependency


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_hole_is_allowed(name: str) -> None:
    floor, why = FLOORS[name]
    wanted = declared().get(name)
    if wanted is None:
        assert name in FOUND_BY_OTHERS, name
    else:
        bounds = [Version(each.version) for each in wanted.specifier if each.operator == ">="]
        assert bounds, f"{name} has no lower bound: {why}"
        assert max(bounds) >= Version(floor), why


@pytest.mark.parametrize("name", FLOORS)
def test_the_lock_and_this_environment_are_above_the_floor(name: str) -> None:
    floor, why = FLOORS[name]
    assert Version(version_of(lock()[name])) >= Version(floor), why
    assert Version(version(name).partition("+")[0]) >= Version(floor), why
