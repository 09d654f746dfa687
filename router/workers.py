"""WorkerRegistry: the workers that have joined, which prefill can write to which decode, and liveness.

The loop notices at once when a process on the router's own host dies (Exited). Heartbeats find what
cannot be watched: workers on other hosts, stalled and wedged processes. router/readiness.py says what is
missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from baton.wire import messages as msg
from baton.wire.membership import BEAT_S
from baton.wire.messages import PROTOCOL, Attached, AttachFailed, Hello
from baton.wire.node import Effect, To, Watch
from baton.wire.records import WorkerInfo

PREFILL, DECODE, ENGINE = "prefill", "decode", "engine"
MAX_PATIENCE_S = 86_400.0
MISSED_BEATS = 3
MAX_WORKERS = 1024
ATTACH_AGAIN_S, MOST_ATTACH_S = 30.0, 600.0
"""From a failed Attach to the next, and the most after doubling. A try may block its worker for seconds,
but what was wrong (no descriptors, a decode worker at a long step) may be over."""


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
    attach_again: float = float("inf")  # prefill: when to try those again
    attach_wait_s: float = ATTACH_AGAIN_S
    pool: msg.PoolStats | None = None  # decode: its last report
    full_until: float = 0.0  # decode: it deferred a run, retry at this time
    leaving: bool = False  # it gets no new work
    paused: str = ""  # engine: why it takes no new work for now
    out_of_order: str = ""  # the same, unless it is only busy
    dismissed: bool = False

    @property
    def worker(self) -> str:
        return self.hello.worker

    def accepts(self, now: float) -> bool:
        """It can be given work."""
        return not self.leaving and not self.paused and self.health(now) is Health.ALIVE

    def health(self, now: float) -> Health:
        """A worker sends heartbeats from its step loop, so a wedged process falls silent though its
        sockets still answer. It may be silent for as long as its longest step takes."""
        silent = now - self.last_heard
        if silent >= MISSED_BEATS * BEAT_S + self.hello.patience_s:
            return Health.DEAD
        return Health.SUSPECT if silent >= MISSED_BEATS * BEAT_S else Health.ALIVE


class WorkerRegistry:
    """The workers of one cluster. All of one model, dtype and KV layout."""

    def __init__(self, *, model: str, host: str) -> None:
        self._model = model
        self._host = host
        self._members: dict[str, Member] = {}
        self._silent: dict[str, Hello] = {}  # workers given up whose process may still run
        self.decode_since: float | None = None  # when the first decode worker joined
        self.filled_once = False  # a prefill worker could write to a decode worker at some time

    def get(self, worker: str) -> Member | None:
        return self._members.get(worker)

    def of(self, role: str) -> Iterator[Member]:
        """Members of a role, sorted by name, so that placement is deterministic."""
        return (m for _, m in sorted(self._members.items()) if m.hello.role == role)

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
                f"the worker's KV layout is {hello.layout} ({hello.dtype}, block size "
                f"{hello.block_size}), {other.worker}'s is {other.hello.layout} "
                f"({other.hello.dtype}, block size {other.hello.block_size}); start both with the "
                "same --dtype and --block-size"
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

    def attached(self, prefill: Member, report: Attached) -> list[Effect]:
        """A prefill worker can write to this decode worker: introduce it there."""
        if not self._current(report):
            return []
        prefill.attached[report.worker] = report
        self.filled_once = True
        prefill.failed.pop(report.worker, None)
        hello = prefill.hello
        joined = msg.WriterJoined(hello.worker, hello.host, hello.pid, report.transport)
        return [To(report.worker, joined)]

    def attach_failed(self, prefill: Member, report: AttachFailed, now: float) -> None:
        """A prefill worker cannot write to this decode worker, for now."""
        if self._current(report):
            prefill.failed[report.worker] = report.why
            prefill.attach_again = now + prefill.attach_wait_s

    def _current(self, report: Attached | AttachFailed) -> bool:
        """It is about a decode worker that is here, and its present pool."""
        decode = self._members.get(report.worker)
        return decode is not None and (decode.hello.role, decode.hello.epoch) == (
            DECODE,
            report.epoch,
        )

    def attach_again(self, now: float) -> list[Effect]:
        """Prefill workers try again where they failed, later and later."""
        effects: list[Effect] = []
        for prefill in self.of(PREFILL):
            if now < prefill.attach_again:
                continue
            prefill.attach_again = float("inf")
            prefill.attach_wait_s = min(2 * prefill.attach_wait_s, MOST_ATTACH_S)
            decodes = [self._members[name] for name in prefill.failed]
            effects += [To(prefill.worker, _attach(decode.hello)) for decode in decodes]
        return effects

    def remove(self, worker: str, *, proven_dead: bool) -> list[Effect]:
        """Remove a worker and inform its peers. A prefill worker that is only silent may still write: its
        blocks stay in quarantine until it sends Hello or is proven dead."""
        member = self._members.pop(worker, None)
        if member is None:
            silent = self._silent.pop(worker, None) if proven_dead else None
            if silent is None or silent.role == DECODE:
                return []
            return self._to(DECODE, msg.WriterClear(worker))  # given up earlier, now proven dead
        if not proven_dead:
            self._silent[worker] = member.hello
        if member.hello.role == DECODE:
            return self._detach(member)
        return self._to(DECODE, msg.WriterClear(worker)) if proven_dead else []

    def dismiss(self, member: Member) -> list[Effect]:
        """Nothing runs on this leaving worker: it may end."""
        member.dismissed = True
        detach = self._detach(member) if member.hello.role == DECODE else []
        return [*detach, To(member.worker, msg.Dismissed())]

    def _detach(self, decode: Member) -> list[Effect]:
        for prefill in self.of(PREFILL):
            prefill.attached.pop(decode.worker, None)
            prefill.failed.pop(decode.worker, None)
        return self._to(PREFILL, msg.Detach(decode.worker, decode.hello.epoch))

    def _to(self, role: str, message: msg.Message) -> list[Effect]:
        return [To(member.worker, message) for member in self.of(role)]

    def heard(self, worker: str, now: float) -> None:
        """Any message proves that the worker is alive."""
        if member := self._members.get(worker):
            member.last_heard = now

    def alive(self, role: str, now: float) -> list[Member]:
        """Members of a role that accept work."""
        return [m for m in self.of(role) if m.accepts(now)]

    def dead(self, now: float) -> list[str]:
        """Workers that were silent for too long."""
        return [m.worker for m in self if m.health(now) is Health.DEAD]

    def prefill_reaches(self, decode: str, now: float) -> bool:
        """A prefill worker that accepts work can write to this decode worker."""
        return any(decode in prefill.attached for prefill in self.alive(PREFILL, now))

    def prefill_may_reach(self, decode: str, now: float) -> bool:
        """The same, or such a prefill worker is about to attach to it."""
        return any(decode not in prefill.failed for prefill in self.alive(PREFILL, now))

    def infos(self, now: float) -> tuple[WorkerInfo, ...]:
        """Every member, for ClusterInfo."""
        return tuple(
            WorkerInfo(
                m.worker,
                m.hello.role,
                m.hello.device,
                "leaving" if m.leaving else "paused" if m.out_of_order else m.health(now).value,
                tuple(map(_transport, m.attached.values())),
                m.hello.load_s,
                m.hello.how,
            )
            for m in sorted(self, key=lambda m: m.worker)
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


def _attach(hello: Hello) -> msg.Attach:
    return msg.Attach(hello.worker, hello.epoch, hello.regions)


def _transport(attached: Attached) -> str:
    speed = f" {attached.gb_per_s:.1f} GB/s" if attached.gb_per_s else ""
    return f"{attached.transport}{speed}"
