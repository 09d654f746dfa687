"""Placement: which decode worker holds a request's KV, which prefill worker fills it. Pure.

A policy is a function of these choices alone; the scheduler calls PLACE_DECODE and PLACE_PREFILL. A new
one is written here, with a test, and put in their place.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeChoice:
    """A decode worker that could take a request."""

    worker: str
    free_blocks: int
    running: int
    cached: float = 0.0  # the share of the prompt that is probably in its prefix cache


CACHE_HIT_WEIGHT = 4
"""A prompt that is cached whole is worth so many running requests."""


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """A prefill worker that could fill a request, with the tokens it has still to do."""

    worker: str
    waiting_tokens: int
    reaches: Collection[str]  # decode workers it can write to


def choose_decode(choices: Sequence[DecodeChoice], blocks: int) -> str | None:
    """The one with the fewest running requests among those with room; a cached prompt counts for up to
    CACHE_HIT_WEIGHT of them. Ties go to the most free blocks, then to the name, so that equal clusters
    place equally. None if no worker has room."""
    fitting = [each for each in choices if each.free_blocks >= blocks]
    if not fitting:
        return None
    return min(
        fitting, key=lambda c: (c.running - CACHE_HIT_WEIGHT * c.cached, -c.free_blocks, c.worker)
    ).worker


def choose_prefill(choices: Sequence[PrefillChoice], decode: str) -> str | None:
    """The one with the fewest tokens to compute among those that can write to this decode worker."""
    able = [each for each in choices if decode in each.reaches]
    if not able:
        return None
    return min(able, key=lambda c: (c.waiting_tokens, c.worker)).worker


def fills_remotely(tokens: int, *, colocated: bool, local_tokens: int) -> bool:
    """Should a prefill worker fill these tokens, or the decode worker itself, in chunks? A prompt of one
    token has nothing to fill; one of up to `local_tokens` is not worth a hand-over."""
    return not colocated and tokens > max(0, local_tokens)


DecodePolicy = Callable[[Sequence[DecodeChoice], int], str | None]
PrefillPolicy = Callable[[Sequence[PrefillChoice], str], str | None]

PLACE_DECODE: DecodePolicy = choose_decode
PLACE_PREFILL: PrefillPolicy = choose_prefill
