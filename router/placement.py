"""Placement: which decode worker holds a request's KV, which prefill worker fills it. Pure.

A policy is a function of the choices below. The scheduler calls PLACE_DECODE and PLACE_PREFILL. To add a
policy, write it here, with a test, and assign it to one of them at the end of this file.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeChoice:
    """A decode worker that could take a request."""

    worker: str
    free_blocks: int
    running: int
    cached: float = 0.0  # share of the prompt that is probably in its prefix cache, 0 to 1


CACHE_HIT_WEIGHT = 4
"""A fully cached prompt outweighs so many running requests."""


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """A prefill worker that could fill a request."""

    worker: str
    waiting_tokens: int  # still to be computed there
    reaches: Collection[str]  # decode workers it can write to
    saved: int = 0  # tokens of the prompt whose KV it probably keeps


def choose_decode(choices: Sequence[DecodeChoice], blocks: int) -> str | None:
    """The worker with the fewest running requests among those with `blocks` free; a cached prompt offsets
    up to CACHE_HIT_WEIGHT of them. Ties go to the most free blocks, then to the first name, so placement
    is deterministic. None if no worker has room."""
    fitting = [each for each in choices if each.free_blocks >= blocks]
    if not fitting:
        return None
    return min(
        fitting, key=lambda c: (c.running - CACHE_HIT_WEIGHT * c.cached, -c.free_blocks, c.worker)
    ).worker


def choose_prefill(choices: Sequence[PrefillChoice], decode: str) -> str | None:
    """The worker that has computed the prompt first, by tokens, among those that can write to this decode
    worker."""
    able = [each for each in choices if decode in each.reaches]
    if not able:
        return None
    return min(able, key=lambda c: (c.waiting_tokens - c.saved, c.worker)).worker


DecodePolicy = Callable[[Sequence[DecodeChoice], int], str | None]
PrefillPolicy = Callable[[Sequence[PrefillChoice], str], str | None]

PLACE_DECODE: DecodePolicy = choose_decode
PLACE_PREFILL: PrefillPolicy = choose_prefill
