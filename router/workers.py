"""WorkerRegistry: the workers that have joined, which prefill can write to which decode, and liveness.

The loop notices at once when a process on the router's own host dies (Exited). Heartbeats find what
cannot be watched: workers on other hosts, stalled and wedged processes. router/readiness.py says what is
missing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from baton.kv.transports import shuts_out
from baton.pace import Pace, bounded
from baton.wire import messages as msg
from baton.wire.membership import BEAT_S
from baton.wire.messages import PROTOCOL, Attached, Hello, WayLost
from baton.wire.node import Effect, To, Watch
from baton.wire.records import Speed, WorkerInfo
from router import news
from router.ways import Ways

PREFILL, DECODE, ENGINE = "prefill", "decode", "engine"
MAX_PATIENCE_S = 86_400.0
MISSED_BEATS = 3
SILENT_S = MISSED_BEATS * BEAT_S
SEVERAL = 1.5
"""So many requests in a forward, on average, show how much longer one more makes it."""
MAX_WORKERS = 1024


class Way(StrEnum):
    """From a prefill worker to a decode worker."""

    OPEN = "open"
    DOWN = "down"  # it failed, and is known to
    NEW = "new"  # the prefill worker was asked to attach and has not answered


class Health(StrEnum):
    """Verdict on a worker by the age of its last message."""

    ALIVE = "alive"
    SUSPECT = "suspect"  # silent for too long: gets no new requests
    DEAD = "dead"  # silent for longer than its longest step: its requests are moved


@dataclass(slots=True)
class Member:
    """A worker that has joined."""

    hello: Hello
    last_heard: float
    attached: dict[str, Attached] = field(default_factory=dict)  # prefill: by decode worker
    failed: dict[str, str] = field(default_factory=dict)  # prefill: why, by decode worker
    links: tuple[str, ...] | None = None  # prefill: `attached` in words; None: not put yet
    writers: frozenset[tuple[str, str]] = frozenset()  # decode: prefill workers attached, epochs
    speeds: tuple[Speed, ...] = ()  # its last report
    idle: tuple[Speed, ...] = ()  # the same, with one request and nothing else
    slower: float = 0.0  # by what part of that a request more makes a forward longer
    handovers: dict[str, float] = field(default_factory=dict)  # prefill: s a token
    pool: msg.PoolStats | None = None  # decode: its last report
    full_until: float = 0.0  # decode: it deferred a run, retry at this time
    leaving: bool = False  # it gets no new work
    paused: str = ""  # engine: why it takes no new work for now
    out_of_order: str = ""  # the same, unless it is only busy
    dismissed: bool = False
    lacking: bool = False  # an adapter that a request may need (router/catalog.py)

    @property
    def worker(self) -> str:
        return self.hello.worker

    def told(self, beat: msg.Heartbeat) -> None:
        """A heartbeat names its speeds, the present one first."""
        if not beat.speeds:
            return
        now = beat.speeds[0]
        self.speeds, self.idle = beat.speeds, beat.idle or (now,)
        if beat.requests >= SEVERAL:  # else it says nothing about more
            more = now.forward_s / paced(self.idle, now.cores).forward_s - 1
            self.slower = max(0.0, more) / (beat.requests - 1)

    def pace(self, cores: int) -> Pace:
        """With so many cores (0: unknown), by what it has told; it must have told something."""
        return paced(self.speeds, cores)

    def pace_of(self, streams: int, cores: int) -> Pace:
        """The same of a decode worker with so many streams: it had others when it told."""
        forward_s = self.pace_idle(cores).forward_s * (1 + self.slower * max(0, streams - 1))
        return Pace(bounded(forward_s), self.pace(cores).token_s)

    def pace_idle(self, cores: int) -> Pace:
        """The same with one request and nothing else."""
        return paced(self.idle, cores)

    def accepts(self, now: float) -> bool:
        """It can be given work."""
        free = not self.leaving and not self.paused and not self.lacking
        return free and now - self.last_heard < SILENT_S

    def way(self, decode: str) -> Way:
        """From this prefill worker, as far as is known."""
        if decode in self.attached:
            return Way.OPEN
        return Way.DOWN if decode in self.failed else Way.NEW

    @property
    def dead_at(self) -> float:
        """When it counts as dead, if nothing is heard until then."""
        return self.last_heard + SILENT_S + self.hello.patience_s

    def verdict_at(self, now: float) -> float:
        """When its health changes next, if nothing is heard until then. A dead one's stays."""
        suspect_at = self.last_heard + SILENT_S
        return suspect_at if now < suspect_at else self.dead_at if now < self.dead_at else inf

    def health(self, now: float) -> Health:
        """A worker sends heartbeats from its step loop, so a wedged process falls silent though its
        sockets still answer. It may be silent for as long as its longest step takes."""
        if now - self.last_heard < SILENT_S:
            return Health.ALIVE
        return Health.DEAD if now >= self.dead_at else Health.SUSPECT


