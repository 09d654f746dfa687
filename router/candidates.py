"""The few workers among which a placement policy chooses. Pure.

The policies (placement.py) are defined over all workers that are able to take a request. They are given
those that can be chosen: the least loaded one with room and, for decode, every one that may have the
prompt's beginning cached. Workers are in order of their load (loads.py), so the first that will do is the
least loaded. tests/pure/slow_loads.py compares each choice with the policy's choice among all.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from router.loads import Loads, Rank, Ranking
from router.placement import DecodeChoice, PrefillChoice
from router.workers import Member

NOTHING: Mapping[str, int] = MappingProxyType({})
Able = Callable[[str], Member | None]
"""The worker of this name if it may be given the request, whatever its load."""


def decode_choices(
    loads: Loads, able: Able, *, blocks: int, cached: Mapping[str, float]
) -> list[DecodeChoice]:
    """Decode workers with so many blocks free. `cached`: shares of the prompt that are probably in their
    prefix caches, 0 to 1; 0 for all others."""

    def fits(rank: Rank | None) -> bool:
        return rank is not None and -rank[1] >= blocks and able(rank[2]) is not None

    least = next((rank for rank in loads.decodes if fits(rank)), None)
    found = {} if least is None else {least[2]: least}
    for worker in cached:
        rank = loads.decodes.of(worker)
        if rank is not None and fits(rank):
            found[worker] = rank
    return [
        DecodeChoice(worker, -minus_free, running, cached.get(worker, 0.0))
        for running, minus_free, worker in found.values()
    ]


def prefill_choices(
    prefills: Ranking, able: Able, saved: Mapping[str, int] = NOTHING
) -> list[PrefillChoice]:
    """The least loaded prefill worker that is able, and those able ones that need not compute so many
    tokens of the prompt (`saved`); an empty list if none is able."""
    found: list[PrefillChoice] = []
    least = next((rank for rank in prefills if able(rank[2]) is not None), None)
    ranks = [] if least is None else [least, *filter(None, map(prefills.of, saved))]
    for tokens, _, worker in dict.fromkeys(ranks):
        if (member := able(worker)) is not None:
            reaches = member.attached.keys()
            found.append(PrefillChoice(worker, tokens, reaches, saved.get(worker, 0)))
    return found
