"""Finite: JSON whose numbers are numbers. The one reader of what clients and models write. Pure.

JSON has no NaN and no Infinity, but Python's parser takes both, and makes an Infinity of 1e999. What is
made of such a value (a prompt, a stored response, a grammar) would be no JSON, or not what was sent.
"""

import json
from math import isfinite
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError, also for a number that no double can hold, and RecursionError."""
    return json.loads(text, parse_float=_number, parse_constant=_refuse)


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(
            f"the number {text[:40]} is larger than a double can hold: send it as text"
        )
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
