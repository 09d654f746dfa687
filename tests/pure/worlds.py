"""Worlds: the states that an Explorer (explore.py) goes through, and what must hold in each node."""

import pickle
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from baton.kv.grant import Grant
from baton.lifecycle import LIVE, State
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.router import Router
from tests.pure.explored import Answers, Client, Violation, Write
from tests.pure.slow_loads import wrong_counts

FAULTS = {
    "kill": "a worker is killed and replaced; of what it had sent, the first messages arrive",
    "restart": "the router is killed and replaced",
    "give_up": "the router takes a worker for dead that is only stalled",
    "doubt": "a worker takes the router for dead that is only stalled",
    "cut": "a worker's connection is cut; what it had sent is lost, what was sent to it may be",
    "abort": "the client aborts a request",
    "expire": "the leases of a pool end",
    "damage": "a filled block is damaged before its run starts",
}


@dataclass(frozen=True)
class Setting:
    """What is explored. A path has at most so many `faults`, of these kinds."""

    prefills: int = 1
    decodes: int = 1
    blocks: int = 8  # of each decode worker
    prompts: tuple[tuple[tuple[int, ...], int], ...] = (((11, 12, 13, 14), 2), ((21, 22, 23), 2))
    prefill_budget: int = 2
    faults: int = 1
    kinds: tuple[str, ...] = tuple(FAULTS)


SETTINGS = {
    "pair": Setting(),
    "two prefills": Setting(prefills=2),
    "two decodes": Setting(decodes=2),
    "shared prefix": Setting(prompts=(((11, 12, 13), 2), ((11, 12, 14, 15), 2))),
    "small pool": Setting(blocks=5, prompts=(((11, 12), 4), ((21, 22), 4))),
}
"""The first two requests differ in length, so that one is still filled when the other decodes."""


class World(NamedTuple):
    """All that decides the future. Numbers stand for interned nodes, pools and messages."""

    nodes: tuple[tuple[str, int], ...]
    pools: tuple[tuple[str, int], ...]
    mail: tuple[tuple[tuple[str, str], tuple[int, ...]], ...]  # (sender, receiver), in flight
    watching: frozenset[tuple[str, str]]  # (peer, who is told of its end)
    faults: int  # that may still happen
    boots: int
    now: float


Action = tuple[Any, ...]