def paced(speeds: tuple[Speed, ...], cores: int) -> Pace:
    """By the speed on so many cores (0: unknown), or a guess from the nearest. `speeds`: one or more."""
    near = min(speeds, key=lambda each: abs(each.cores - cores))
    pace = Pace(bounded(near.forward_s), bounded(near.token_s))
    known = not cores or not near.cores or near.cores == cores
    return pace if known else pace.on_cores(cores / near.cores)


class WorkerRegistry:
    """The workers of one cluster. All of one model, dtype and KV layout."""

    def __init__(self, *, model: str, host: str) -> None:
        self._model = model
        self._host = host
        self._members: dict[str, Member] = {}
        self.ways = Ways()  # that are down
        self._silent: dict[str, Hello] = {}  # workers given up whose process may still run
        self._by_role: dict[str, tuple[Member, ...]] = {}
        self._leaving: dict[str, Member] = {}  # not dismissed yet
        self._none_silent_before = inf  # no member turns suspect or dead by silence before
        self._news = True  # since take_news()
        self.hellos: tuple[Hello, ...] = ()  # of all members; replaced when one comes or goes
        self.largest_pool = 0  # blocks
        self.block_size = 1  # tokens, of all members
        self.decode_since: float | None = None  # when the first decode worker joined
        self.filled_once = False  # a prefill worker could write to a decode worker at some time

    def get(self, worker: str) -> Member | None:
        return self._members.get(worker)

    def of(self, role: str) -> tuple[Member, ...]:
        """Members of a role, sorted by name, so that placement is deterministic."""
        return self._by_role.get(role, ())

    def _came_or_went(self) -> None:
        """What is derived from the members, anew."""
        members = [self._members[name] for name in sorted(self._members)]
        for role in (PREFILL, DECODE, ENGINE):
            self._by_role[role] = tuple(m for m in members if m.hello.role == role)
        self.hellos = tuple(m.hello for m in members)
        self.largest_pool = max((m.hello.blocks for m in self.of(DECODE)), default=0)
        self.block_size = next((m.hello.block_size for m in members), 1)
        self._news = True

    def take_news(self) -> bool:
        """Whether infos() may have changed since the last call, by more than time."""
        news, self._news = self._news, False
        return news

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def rejection(self, sender: str, hello: Hello) -> str | None:
        """Why this worker cannot join, naming both values; None if it can."""
        if hello.worker != sender:
            return f"the worker's socket is {sender!r}, but its Hello names {hello.worker!r}"
        if hello.protocol != PROTOCOL:
            return other_protocol(str(hello.protocol))
        if hello.role not in (PREFILL, DECODE, ENGINE):
            return f"the role must be {PREFILL}, {DECODE} or {ENGINE}, got {hello.role!r}"
        sizes = (hello.block_size, hello.block_bytes, *((hello.blocks,) * (hello.role != PREFILL)))
        if min(sizes) < 1 or not 0 <= hello.patience_s < MAX_PATIENCE_S:
            return (
                f"block size {hello.block_size}, {hello.block_bytes} bytes a block, {hello.blocks} "
                f"blocks and a patience of {hello.patience_s:g} s cannot be"
            )
        if hello.model != self._model:
            return f"the worker serves model {hello.model[:12]}, the router {self._model[:12]}"
        if (owner := self._owner(hello)) is not None:
            return (
                f"the name {hello.worker} belongs to process {owner.pid} on host {owner.host[:12]}, "
                "which may still run and write: end it, or use another name"
            )
        if len(self._members) >= MAX_WORKERS and hello.worker not in self._members:
            return f"the cluster has {MAX_WORKERS:,} workers, which is the limit"
        other = next((m for m in self if m.worker != hello.worker), None)
        if other is not None and ENGINE in (hello.role, other.hello.role):
            return mixture(hello, other.hello)
        if other is not None and other.hello.layout != hello.layout:
            return (
                f"the worker's KV layout is {hello.layout} ({_kv(hello)}), {other.worker}'s is "
                f"{other.hello.layout} ({_kv(other.hello)}); start both with the same --dtype, "
                "--kv-cache-dtype and --block-size"
            )
        return None

    def _owner(self, hello: Hello) -> Hello | None:
        """Another process with this worker's name that is not proven dead."""
        known = self._members.get(hello.worker)
        owner = known.hello if known is not None else self._silent.get(hello.worker)
        if owner is None or (owner.host, owner.pid) == (hello.host, hello.pid):
            return None
        return owner

    def join(self, hello: Hello, now: float) -> list[Effect]:
        """Add the worker and introduce it: every prefill worker attaches to every decode pool."""
        self._silent.pop(hello.worker, None)
        self._members[hello.worker] = Member(hello, now)
        self._none_silent_before = min(self._none_silent_before, now + SILENT_S)
        self._came_or_went()
        self.ways.forget(hello.worker)
        news.joined(hello)
        if hello.role == DECODE and self.decode_since is None:
            self.decode_since = now
        effects: list[Effect] = []
        if hello.host == self._host:
            effects.append(Watch(hello.worker, hello.pid))
        if hello.role == ENGINE:
            return effects
        if hello.role == DECODE:
            return effects + [To(m.worker, _attach(hello)) for m in self.of(PREFILL)]
        # A writer that sends Hello has stopped all earlier writes: its quarantined blocks are free.
        effects += [To(m.worker, msg.WriterClear(hello.worker)) for m in self.of(DECODE)]
        return effects + [To(hello.worker, _attach(m.hello)) for m in self.of(DECODE)]

    def attached(self, prefill: Member, report: Attached, now: float) -> list[Effect]:
        """A prefill worker can write to this decode worker: introduce it there."""
        if not self.current(report):
            return []
        back = self.ways.opened(prefill.worker, report.worker, now)
        news.attached(prefill.worker, report, back=back)
        prefill.attached[report.worker] = report
        prefill.links = None
        self.filled_once = self._news = True
        prefill.failed.pop(report.worker, None)
        hello = prefill.hello
        decode = self._members[report.worker]
        decode.writers |= {(hello.worker, hello.epoch)}
        joined = msg.WriterJoined(hello.worker, hello.host, hello.pid, report.transport)
        return [To(report.worker, joined)]

    def way_lost(self, prefill: Member, report: WayLost, now: float, *, moved: int) -> list[Effect]:
        """A prefill worker cannot write to this decode worker, which is current(), for now. `moved`: how
        many fills it had. What it has written is shut out, if its transport can do that."""
        known = prefill.way(report.worker) is Way.DOWN
        if (was := prefill.attached.pop(report.worker, None)) is not None:
            self._members[report.worker].writers -= {(prefill.worker, prefill.hello.epoch)}
        prefill.failed[report.worker] = report.why
        prefill.links, self._news = None, True
        again_s = self.ways.failed(prefill.worker, report.worker, now)
        if not known or moved:
            news.way_lost(prefill.worker, report.worker, report.why, moved=moved, again_s=again_s)
        return _shut_out(prefill.worker, [was] if was is not None else [])

    def current(self, report: Attached | WayLost) -> bool:
        """It is about a decode worker that is here, and its present pool."""
        decode = self._members.get(report.worker)
        if decode is None or decode.dismissed:
            return False
        return (decode.hello.role, decode.hello.epoch) == (DECODE, report.epoch)

    def attach_again(self, now: float) -> list[Effect]:
        """Prefill workers try again where they failed."""
        effects: list[Effect] = []
        for prefill, decode in self.ways.to_try(now):
            there = self._members.get(decode)
            if prefill in self._members and there is not None:
                effects.append(To(prefill, _attach(there.hello)))
        return effects

    def remove(self, worker: str, *, proven_dead: bool) -> list[Effect]:
        """Remove a worker and inform its peers. A prefill worker that is only silent may still write: its
        blocks stay in quarantine until it sends Hello or is proven dead, unless it can be shut out."""
        member = self._members.pop(worker, None)
        self.ways.forget(worker)
        if member is None:
            silent = self._silent.pop(worker, None) if proven_dead else None
            if silent is None or silent.role == DECODE:
                return []
            return self._to(DECODE, msg.WriterClear(worker))  # given up earlier, now proven dead
        self._leaving.pop(worker, None)
        self._came_or_went()
        if not proven_dead:
            self._silent[worker] = member.hello
        for decode in map(self._members.get, member.attached):
            if decode is not None:
                decode.writers -= {(worker, member.hello.epoch)}
        if member.hello.role == DECODE:
            return self._detach(member)
        if not proven_dead:
            return _shut_out(worker, member.attached.values())
        return self._to(DECODE, msg.WriterClear(worker))

    def leaves(self, member: Member) -> None:
        """It gets no new work."""
        member.leaving = self._news = True
        if not member.dismissed:
            self._leaving[member.worker] = member

    def lacks(self, member: Member, lacking: bool) -> None:
        """An adapter that a request may need: it gets no new work until it holds it."""
        self._news |= member.lacking is not lacking
        member.lacking = lacking

    def paused(self, member: Member, why: str, *, busy: bool) -> None:
        """An engine takes nothing new for now; with an empty `why` it does again."""
        self._news = True
        member.paused, member.out_of_order = why, "" if busy else why

    @property
    def leaving(self) -> tuple[Member, ...]:
        """Members that leave and are not dismissed yet."""
        return tuple(self._leaving.values())

    def dismiss(self, member: Member) -> list[Effect]:
        """Nothing runs on this leaving worker: it may end."""
        member.dismissed = True
        self._leaving.pop(member.worker, None)
        detach = self._detach(member) if member.hello.role == DECODE else []
        return [*detach, To(member.worker, msg.Dismissed())]

    def _detach(self, decode: Member) -> list[Effect]:
        self.ways.forget(decode.worker)
        self._news, decode.writers = True, frozenset()
        for prefill in self.of(PREFILL):
            prefill.links = None
            prefill.attached.pop(decode.worker, None)
            prefill.failed.pop(decode.worker, None)
            prefill.handovers.pop(decode.worker, None)
        return self._to(PREFILL, msg.Detach(decode.worker, decode.hello.epoch))

    def _to(self, role: str, message: msg.Message) -> list[Effect]:
        return [To(member.worker, message) for member in self.of(role)]

    def heard(self, worker: str, now: float) -> None:
        """Any message proves that the worker is alive."""
        if member := self._members.get(worker):
            if now - member.last_heard >= SILENT_S:  # suspect: its next verdict comes earlier now
                self._none_silent_before = min(self._none_silent_before, now + SILENT_S)
            member.last_heard = now

    def alive(self, role: str, now: float) -> list[Member]:
        """Members of a role that accept work."""
        return [m for m in self.of(role) if m.accepts(now)]

    def dead(self, now: float) -> list[str]:
        """Workers that were silent for too long."""
        if now < self._none_silent_before:
            return []
        verdicts = (m.verdict_at(now) for m in self._members.values())
        self._none_silent_before = min(verdicts, default=inf)
        return [m.worker for m in self if m.health(now) is Health.DEAD]

    def due(self, now: float) -> float:
        """Seconds until a way is to be tried again, or a worker may be silent for too long."""
        return min(self.ways.due(now), self._none_silent_before - now)

    def writers(self, decode: str) -> frozenset[tuple[str, str]]:
        """The prefill workers, with their epochs, that this decode worker is told of before it reads what
        is sent to it now. Only these may write to what it grants then: the blocks of a grant wait in
        quarantine for none but the writers that it knows."""
        member = self._members.get(decode)
        return member.writers if member is not None else frozenset()

    def prefill_reaches(self, decode: str, now: float) -> bool:
        """A prefill worker that accepts work can write to this decode worker."""
        return any(self._members[prefill].accepts(now) for prefill, _ in self.writers(decode))

    def any_fill_possible(self, now: float) -> bool:
        """A prefill worker that accepts work can write to a decode worker that does, or may soon: it has
        not failed to attach. While no decode worker accepts work, to any that stays."""
        decodes: set[str] | None = None  # looked for only where a link has failed
        for prefill in self.of(PREFILL):
            if not prefill.accepts(now):
                continue
            if not prefill.failed:
                return any(not decode.leaving for decode in self.of(DECODE))
            if decodes is None:
                staying = [m for m in self.of(DECODE) if not m.leaving]
                decodes = {m.worker for m in self.alive(DECODE, now) or staying}
            if not decodes <= prefill.failed.keys():
                return True
        return False

    def infos(self, now: float) -> tuple[WorkerInfo, ...]:
        """Every member, for ClusterInfo."""
        return tuple(
            WorkerInfo(
                m.worker,
                m.hello.role,
                m.hello.device,
                "leaving" if m.leaving else "paused" if m.out_of_order else m.health(now).value,
                _links(m),
                m.hello.load_s,
                m.hello.how,
            )
            for m in map(self._members.__getitem__, sorted(self._members))
        )


