"""Router, a Node: dispatches each message to the part of the router that handles it.

requests.py     what happens to a request; its states are baton/lifecycle.py
scheduling.py   orders to workers; batching.py decides what is filled next, placement.py where
workers.py      which workers have joined and are alive
catalog.py      which adapters are offered, and which workers hold them
reach.py        which prefill worker can write to which decode worker now
roles.py        who fills a prompt; role_policy.py decides
readiness.py    whether requests can be served, and what is missing
reports.py      which of a worker's reports are believed
engines.py      requests for workers that ask another server
observers.py    what clients follow
"""

from dataclasses import dataclass, replace

from baton.clock import Clock
from baton.lifecycle import LIVE
from baton.text import Tokenizer
from baton.wire import messages as msg
from baton.wire.membership import BEAT_S
from baton.wire.messages import Message
from baton.wire.node import Effect, To
from router import news
from router.admission import Served
from router.batching import Rules
from router.catalog import Catalog
from router.cores import CoreKeeper
from router.ledger import Ledger
from router.observers import Observers, Watchers
from router.readiness import Readiness
from router.reports import Reports
from router.requests import Requests
from router.scheduling import Scheduler
from router.workers import Member, Way, WorkerRegistry, other_protocol


@dataclass(frozen=True, slots=True)
class Identity:
    """This router process."""

    epoch: str
    host: str
    pid: int
    cores: tuple[int, ...] = ()  # of the host, shared among its workers


