"""How far generated tests go: `make test` tries a part of what `make test-deep` tries."""

import os

DEEP = os.environ.get("BATON_TESTS") == "deep"


def deep(much: int, *, usual: int) -> int:
    """`much` by `make test-deep`, else `usual`: examples, or actions of a path."""
    return much if DEEP else usual