def mixture(hello: Hello, other: Hello) -> str | None:
    """Why these two cannot serve one cluster, of which one is an engine; None if they can. A request that
    moves between them must get the same tokens."""
    if hello.role != other.role:
        return (
            f"the worker's role is {hello.role}, {other.worker}'s is {other.role}: their tokens differ; "
            "give engine workers a router of their own"
        )
    if hello.layout != other.layout:
        return (
            f"the worker's upstream is {hello.how}, {other.worker}'s is {other.how}: their tokens "
            "differ; give each kind of server a router of its own"
        )
    return None


def other_protocol(protocol: str, why: str = "") -> str:
    """Why a worker of another version cannot join. `why`: what its Hello lacks, if it cannot be read."""
    if protocol == str(PROTOCOL):
        return f"the worker's Hello is malformed: {why}"
    return f"the worker speaks protocol {protocol}, the router {PROTOCOL}"


def _kv(hello: Hello) -> str:
    return f"{hello.kv_dtype or hello.dtype}, block size {hello.block_size}"


def _attach(hello: Hello) -> msg.Attach:
    return msg.Attach(hello.worker, hello.epoch, hello.regions)


def _shut_out(prefill: str, ways: Iterable[Attached]) -> list[Effect]:
    """To decode workers that can shut this writer out, wherever it is."""
    return [To(way.worker, msg.WriterClear(prefill)) for way in ways if shuts_out(way.transport)]


def _links(member: Member) -> tuple[str, ...]:
    if member.links is None:
        member.links = tuple(map(_transport, member.attached.values()))
    return member.links


def _transport(attached: Attached) -> str:
    rate = attached.gb_per_s
    speed = f" {rate:.1f} GB/s" if rate >= 0.1 else f" {1000 * rate:.2g} MB/s" if rate else ""
    return f"{attached.transport}{speed}"