class Router:
    """The node that tracks every request."""

    def __init__(
        self,
        identity: Identity,
        served: Served,
        tokenizer: Tokenizer,
        rules: Rules,
        clock: Clock,
        catalog: Catalog | None = None,
    ) -> None:
        """`catalog`: of adapters that may come and go; None: those of `served` stay."""
        self._observers = Observers(identity.epoch)
        self.ledger = Ledger(self._observers)
        self.workers = WorkerRegistry(model=served.fingerprint, host=identity.host)
        self.catalog = catalog or Catalog(served.limits.adapters, model=served.name)
        self._readiness = Readiness(self.workers, colocated=rules.colocated)
        fill_themselves = self._readiness.fill_themselves
        self._cores = CoreKeeper(identity.host, identity.cores)
        known = (self.ledger, self.workers, rules, fill_themselves)
        self._scheduler = Scheduler(*known, served.rope)
        self._requests = Requests(self.ledger, self._scheduler, served, tokenizer, clock)
        self.reports = Reports(self.ledger, served.limits.vocabulary)
        self._identity = identity
        self._served = served
        self._watchers = Watchers()
        self._next_beat = 0.0
        self._steps = 0

    # ---- the Node

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        match message:
            case msg.Submit():
                return self._requests.submit(sender, message, now)
            case msg.Abort(request):
                return self._requests.abort(sender, request, now)
            case msg.GetClusterInfo(fingerprint, changes):
                self._watchers.add(sender)  # step() answers
                ours = fingerprint == self._served.fingerprint
                return self.catalog.learn(changes, now) if ours else []
            case msg.LoadAdapter():
                return self.catalog.load(sender, message, now)
            case msg.UnloadAdapter():
                return self.catalog.unload(sender, message, now)
            case msg.Observe():
                self._observers.add(sender)
                return []
            case msg.Supervised(down):
                self._readiness.supervised(sender, down, now)
                return []
            case msg.Exited(peer):
                return self._peer_gone(peer, now, proven_dead=True)
            case msg.Unreachable(peer):
                return self._peer_gone(peer, now, proven_dead=False)
            case msg.Hello():
                return self._hello(sender, message, now)
            case msg.Malformed("Submit", request, why):
                return [To(sender, msg.Failed(request, "invalid_request", why))]
            case msg.Malformed("LoadAdapter" | "UnloadAdapter", request, why):
                return [To(sender, msg.AdapterChanged(request, "invalid_request", why))]
            case msg.Malformed(_, protocol, why):
                return [To(sender, msg.Refused(other_protocol(protocol, why)))]
        member = self.workers.get(sender)
        if member is None:
            self.reports.from_stranger(message)
            return [
                To(
                    sender,
                    msg.Reset("the router has no such worker or declared it lost: send Hello"),
                )
            ]
        self.workers.heard(sender, now)
        believed = self.reports.believed(member, message)
        return [effect for each in believed for effect in self._report(member, each, now)]

    def step(self, now: float) -> list[Effect]:
        self._steps += 1
        effects: list[Effect] = []
        for worker in self.workers.dead(now):
            effects += self._worker_gone(worker, now, proven_dead=False)
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            beat = msg.Heartbeat(self._identity.epoch, self._steps)
            effects += [To(member.worker, beat) for member in self.workers]
            effects += [To(each, beat) for each in self._readiness.supervisors]
            effects += self._scheduler.renew_leases()
        effects += self.workers.attach_again(now)
        effects += self._requests.fail_overdue(now, lambda: self.info(now).waiting_for)
        effects += self._adapters(now)
        effects += self._dismissals()
        effects += self._requests.refuse_unplaceable(now)
        orders = self._scheduler.place(now)
        effects += self._cores.hand_out(self.workers, self.ledger) + orders  # cores before work
        news = self.workers.take_news() | self._readiness.take_news()
        answers = self.catalog.take_answers()
        for each in answers:
            self._watchers.add(each.peer)  # it knows of the change before of its answer
        effects += self._watchers.updates(lambda: self.info(now), now, news=news)
        effects += answers
        return effects + self._observers.updates(self.ledger, self.workers, now)

    def due(self, now: float) -> float:
        parts = (self._scheduler, self._observers, self._watchers, self.workers, self._readiness)
        waits = [part.due(now) for part in (*parts, self.catalog, self.ledger.deadlines)]
        return max(0.0, min(self._next_beat - now, *waits))

    # ---- workers

    def _hello(self, sender: str, hello: msg.Hello, now: float) -> list[Effect]:
        rejection = self.workers.rejection(sender, hello) or self.catalog.rejection(hello)
        if rejection is not None:
            news.refused(sender, rejection)
            return [To(sender, msg.Refused(rejection))]
        identity = self._identity
        welcome = To(sender, msg.Welcome(identity.epoch, identity.host, identity.pid))
        known = self.workers.get(sender)
        if known is not None and known.hello.epoch == hello.epoch:
            return [welcome]  # Hello was sent again before our Welcome arrived
        # The same process has started anew: it writes under no old grant (another one is rejected).
        effects = self._worker_gone(sender, now, proven_dead=True) if known else []
        joined = self.workers.join(hello, now)
        self._scheduler.joined(hello)
        return [*effects, welcome, *joined, *self.catalog.joined(hello, now)]

    def _report(self, member: Member, message: Message, now: float) -> list[Effect]:
        """A member's report on itself, on its links to decode pools, or on a run."""
        sender = member.worker
        match message:
            case msg.Attached():
                return self.workers.attached(member, message, now)
            case msg.AttachFailed(worker, epoch, why):
                return self._way_lost(member, msg.WayLost(worker, epoch, why, ()), now)
            case msg.WayLost():
                return self._way_lost(member, message, now)
            case msg.FillRefused(run, why, True):
                entry = self.ledger.running(run)
                prefill = self.workers.get(entry.prefill) if entry and entry.prefill else None
                orders = self._requests.report(sender, message, now)
                if prefill is None or prefill.way(sender) is not Way.OPEN:
                    return orders
                lost = msg.WayLost(sender, member.hello.epoch, why, ())
                return orders + self._way_lost(prefill, lost, now)
            case msg.PoolStats():
                member.pool = message
            case msg.Heartbeat():
                member.told(message)
                self._observers.worked(member, message.work)
            case msg.AdaptersHeld():
                return self.catalog.report(sender, message, now)
            case msg.Leaving():
                self.workers.leaves(member)
                return self.catalog.left(sender, now)
            case msg.Paused(why, busy):
                self.workers.paused(member, why, busy=busy)
            case msg.Filled():
                orders = self._requests.report(sender, message, now)
                return self._cores.hand_out(self.workers, self.ledger) + orders  # cores before work
            case _:
                return self._requests.report(sender, message, now)
        return []

    def _way_lost(self, prefill: Member, report: msg.WayLost, now: float) -> list[Effect]:
        """What was on the way between these two goes elsewhere, or waits until it is attached again."""
        if not self.workers.current(report):
            return []
        on_it = (prefill.worker, report.worker, report.runs)
        self._scheduler.decide_again(prefill.worker, report.worker)
        orders = self._requests.way_lost(*on_it, report.why, now)
        moved = [e for e in orders if isinstance(e, To) and isinstance(e.message, msg.Cancel)]
        return orders + self.workers.way_lost(prefill, report, now, moved=len(moved))

    def _peer_gone(self, peer: str, now: float, *, proven_dead: bool) -> list[Effect]:
        """The peer's process is dead or cannot be reached. A worker that is alive after all gets Reset
        when it reports."""
        if self.workers.get(peer) is not None:
            return self._worker_gone(peer, now, proven_dead=proven_dead)
        effects = self.workers.remove(peer, proven_dead=proven_dead)
        self._readiness.forget(peer)
        self._watchers.remove(peer)
        self._observers.remove(peer)
        return effects + self._requests.client_gone(peer, now)

    def _worker_gone(self, worker: str, now: float, *, proven_dead: bool) -> list[Effect]:
        """The end of a worker that announced it is no loss."""
        member = self.workers.get(worker)
        expected = member is not None and member.leaving
        if not expected:
            self._observers.worker_lost(member)
        if member is not None:
            moved = len(self.ledger.on_worker(worker))
            news.left(worker, expected=expected, proven=proven_dead, moved=moved)
        removed = self.workers.remove(worker, proven_dead=proven_dead)
        self._scheduler.left(worker)
        orders = self._requests.worker_gone(worker, removed, now, expected=expected)
        return orders + self.catalog.left(worker, now)

    def _adapters(self, now: float) -> list[Effect]:
        """What the catalog has to say, before anything is placed."""
        effects: list[Effect] = []
        for digest, why in self.catalog.lost().items():
            effects += self._requests.adapter_lost(digest, why, now)
            effects += self.catalog.forget(digest, now)
        effects += self.catalog.step(now, self._adapters_in_use)
        if self.catalog.moved:
            self.catalog.moved = False
            for member in self.workers:
                self.workers.lacks(member, not self.catalog.ready(member.worker))
        if self.catalog.take_news():
            self._watchers.changed()
            limits = replace(self._served.limits, adapters=self.catalog.admitted)
            self._requests.served = replace(self._served, limits=limits)
        return effects

    def _adapters_in_use(self) -> set[str]:
        return {each.params.adapter for each in self.ledger.in_state(*LIVE)}

    def _dismissals(self) -> list[Effect]:
        """For the leaving workers on which nothing runs any more."""
        done = [m for m in self.workers.leaving if not self.ledger.loads.on_worker(m.worker)]
        return [effect for member in done for effect in self.workers.dismiss(member)]

    def info(self, now: float) -> msg.ClusterInfo:
        """The served model, the workers, and what is missing before requests can be served."""
        served, members = self._served, self.workers
        missing = self._readiness.missing(now)
        return msg.ClusterInfo(
            ready=not missing,
            model=served.name,
            fingerprint=served.fingerprint,
            context=served.limits.context,
            vocabulary=served.limits.vocabulary,
            dtype=next((member.hello.dtype for member in members), ""),
            sampling=served.sampling,
            workers=members.infos(now),
            waiting_for=missing,
            degraded="" if missing else self._readiness.degraded(now),
            router_pid=self._identity.pid,
            pool_tokens=members.largest_pool * members.block_size,
            adapters=self.catalog.offered,
            changes=self.catalog.changes,
            kv_dtype=next((m.hello.kv_dtype for m in members if m.hello.kv_dtype), ""),
        )
