"""Totals: what only grows, over all routers and workers of this server's life.

A router's totals begin at 0 when it starts, a worker's when its process does. Prometheus takes a counter
that falls for a restart of the server, and rates are wrong then. So each one's last totals are kept here,
and those of its successor are added.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from baton.wire.records import Counts, Decided, Work, WorkerWork

REMEMBERED = 16_384
"""Workers; a cluster has half as many at most. Those that have been gone for longest are added up."""


class Totals:
    """What the routers have counted."""

    def __init__(self) -> None:
        self._before: Counts | None = None  # of the routers that are gone
        self._last: Counts | None = None  # of the present one
        self._works: OrderedDict[str, WorkerWork] = OrderedDict()
        self._gone: dict[str, Work] = {}  # by role

    def add(self, counts: Counts) -> Counts:
        """A router's counts, with its totals from the start of this server. Their order is that in which
        the router sent them."""
        last = self._last
        if last is not None and last.router != counts.router:
            self._before = last if self._before is None else _more(last, self._before)
        self._last = counts
        for each in counts.works:
            self._worked(each)
        return counts if self._before is None else _more(counts, self._before)

    def work(self, role: str) -> Work:
        """What all workers of the role have computed."""
        found = self._gone.get(role, Work())
        for each in self._works.values():
            if each.role == role:
                found = _sum(found, each.work)
        return found

    @property
    def roles(self) -> set[str]:
        """Those of all workers that have reported."""
        return {*self._gone, *(each.role for each in self._works.values())}

    def _worked(self, new: WorkerWork) -> None:
        """A worker's name belongs to one process, whichever router it reports to."""
        known = self._works.get(new.worker)
        if known is not None:
            new = replace(known, work=_most(known.work, new.work))
        self._works[new.worker] = new
        self._works.move_to_end(new.worker)
        if len(self._works) > REMEMBERED:
            _, oldest = self._works.popitem(last=False)
            self._gone[oldest.role] = _sum(self._gone.get(oldest.role, Work()), oldest.work)


def _more(counts: Counts, before: Counts) -> Counts:
    """`counts`, its totals increased by those of `before`."""
    return replace(
        counts,
        generated_tokens=counts.generated_tokens + before.generated_tokens,
        preemptions=counts.preemptions + before.preemptions,
        refills=counts.refills + before.refills,
        lost_prefill=counts.lost_prefill + before.lost_prefill,
        lost_decode=counts.lost_decode + before.lost_decode,
        late_reports=counts.late_reports + before.late_reports,
        itl=added(counts.itl, before.itl),
        itl_s=counts.itl_s + before.itl_s,
        decided=_decided(counts.decided, before.decided),
    )


def _decided(one: Sequence[Decided], other: Sequence[Decided]) -> tuple[Decided, ...]:
    sums: Counter[tuple[str, str]] = Counter()
    for each in (*one, *other):
        sums[each.role, each.cause] += each.requests
    return tuple(Decided(*each, number) for each, number in sums.items())


def added(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """Sums of equal places; what is missing is 0."""
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))


def _sum(one: Work, other: Work) -> Work:
    return Work(
        added(one.forwards, other.forwards),
        one.tokens + other.tokens,
        one.drafts + other.drafts,
        one.draft_tokens + other.draft_tokens,
        added(one.accepted, other.accepted),
    )


def _most(one: Work, other: Work) -> Work:
    """Totals are a worker's word: they do not fall."""

    def greater(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(pair) for pair in zip_longest(a, b, fillvalue=0))

    return Work(
        greater(one.forwards, other.forwards),
        max(one.tokens, other.tokens),
        max(one.drafts, other.drafts),
        max(one.draft_tokens, other.draft_tokens),
        greater(one.accepted, other.accepted),
    )
