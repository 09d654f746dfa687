"""Catalog: which adapters the cluster offers, and which workers hold them. Pure: reports in, orders out.

                 LoadAdapter                 every worker holds it
    (unknown) ---------------->  loading  ------------------------->  offered
        ^                           |                                    |  UnloadAdapter, or another
        |   a worker cannot, too    |                                    v  took its name
        |<-- late, none is left ----+                                 leaving
        +--------------- no request runs with it ------------------------+

Workers are told all three kinds (UseAdapters) and say what they hold (AdaptersHeld); what a load that
failed has left on some of them is dropped. Requests can name what is offered. A worker gets work while it
holds all that is offered or leaving, so nothing else in the router knows which worker has which adapter.

Every change has a version (baton/adapters/changes.py), which workers and clients are told. A router that
is started again learns the newest from them, before their requests come.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from baton.adapters.changes import NONE, Changes, Entry, digests
from baton.adapters.identity import Adapter, Adapters, no_engine, unlike
from baton.bounds import short
from baton.wire import messages as msg
from baton.wire.messages import AdapterChanged, Hello
from baton.wire.node import Effect, To

LOAD_S = 600.0
"""The longest a load may take on all workers: it is read from a disk or a network."""
LOOK_S = 1.0
"""Between two looks whether a leaving adapter is still needed."""
GRACE_S = 10.0
"""So long one is kept that was learnt from before: its requests come after it."""
DECODE = "decode"
REFUSED, UNKNOWN, NOT_READY = "invalid_request", "model_not_found", "not_ready"
CLOSED = (
    "adapters do not come and go here: start router and workers with --allow-lora-updates FOLDER"
)

InUse = Callable[[], Collection[str]]
"""Digests of the adapters of all live requests."""


@dataclass(slots=True)
class _Load:
    """A change that waits for all workers. `since`: the first order that has the adapter in it."""

    client: str
    asked: msg.LoadAdapter
    since: int
    ends_at: float

    @property
    def entry(self) -> Entry:
        return Entry(self.asked.adapter, self.asked.path)


@dataclass(slots=True)
class _Holder:
    """A worker, by its last report."""

    role: str
    number: int = 0
    held: frozenset[str] = frozenset()
    failed: dict[str, str] = field(default_factory=dict)

    def holds(self, needed: Collection[str]) -> bool:
        return self.held.issuperset(needed)


class Catalog:
    """The adapters of one cluster. Methods return the effects to carry out."""

    def __init__(
        self, own: Sequence[Adapter], *, model: str, updates: bool = False, most: int = 0
    ) -> None:
        """`own`: of the router's --lora options. `updates`: adapters may come and go; then at most
        `most` are offered at once."""
        self._own = tuple(own)
        self._model = model
        self._updates, self._most = updates, most
        self.changes = NONE
        self._number = 0  # of the last order
        self._loads: dict[str, _Load] = {}  # by name
        self._kept_until: dict[str, float] = {}  # leaving, by digest
        self._workers: dict[str, _Holder] = {}
        self._answers: list[To] = []
        self._news = False  # since take_news()
        self.moved = False  # ready() may have changed; the caller takes it back
        self._look_at = inf

    # ---- what there is

    @property
    def offered(self) -> Adapters:
        """Those that requests can name, sorted by name."""
        return tuple(each.adapter for each in self.changes.offered(self._own))

    @property
    def admitted(self) -> Adapters:
        """Those that a request may run with: a client may not know yet that one is leaving."""
        leaving = (each.adapter for each in self.changes.leaving)
        return tuple(sorted({*self.offered, *leaving}, key=lambda each: (each.name, each.digest)))

    def ready(self, worker: str) -> bool:
        """It holds what a request may need. True also for those that are not asked: engines."""
        holder = self._workers.get(worker)
        return holder is None or holder.holds(self._needed())

    def take_news(self) -> bool:
        """Whether `changes` is another one since the last call."""
        news, self._news = self._news, False
        return news

    def take_answers(self) -> list[To]:
        """To clients, to be sent after the news."""
        answers, self._answers = self._answers, []
        return answers

    # ---- workers

    def rejection(self, hello: Hello) -> str | None:
        """Why this worker cannot join; None if it can."""
        if hello.role not in (DECODE, "prefill"):
            return no_engine(self._own) if self._own else None
        return unlike(hello.adapters, self._own) or None

    def joined(self, hello: Hello, now: float) -> list[Effect]:
        """It has said Hello, for the first time or anew."""
        if hello.role not in (DECODE, "prefill"):
            return self._settle(now)
        effects = self.learn(hello.changes, now)
        fresh = hello.changes == NONE  # it has never held others than its own
        held = frozenset(each.digest for each in hello.adapters) if fresh else frozenset()
        self._workers[hello.worker] = holder = _Holder(hello.role, held=held)
        wanted, self.moved = self._wanted(), True
        if self.changes.version or digests(wanted) != holder.held:
            effects.append(To(hello.worker, self._order(wanted)))
        return effects + self._settle(now)

    def left(self, worker: str, now: float) -> list[Effect]:
        """It is gone, or takes nothing new."""
        return self._settle(now) if self._workers.pop(worker, None) else []

    def report(self, worker: str, said: msg.AdaptersHeld, now: float) -> list[Effect]:
        """What a worker holds now, and what it cannot."""
        if (holder := self._workers.get(worker)) is None:
            return []
        holder.number, holder.held, self.moved = said.number, frozenset(said.held), True
        holder.failed = {each.digest: each.why for each in said.failed}
        effects = self._settle(now)
        if said.number < self._number:
            return effects  # it will report again
        offered = {each.digest: each for each in self.offered}
        for digest, why in holder.failed.items():
            if adapter := offered.get(digest):
                effects.append(To(worker, msg.Refused(_lacking(adapter, why))))
        return effects

    def lost(self) -> dict[str, str]:
        """Leaving adapters that no decode worker holds or can load again, by digest, and why: their
        requests have to end. While one holds it they go on, and who cannot load it waits for the end of
        them."""
        if not self.changes.leaving:
            return {}
        decoders = [each for each in self._workers.values() if each.role == DECODE]
        found = dict[str, str]()
        for digest in digests(self.changes.leaving):
            if decoders and all(
                digest in each.failed and digest not in each.held for each in decoders
            ):
                why = short(decoders[0].failed[digest])
                found[digest] = f"its adapter was unloaded, and no worker can load it again: {why}"
        return found

    def forget(self, digest: str, now: float) -> list[Effect]:
        """Nothing runs with this leaving adapter any more."""
        before = self.changes
        stays = (each for each in before.leaving if each.adapter.digest != digest)
        self.changes = replace(before, leaving=tuple(stays))
        return self._commit(before, now)

    def learn(self, changes: Changes, now: float) -> list[Effect]:
        """What an earlier router has told its workers and clients."""
        if not self._updates or changes.version <= self.changes.version:
            return []
        before = self.changes
        self.changes = changes
        for each in changes.leaving:
            self._kept_until.setdefault(each.adapter.digest, now + GRACE_S)
        return self._changed(before, now)

    # ---- clients

    def load(self, client: str, asked: msg.LoadAdapter, now: float) -> list[Effect]:
        """Begin to load; answered when all workers hold it, or one cannot."""
        if why := self._refusal(asked):
            return self._answer(client, asked.request, REFUSED, why)
        load = _Load(client, asked, self._number + 1, now + LOAD_S)
        self._loads[asked.adapter.name] = load
        return self._tell() + self._settle(now)

    def unload(self, client: str, asked: msg.UnloadAdapter, now: float) -> list[Effect]:
        """Offer it no more; answered at once."""
        if not self._updates:
            return self._answer(client, asked.request, REFUSED, CLOSED)
        if all(each.name != asked.name for each in self.offered):
            loading = "; it is being loaded" if asked.name in self._loads else ""
            why = f"there is no adapter {asked.name[:80]!r} here{loading}"
            return self._answer(client, asked.request, UNKNOWN, why)
        before = self.changes
        self._remove(asked.name)
        return self._answer(client, asked.request) + self._commit(before, now)

    def _refusal(self, asked: msg.LoadAdapter) -> str:
        name, taken = asked.adapter.name, {each.name for each in self.offered}
        if not self._updates:
            return CLOSED
        if name == self._model:
            return f"{name[:80]!r} is the model's own name: give the adapter another one"
        if name in self._loads:
            return f"an adapter {name[:80]!r} is being loaded: wait for it"
        if name in taken and not asked.replace:
            return (
                f"an adapter {name[:80]!r} is loaded: unload it first, or load this one in its place "
                "(load_inplace)"
            )
        if name not in taken and len(taken | self._loads.keys()) >= self._most:
            return f"there are {self._most:,} adapters, the limit of --max-loras: unload one first"
        if len(self.changes.leaving) >= self._most:
            return (
                f"requests still run with {self._most:,} adapters that were unloaded or replaced, the "
                "limit of --max-loras: wait for them"
            )
        return ""

    # ---- time

    def step(self, now: float, in_use: InUse) -> list[Effect]:
        """Give up loads that take too long, and what is leaving when no request runs with it."""
        effects: list[Effect] = []
        for load in list(self._loads.values()):
            if now >= load.ends_at:
                waits = [w for w, each in self._workers.items() if not _has(each, load)]
                why = f"{', '.join(waits[:5])} did not load it within {LOAD_S:g} s"
                effects += self._abort(load, NOT_READY, why)
        if now < self._look_at:
            return effects
        used, before = in_use(), self.changes
        stays = tuple(
            each
            for each in before.leaving
            if each.adapter.digest in used or now < self._kept_until.get(each.adapter.digest, 0.0)
        )
        if stays == before.leaving:
            self._look_at = now + LOOK_S if stays else inf
            return effects
        self.changes = replace(before, leaving=stays)
        return effects + self._commit(before, now)

    def due(self, now: float) -> float:
        """Seconds until step() has something to do."""
        ends = (each.ends_at for each in self._loads.values())
        return min(self._look_at, min(ends, default=inf)) - now

    # ---- inside

    def _needed(self) -> frozenset[str]:
        """Digests of what a request may run with."""
        return digests((*self.changes.offered(self._own), *self.changes.leaving))

    def _wanted(self) -> tuple[Entry, ...]:
        """What workers shall hold."""
        loading = (each.entry for each in self._loads.values())
        return (*self.changes.offered(self._own), *self.changes.leaving, *loading)

    def _order(self, wanted: Iterable[Entry]) -> msg.UseAdapters:
        by_digest = {each.adapter.digest: each for each in reversed([*wanted])}
        entries = sorted(by_digest.values(), key=lambda each: each.adapter.name)
        return msg.UseAdapters(self._number, tuple(entries), self.changes)

    def _tell(self) -> list[Effect]:
        """A new order for all workers. One for each change: a worker that failed at an adapter tries
        again only if it was told in between to do without."""
        self._number += 1
        order = self._order(self._wanted())
        return [To(worker, order) for worker in self._workers]

    def _settle(self, now: float) -> list[Effect]:
        """End the loads that all workers have carried out, or one cannot."""
        effects: list[Effect] = []
        for load in list(self._loads.values()):
            digest, holders = load.asked.adapter.digest, self._workers.items()
            failed = [(w, h.failed[digest]) for w, h in holders if _tried(h, load, digest)]
            if failed:
                effects += self._abort(load, REFUSED, f"{failed[0][0]}: {short(failed[0][1])}")
            elif all(each.role != DECODE for each in self._workers.values()):
                effects += self._abort(load, NOT_READY, "no decode worker is there to load it")
            elif all(_has(each, load) for each in self._workers.values()):
                effects += self._finish(load, now)
        return effects

    def _abort(self, load: _Load, code: str, why: str) -> list[Effect]:
        """Nothing is half loaded: workers drop it, unless it is offered or leaving under another name."""
        name = load.asked.adapter.name
        del self._loads[name]
        why = f"the adapter {name[:80]!r} is not loaded: {why}"
        return self._answer(load.client, load.asked.request, code, why) + self._tell()

    def _finish(self, load: _Load, now: float) -> list[Effect]:
        entry, before = load.entry, self.changes
        if not load.asked.replace and any(e.name == entry.adapter.name for e in self.offered):
            return self._abort(load, REFUSED, "another one has got this name meanwhile")
        del self._loads[entry.adapter.name]
        self._remove(entry.adapter.name)
        loaded = sorted((*self.changes.loaded, entry), key=lambda each: each.adapter.name)
        self.changes = replace(self.changes, loaded=tuple(loaded))
        return self._answer(load.client, load.asked.request) + self._commit(before, now)

    def _remove(self, name: str) -> None:
        changes = self.changes
        own = (each for each in self._own if each.name == name)
        self.changes = replace(
            changes,
            loaded=tuple(each for each in changes.loaded if each.adapter.name != name),
            removed=tuple(sorted({*changes.removed, *own}, key=lambda each: each.name)),
        )

    def _commit(self, before: Changes, now: float) -> list[Effect]:
        self.changes = replace(self.changes, version=before.version + 1)
        return self._changed(before, now)

    def _changed(self, before: Changes, now: float) -> list[Effect]:
        """What was offered and is not any more is leaving until no request runs with it."""
        offered = digests(self.changes.offered(self._own))
        entries = (*before.offered(self._own), *self.changes.leaving)
        leaving = {e.adapter.digest: e for e in entries if e.adapter.digest not in offered}
        self.changes = replace(self.changes, leaving=tuple(leaving.values()))
        self._kept_until = {d: at for d, at in self._kept_until.items() if d in leaving}
        self._look_at = now if leaving else inf
        self._news = self.moved = True
        return self._tell()

    def _answer(self, client: str, request: str, code: str = "", why: str = "") -> list[Effect]:
        self._answers.append(To(client, AdapterChanged(request, code, why)))
        return []


def _has(holder: _Holder, load: _Load) -> bool:
    return holder.number >= load.since and load.asked.adapter.digest in holder.held


def _tried(holder: _Holder, load: _Load, digest: str) -> bool:
    return holder.number >= load.since and digest in holder.failed


def _lacking(adapter: Adapter, why: str) -> str:
    return (
        f"the cluster offers adapter {adapter.name[:80]!r}, which this worker cannot load: {short(why)}; "
        "put its folder back, or unload it (/v1/unload_lora_adapter)"
    )
