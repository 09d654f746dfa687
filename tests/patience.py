"""How long a test waits for what takes moments on a quiet machine: one deadline for all of them.

A deadline in a test only ends a hang. A machine that is busy with other things may take a hundred times
as long as a quiet one, and that is no failure.
"""

import select
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

PATIENCE_S = 300.0
"""Its end fails the test, with what was waited for. A whole test has longer (pyproject.toml)."""

PATIENCE_MS = int(1000 * PATIENCE_S)

OUTLIVES_S = 3600
"""Seconds after which a process that a test starts ends by itself: later than any wait for it."""

LOOK_S = 0.005

T = TypeVar("T")


def patiently(what: str | Callable[[], object]) -> Iterator[None]:
    """The turns of a loop that somebody else ends. `what`: what it waits for, or how to tell it then."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        yield
    told = what if isinstance(what, str) else what()
    raise AssertionError(f"not within {PATIENCE_S:g} s: {told}")


def until(look: Callable[[], T | None], what: str | Callable[[], object]) -> T:
    """What `look` finds, as soon as it is there and true."""
    for _ in patiently(what):
        if found := look():
            return found
        select.select([], [], [], LOOK_S)
    raise AssertionError("patiently() ends no loop")