class Interned:
    """Values by number."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.values: list[Any] = []

    def known(self, key: Any) -> int | None:
        return self._numbers.get(key)

    def add(self, key: Any, value: Any) -> int:
        self._numbers[key] = len(self.values)
        self.values.append(value)
        return self._numbers[key]


class Transition(NamedTuple):
    """What a node does on an event, wherever node, event and surroundings are the same."""

    node: int
    pool: int | None
    effects: tuple[tuple[str, int | None], ...]  # (peer, message); (peer, None): watch it
    writes: tuple[Write, ...]


@dataclass
class Facts:
    """What the checks need of a node, read once."""

    blob: bytes
    resting: bool  # it holds nothing
    joined: bool = False
    members: tuple[str, ...] = ()  # router
    jobs: tuple[Grant, ...] = ()  # prefill: may be written at its next step
    writable: dict[int, set[str]] = field(default_factory=dict)  # decode: block -> runs
    unstarted: tuple[Grant, ...] = ()  # decode
    runs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # decode: table, computed tokens
    abortable: tuple[str, ...] = ()  # client
    failures: tuple[str, ...] = ()  # client: what is wrong if nothing more happens


class Draft:
    """A world being changed."""

    def __init__(self, world: World) -> None:
        self.nodes = dict(world.nodes)
        self.pools = dict(world.pools)
        self.mail = {pair: list(queue) for pair, queue in world.mail}
        self.watching = set(world.watching)
        self.faults, self.boots, self.now = world.faults, world.boots, world.now

    def send(self, sender: str, receiver: str, message: int) -> None:
        self.mail.setdefault((sender, receiver), []).append(message)

    def world(self) -> World:
        mail = sorted((pair, tuple(queue)) for pair, queue in self.mail.items() if queue)
        return World(
            tuple(sorted(self.nodes.items())),
            tuple(sorted(self.pools.items())),
            tuple(mail),
            frozenset(self.watching),
            self.faults,
            self.boots,
            self.now,
        )


@dataclass
class Report:
    """Nothing, or the shortest way to a violation."""

    worlds: int
    nodes: int
    depth: int  # reached
    complete: bool  # no world was left
    violation: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f"{self.worlds:,} worlds of {self.nodes:,} node states, depth {self.depth}"
        size += ", complete" if self.complete else ""
        if not self.violation:
            return f"{size}: no violation"
        lines = [f"{index:4}  {each}" for index, each in enumerate(self.trace, 1)]
        return "\n".join([f"{size}: {self.violation}", *lines])


# ---- nodes

MOST_BYTES = 1 << 17


def facts_of(node: Any, answers: Answers) -> Facts:
    """The facts of a node. Violation if it is wrong by itself."""
    blob = pickle.dumps(node)
    assert len(blob) < MOST_BYTES, "a table that is copied with each state: make a small one"
    match node:
        case Router():
            ledger = node.ledger
            if sum(1 for _ in ledger.in_state(*LIVE)) != len(ledger):
                raise Violation("the ledger's states do not cover its requests")
            for entry in ledger.in_state(*LIVE):
                if (entry.decode is None) != (entry.state is State.QUEUED):
                    raise Violation(f"{entry.id} is {entry.state} on {entry.decode}")
            for wrong in wrong_counts(node):
                raise Violation(wrong)
            resting = not (len(ledger) or ledger._runs or node._requests._dropping)
            members = tuple(sorted(member.worker for member in node.workers))
            return Facts(blob, resting, members=members)
        case PrefillWorker():
            attached = node._model.attached  # type: ignore[attr-defined]
            jobs = tuple(j.grant for j in node._jobs.values() if j.grant.worker in attached)
            joined = node._membership.joined
            return Facts(blob, not node._jobs, joined, jobs=jobs)
        case DecodeWorker():
            return _facts_of_decode(node, blob)
    assert isinstance(node, Client)
    for name, tokens in node.tokens.items():
        if tokens != answers[name][0][: len(tokens)]:
            raise Violation(f"{name} got {tokens}, the undisturbed run {answers[name]}")
        if len(node.ends[name]) > 1:
            raise Violation(f"{name} ended {node.ends[name]}")
    failures = tuple(node.failures(answers))
    return Facts(blob, not failures, abortable=node.abortable, failures=failures)


def _facts_of_decode(node: DecodeWorker, blob: bytes) -> Facts:
    table = node.table
    try:
        table.check()
    except AssertionError as error:
        raise Violation(f"blocks of {table.worker}: {error}") from error
    unstarted = tuple(h.grant for h in table._held.values() if h.lease_until is not None)
    writable: dict[int, set[str]] = {}
    for grant in unstarted:
        for block in grant.blocks:
            writable.setdefault(block, set()).add(grant.run)
            if table._holders[block] != 1:
                raise Violation(f"block {block} is to be written for {grant.run} and shared")
    for held in table._quarantine:
        for block in held.blocks:
            writable.setdefault(block, set()).add(held.run)
    for name, run in node.runs.items():
        if tuple(run.table) != table._held[name].table:
            raise Violation(f"{name} decodes in blocks that it does not hold")
    runs = tuple(
        (tuple(run.table), tuple(run.token_ids[: run.computed])) for run in node.runs.values()
    )
    empty = not (node.runs or node.arriving or node.block_hashes)
    joined = node._membership.joined
    return Facts(
        blob, table.idle and empty, joined, writable=writable, unstarted=unstarted, runs=runs
    )
