"""Options: which study reads which option, and checks before anything starts. Pure; no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence

from baton.errors import InputError
from tools.lab.study import STUDIES

READERS = {
    "batch_sizes": ("batching",),
    "windows_ms": ("batching",),
    "prompt_lengths": ("kv-cache", "disagg"),
    "rates": ("disagg",),
}
"""Fields of Setting that only these studies read. All studies read the other fields."""


LARGEST_BATCH = 1024
LONGEST_WINDOW_MS = 10_000.0
LARGEST_RATE = 10_000.0
MOST_VALUES = 16  # of one list: each costs seconds to minutes


def whole_numbers(text: str, option: str, *, low: int, high: int) -> tuple[int, ...]:
    """ "1,4,8" as numbers, smallest first. Raises InputError with the wrong item."""
    found = []
    for item in _items(text, option):
        if not item.isascii() or not item.isdigit():
            raise InputError(
                f"{option} takes comma-separated whole numbers such as 1,4,8; got {item!r}"
            )
        found.append(int(item))
    return tuple(int(each) for each in _checked(found, option, low, high))


def decimals(text: str, option: str, *, low: float, high: float) -> tuple[float, ...]:
    """ "0,10,2.5" as numbers, smallest first. Raises InputError with the wrong item."""
    found = []
    for item in _items(text, option):
        try:
            value = float(item)
        except ValueError as error:
            raise InputError(
                f"{option} takes comma-separated numbers such as 0,10,50; got {item!r}"
            ) from error
        if not math.isfinite(value):
            raise InputError(f"{option}: {item} is not a finite number")
        found.append(value)
    return _checked(found, option, low, high)


def refuse_unread(given: Mapping[str, str], studies: Iterable[str]) -> None:
    """Raises InputError for an option that none of the chosen studies reads, as it would be ignored.
    `given`: the options on the command line, by the name of their field in Setting."""
    chosen = list(studies)
    for field, option in given.items():
        readers = READERS.get(field, STUDIES)
        if not set(readers) & set(chosen):
            raise InputError(
                f"{option} is read by {' and '.join(readers)}, not by {' and '.join(chosen)}"
            )


def refuse_too_long(lengths: Iterable[int], *, new_tokens: int, context: int, model: str) -> None:
    """Raises InputError for a prompt that does not fit the model's context with its answer."""
    for length in lengths:
        if length + new_tokens > context:
            raise InputError(
                f"--prompt-lengths {length}: with {new_tokens} new tokens that is more than the "
                f"{context:,} of {model}; at most {context - new_tokens:,}, or another --model"
            )


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise InputError(
            f"{option} has an empty item in {text!r}: separate numbers with single commas"
        )
    if len(items) > MOST_VALUES:
        raise InputError(f"{option} takes at most {MOST_VALUES} numbers, got {len(items)}")
    return items


def _checked(found: Sequence[float], option: str, low: float, high: float) -> tuple[float, ...]:
    for value in found:
        if not low <= value <= high:
            raise InputError(f"{option} must be {low:g} to {high:g}, got {value:g}")
    if len(set(found)) < len(found):
        raise InputError(f"{option} names a number twice: {', '.join(f'{v:g}' for v in found)}")
    return tuple(sorted(found))
