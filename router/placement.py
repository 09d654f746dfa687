"""Placement: which decode worker holds a request's KV, which prefill worker fills it. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeChoice:
    """A decode worker that could take a request."""

    worker: str
    free_blocks: int
    running: int
    cached: float = 0.0  # the part of the prompt that is probably there already


WORTH = 4
"""A prompt that is there whole outweighs so many requests more that run there."""


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """A prefill worker that could fill a request, with the tokens it has still to do."""

    worker: str
    waiting_tokens: int
    reaches: Collection[str]  # decode workers it can write to


def choose_decode(choices: Sequence[DecodeChoice], blocks: int) -> str | None:
    """The one with the fewest requests running among those with room, where what is cached counts for
    up to WORTH of them; ties go to the most free blocks, then to the name, so that equal clusters
    place equally. None if nobody has room."""
    fitting = [each for each in choices if each.free_blocks >= blocks]
    if not fitting:
        return None
    return min(
        fitting, key=lambda c: (c.running - WORTH * c.cached, -c.free_blocks, c.worker)
    ).worker


def choose_prefill(choices: Sequence[PrefillChoice], decode: str) -> str | None:
    """The one with the least left to do among those that can write to this decode worker."""
    able = [each for each in choices if decode in each.reaches]
    if not able:
        return None
    return min(able, key=lambda c: (c.waiting_tokens, c.worker)).worker


def fills_remotely(tokens: int, *, colocated: bool, local_tokens: int) -> bool:
    """Does a prefill worker fill these tokens, or does decode do it itself, in chunks? A prompt of
    one token has nothing to fill; one of up to `local_tokens` is not worth the way."""
    return not colocated and tokens > max(0, local_tokens)
