"""Loads: which request is sent when. A seed fixes them, so that every arm gets the same load."""

import hashlib
import random
from dataclasses import dataclass

LOWEST, HIGHEST = 5, 2000  # token ids of prompts: in every vocabulary, no special tokens


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: its arrival (seconds from the beginning), prompt and length."""

    at: float
    prompt: tuple[int, ...]
    new_tokens: int
    watched: bool = True  # its latencies count


@dataclass(frozen=True, slots=True)
class Load:
    """Requests by time of arrival."""

    name: str
    requests: tuple[Planned, ...]

    @property
    def digest(self) -> str:
        """A hash: equal loads have equal digests."""
        return hashlib.sha256(repr(self.requests).encode()).hexdigest()[:16]


def poisson(
    rate: float, *, seconds: float, prompt: int, new_tokens: int, seed: int, context: int
) -> Load:
    """Open loop: requests arrive at exponential intervals, whether earlier ones are done or not.
    Prompts have half to one and a half times `prompt` tokens."""
    dice = random.Random(seed)
    requests, at = [], dice.expovariate(rate)
    while at < seconds:
        length = min(context - new_tokens, dice.randint(prompt // 2, prompt * 3 // 2))
        requests.append(Planned(at, _prompt(dice, length), new_tokens))
        at += dice.expovariate(rate)
    return Load(f"{rate:g} requests/s", tuple(requests))


def mixed(
    *,
    streams: int,
    stream_tokens: int,
    prompt: int,
    every: float,
    count: int,
    seed: int,
    first: float = 1.0,
) -> Load:
    """`streams` short prompts decode for long, and are watched. From `first` seconds on, `count`
    prompts of `prompt` tokens arrive, one every `every` seconds, for a few tokens each."""
    dice = random.Random(seed)
    requests = [Planned(0.0, _prompt(dice, 16), stream_tokens) for _ in range(streams)]
    for i in range(count):
        requests.append(Planned(first + i * every, _prompt(dice, prompt), 4, watched=False))
    return Load(f"{streams} streams, {prompt}-token prompts", tuple(requests))


def burst(count: int, *, prompt: int, new_tokens: int, seed: int, context: int) -> Load:
    """`count` requests at once, to measure the capacity of a cluster. Prompts as in poisson."""
    dice = random.Random(seed)
    lengths = [
        min(context - new_tokens, dice.randint(prompt // 2, prompt * 3 // 2)) for _ in range(count)
    ]
    requests = tuple(Planned(0.0, _prompt(dice, each), new_tokens) for each in lengths)
    return Load(f"{count} requests at once", requests)


def single(prompt: int, new_tokens: int, seed: int) -> Load:
    """One request on an idle cluster."""
    return Load("one prompt", (Planned(0.0, _prompt(random.Random(seed), prompt), new_tokens),))


def _prompt(dice: random.Random, length: int) -> tuple[int, ...]:
    return tuple(dice.randint(LOWEST, HIGHEST) for _ in range(length))
