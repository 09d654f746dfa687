"""Ledger: every live request, its state, and since when. The only writer of State.

The time spent in each state is recorded as states change. Queueing, prefill, hand-over and decode times
are read off these records, never measured a second time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.lifecycle import LIVE, Event, State, advance
from baton.params import GenerationParams
from baton.text import TextStream
from router.deadlines import Deadlines
from router.expected import STEP, Expected
from router.line import Line
from router.loads import Loads
from router.role_policy import UNDECIDED, Decision, RolePolicy
from router.tries import Isolation, Tries


@dataclass(slots=True)
class Entry:
    """One live request. `decode` and `prefill` are the workers of its current run, None without one."""

    id: str
    client: str
    prompt_ids: tuple[int, ...]
    params: GenerationParams  # resolved: with the model's defaults and stop ids
    text: TextStream
    pooling: str = ""  # an embedding is asked for (baton/params.py)
    tenant: str = ""
    group: str = ""
    priority: int = 0
    queue_timeout_s: float = 0.0  # until placed, 0: no limit
    timeout_s: float = 0.0  # until its end
    role_policy: RolePolicy | None = None  # the client's; None: the router's
    submitted: float = 0.0
    serial: int = 0  # order of submission
    state: State = State.QUEUED
    since: float = 0.0  # when it entered its state
    run: str = ""  # name of the current attempt (_name_run)
    runs: int = 0  # attempts so far
    began: int = 0  # tokens that were known when its current run began
    emitted: list[int] = field(default_factory=list)
    decode: str | None = None
    prefill: str | None = None
    grant: Grant | None = None
    receipt: Receipt | None = None
    tries: Tries = field(default_factory=Tries)
    scored: bool = False  # the prompt's logprobs were sent to the client
    transport: str = ""  # of its last KV hand-over
    preemptions: int = 0  # in a full pool
    outgrown: int = 0  # how often it outgrew its KV
    block_hashes: tuple[bytes, ...] = ()  # of its full blocks, the root first
    hashed: tuple[int, int] = (0, 0)  # tokens and block size for which they were computed
    reserved: int = 0  # tokens of its last Reserve
    block_size: int = 1  # of the worker it is on
    counted: int = 0  # tokens that its counted blocks have room for (router/loads.py)
    writers: frozenset[tuple[str, str]] = frozenset()  # who may fill it: prefill workers, epochs
    spent: dict[State, float] = field(default_factory=dict)
    first_token: float | None = None
    handover_s: float = 0.0
    moved_bytes: int = 0
    detokenize_s: float = 0.0
    decision: Decision = UNDECIDED  # who fills it: made when its blocks are granted
    left: int = 0  # tokens that its prefill worker has still to compute
    cached_tokens: int = 0  # first tokens whose KV the current grant found in the prefix cache
    reused_tokens: int = 0  # the same of the first grant
    prefill_reused: int = 0  # first tokens whose KV its last fill did not compute
    retry_at: float = 0.0  # earliest time of the next placement
    reach: int = 0  # most tokens the sequence can have; the same for every attempt
    charged: int = 0  # tokens of its tenant's share: first as an estimate, from its first run on

    def __post_init__(self) -> None:
        self.reach = len(self.prompt_ids) + self.params.max_new_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and everything emitted: what a new run starts from."""
        return self.prompt_ids + tuple(self.emitted)

    @property
    def length(self) -> int:
        """len(token_ids), without building it."""
        return len(self.prompt_ids) + len(self.emitted)

    @property
    def to_be_scored(self) -> bool:
        """The client waits for the prompt's logprobs."""
        return self.params.prompt_logprobs >= 0 and not self.scored

    @property
    def unfilled(self) -> int:
        """Tokens whose KV must be computed before the last known token can run."""
        return self.length - 1 - self.cached_tokens

    @property
    def blocks(self) -> int:
        """Blocks that the current run has, as far as the router can tell."""
        return -(-max(self.reserved, self.length) // self.block_size)


class Listener(Protocol):
    """Observes all changes of the ledger."""

    def happened(self, entry: Entry, event: Event | None, now: float, note: str) -> None:
        """The entry is in its new state and still names the workers of the old one. `event` is None
        if it was added."""

    def filled_to(self, entry: Entry, tokens: int, now: float) -> None:
        """The KV of so many tokens is computed, and the fill continues."""

    def sampled(self, entry: Entry, times: Sequence[float]) -> None:
        """The entry has new tokens, sampled at these times."""


class Ledger:
    """Live requests by id, by state, and by the run that workers report on."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._entries: dict[str, Entry] = {}
        self._by_state: dict[State, dict[str, Entry]] = {state: {} for state in LIVE}
        self._runs: dict[str, Entry] = {}
        self._of_client: dict[str, dict[str, Entry]] = {}
        self._line = Line()
        self._expected = Expected()
        self._isolation = Isolation()
        self.loads = Loads()
        self.deadlines = Deadlines()
        self._serial = 0
        self._runs_begun = 0
        self.late_reports = 0  # about runs already over: normal after a cancel, so counted

    def add(self, entry: Entry, now: float) -> None:
        """Its id must not be in use."""
        assert entry.id not in self._entries
        self._serial += 1
        entry.submitted = entry.since = now
        entry.serial = self._serial
        self._entries[entry.id] = self._by_state[State.QUEUED][entry.id] = entry
        self._of_client.setdefault(entry.client, {})[entry.id] = entry
        answer = self._expected.tokens(entry.tenant, entry.params.max_new_tokens)
        entry.charged = len(entry.prompt_ids) + answer
        self._line.add(entry.id, entry.tenant, entry.group, entry.charged, entry.priority)
        self.deadlines.ends(entry.id, entry.timeout_s, now)
        self.waits(entry, now)
        self._listener.happened(entry, None, now, "")

    def apply(self, entry: Entry, event: Event, now: float, *, note: str = "") -> None:
        """Change the entry's state. RESERVE begins a new run on the worker in `decode`, as does START
        of a queued one; FILL goes to the one in `prefill`; FINISH removes the entry. `note` is the
        reason, for observers."""
        state, queued = advance(entry.state, event), entry.state is State.QUEUED
        if state is not entry.state:
            self._count(entry, state)
            self._move(entry, state, now)
        if queued and event is not Event.FINISH:
            self._name_run(entry)
            self._isolation.placed(entry.id, entry.tries, now)
            self._runs[entry.run] = entry
        elif event is Event.GRANTED:
            self.deadlines.placed(entry.id)
        elif event is Event.FINISH:
            self.deadlines.ended(entry.id)
        elif event in (Event.LOST, Event.RETRY):
            self.waits(entry, now)
        entry.preemptions += event is Event.PREEMPTED
        entry.outgrown += event is Event.OUTGROWN
        self._listener.happened(entry, event, now, note)
        if state in (State.QUEUED, State.FINISHED):
            self._runs.pop(entry.run, None)
            entry.decode = entry.prefill = entry.grant = entry.receipt = None
            entry.cached_tokens = 0

    def _name_run(self, entry: Entry) -> None:
        """Workers report by run. No name comes twice, also if a client ends a request and submits another
        one with its id: a late report on the first is not taken for one on the second."""
        entry.run = f"{entry.id}#{self._runs_begun}"
        entry.runs += 1
        entry.began = entry.length
        self._runs_begun += 1

    def waits(self, entry: Entry, now: float) -> None:
        """It waits for a worker, from now on if it did not yet."""
        self.deadlines.waits(entry.id, entry.queue_timeout_s, now)

    def tokens(self, entry: Entry, token_ids: Sequence[int], times: Sequence[float]) -> None:
        """Append tokens that were sampled at these times."""
        if entry.state is not State.DECODING:  # nearly every call: the table need not be asked
            entry.state = advance(entry.state, Event.TOKEN)
        entry.emitted += token_ids
        if token_ids:
            length, tries = entry.length, entry.tries
            if not tries.proven:
                self.loads.fills.ended(entry.id, times[0])
                self._isolation.left(entry.id)
                self.deadlines.placed(entry.id)  # an engine has no grant: this ends its wait
            tries.emitted(length)
            if length > entry.counted:
                self._count_blocks(entry)
            if length >= entry.charged + STEP:
                self._charge(entry)
        if entry.first_token is None:
            entry.first_token = times[0]
        self._listener.sampled(entry, times)

    def filled_to(self, entry: Entry, tokens: int, now: float) -> None:
        """A chunk of its prompt is filled. No change of state; the listener is notified."""
        assert entry.prefill is not None
        entry.left = max(0, entry.length - 1 - tokens)
        self.loads.progressed(entry.id, entry.prefill, entry.left)
        entry.tries.filled(min(tokens, entry.length - 1))
        self._isolation.tried(entry.id, entry.tries)
        self._listener.filled_to(entry, tokens, now)

    def filled(self, entry: Entry) -> None:
        """Its whole prompt is filled."""
        entry.tries.filled(entry.length - 1)
        self._isolation.tried(entry.id, entry.tries)

    def _count(self, entry: Entry, state: State) -> None:
        """What its workers have to do, as it leaves its state for this one."""
        name, decode, prefill = entry.id, entry.decode, entry.prefill
        if entry.state is State.FILLING:
            assert prefill is not None
            self.loads.filled(name, prefill)
        if decode is None:
            assert entry.state is State.QUEUED
            assert state is State.FINISHED
        elif state is State.RESERVING:
            self._count_blocks(entry)
        elif state is State.FILLING:
            assert prefill is not None
            entry.left = entry.unfilled
            self.loads.filling(name, prefill, entry.left)
        elif state is State.DECODING:
            if entry.state is State.QUEUED:  # on an engine
                self._count_blocks(entry)
            self.loads.decoding(decode)
        elif state is not State.RESERVED:
            self.loads.removed(name, decode, decoding=entry.state is State.DECODING)
            self._isolation.left(name)

    def _count_blocks(self, entry: Entry) -> None:
        assert entry.decode is not None
        blocks = entry.blocks
        entry.counted = blocks * entry.block_size
        self.loads.placed(entry.id, entry.decode, blocks)

    def _move(self, entry: Entry, state: State, now: float) -> None:
        name = entry.id
        entry.spent[entry.state] = entry.spent.get(entry.state, 0.0) + now - entry.since
        del self._by_state[entry.state][name]
        itself = state is State.DECODING and entry.grant is not None and entry.receipt is None
        self.loads.moved(name, entry.decode if itself else None, entry.unfilled, now)
        if entry.state is State.QUEUED:
            (self._line.remove if state is State.FINISHED else self._line.place)(name)
        entry.state, entry.since = state, now
        if state is State.FINISHED:
            del self._entries[name]
            self._forget_client(entry)
            if entry.runs:
                self._charge(entry)
            if entry.emitted:
                self._expected.ended(entry.tenant, len(entry.emitted))
            return
        self._by_state[state][name] = entry
        if state is State.QUEUED:
            self._line.put_back(name, entry.serial, quarantined=entry.tries.quarantined)

    def _charge(self, entry: Entry) -> None:
        """What it has taken beside what was charged, while it runs, too: a long answer is no credit."""
        more = entry.length - entry.charged
        self._line.settle(entry.tenant, entry.group, more, entry.priority)
        entry.charged = entry.length

    def get(self, request: str) -> Entry | None:
        return self._entries.get(request)

    def entry(self, request: str) -> Entry:
        """The entry of a live request."""
        return self._entries[request]

    def running(self, run: str) -> Entry | None:
        """The entry whose current run this is."""
        return self._runs.get(run)

    def follow(self, run: str, *states: State, by: str | None = None) -> Entry | None:
        """The entry whose current run this is, if it is in one of the states and on worker `by`, the
        sender of the report. Other reports are late, and counted."""
        entry = self._runs.get(run)
        if entry is not None and entry.state in states:
            at_work = entry.prefill if entry.state is State.FILLING else entry.decode
            if by is None or by == entry.decode or by == at_work:
                return entry
        self.late_reports += 1
        return None

    def in_state(self, *states: State) -> list[Entry]:
        """Entries in these states, each state's in the order they entered it."""
        return [entry for state in states for entry in self._by_state[state].values()]

    def reserved(self) -> Iterator[Entry]:
        """Entries that wait to be filled, in the order of their grants. Their states must not change
        while they are read."""
        return iter(self._by_state[State.RESERVED].values())

    def count(self, *states: State) -> int:
        return sum(len(self._by_state[state]) for state in states)

    def next_queued(self, now: float) -> Entry | None:
        """The queued request to place next (router/line.py); None also while others wait for the
        progress of one that may be at fault for its workers' deaths (router/tries.py)."""
        entry = self._first()
        return None if entry is None or self._isolation.wait_s(entry.tries, now) > 0 else entry

    def queued_due(self, now: float) -> float:
        """Seconds after which the next one may be placed, as far as time decides it."""
        entry = self._first()
        if entry is None:
            return inf
        return max(entry.retry_at - now, self._isolation.wait_s(entry.tries, now))

    def _first(self) -> Entry | None:
        name = self._line.first(quarantined=not self._isolation.any_quarantined)
        return self._entries[name] if name is not None else None

    def set_aside(self, entry: Entry) -> None:
        """The next one lets others pass until it is called back."""
        self._line.set_aside(entry.id, entry.reach)

    def aside(self) -> Entry | None:
        """The shortest one that is set aside."""
        name = self._line.aside
        return self._entries[name] if name is not None else None

    def call_back(self, most: float) -> None:
        """Those set aside that have no more tokens wait in line again, at their old places."""
        found = sorted(map(self.entry, self._line.call_back(most)), key=lambda each: -each.serial)
        for entry in found:
            if entry.runs:
                quarantined = entry.tries.quarantined
                self._line.put_back(entry.id, entry.serial, quarantined=quarantined)
            else:
                share = (entry.tenant, entry.group, entry.charged, entry.priority)
                self._line.add(entry.id, *share, back=True)

    def queued_again(self) -> list[Entry]:
        """Queued entries that were placed before, which are few, and those set aside."""
        return [self._entries[name] for name in self._line.returned()]

    def on_worker(self, worker: str) -> list[Entry]:
        """Entries whose current run needs this worker."""
        return [self._entries[name] for name in self.loads.on_worker(worker)]

    def of_client(self, client: str) -> list[Entry]:
        return list(self._of_client.get(client, {}).values())

    def _forget_client(self, entry: Entry) -> None:
        of_client = self._of_client[entry.client]
        del of_client[entry.id]
        if not of_client:
            del self._of_client[entry.client]

    def __len__(self) -> int:
        return len(self._entries)
