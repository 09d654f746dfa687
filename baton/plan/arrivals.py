"""Arrivals: which requests come when, at random or from a trace. A seed fixes them."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from baton.errors import InputError
from baton.plan.simulation import Arrival

TRACE_BLOCK = 512
"""Tokens for which one of a trace's `hash_ids` stands."""
MOST_TOKENS = 1 << 20
UNSHARED = 1 << 19
"""Token ids of prompts that share nothing begin here."""


def poisson(
    rate: float, count: int, *, prompt: int, new_tokens: int, seed: int = 1
) -> list[Arrival]:
    """Open loop: `count` requests at exponential intervals. Prompts have half to one and a half times
    `prompt` tokens, answers half to one and a half times `new_tokens`. No two begin alike."""
    dice = random.Random(seed)
    found, at = list[Arrival](), 0.0
    for index in range(count):
        at += dice.expovariate(rate)
        length = dice.randint(max(2, prompt // 2), prompt * 3 // 2)
        answer = dice.randint(max(1, new_tokens // 2), max(1, new_tokens * 3 // 2))
        found.append(Arrival(at, (index + 1,) * length, answer))
    return found


def read_trace(path: Path, *, most: int, speed: float = 1.0) -> list[Arrival]:
    """The first `most` requests of a trace in Mooncake's format, `speed` times as fast. A line is

        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

    with milliseconds, tokens, and an id for each block of 512 prompt tokens: prompts whose first ids are
    equal begin alike. `hash_ids` may be missing. Raises InputError."""
    try:
        with path.open(encoding="utf-8") as file:
            return _arrivals(file, str(path), most, speed)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--trace {path} cannot be read: {error}") from error


def _arrivals(lines: Iterable[str], name: str, most: int, speed: float) -> list[Arrival]:
    found: list[Arrival] = []
    for number, line in enumerate(lines, 1):
        if len(found) == most:
            break
        if line.strip():
            try:
                what = json.loads(line)
                if "setting" not in what:  # baton/plan/recorded.py
                    found.append(_arrival(what, len(found), speed))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"--trace {name}, line {number}: {_what(error)}") from error
    if not found:
        raise InputError(f"--trace {name} has no requests: one JSON object a line is expected")
    found.sort(key=lambda each: each.at)
    first = found[0].at
    return [Arrival(each.at - first, each.prompt, each.new_tokens) for each in found]


def _arrival(line: dict[str, Any], index: int, speed: float) -> Arrival:
    at, length, answer = line["timestamp"], line["input_length"], line["output_length"]
    ids = line.get("hash_ids") or []
    for key, value, least in (("timestamp", at, 0), ("input_length", length, 1),
                              ("output_length", answer, 1)):  # fmt: skip
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= (10**15 if key == "timestamp" else MOST_TOKENS):
            raise ValueError(f"{key} must be a whole number from {least} on, got {value!r:.40}")
    if not all(isinstance(each, int) for each in ids):
        raise ValueError("hash_ids must be whole numbers")
    prompt: list[int] = []
    for each in ids[: -(-length // TRACE_BLOCK)]:
        prompt += [each % UNSHARED] * TRACE_BLOCK
    prompt += [UNSHARED + index % UNSHARED] * (length - len(prompt))
    return Arrival(at / 1000 / speed, tuple(prompt[:length]), answer)


def _what(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
