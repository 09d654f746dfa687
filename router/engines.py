"""Engines: requests for workers of role "engine", which ask another server for tokens.

They hold no KV of ours, so there is nothing to reserve and to fill: a queued request is started at once,
with its prompt and all tokens so far. An engine runs as many requests as its Hello says. The queue,
quarantine and resumption are those of every request.
"""

from collections.abc import Callable

from baton.lifecycle import PLACED
from baton.rope import RopeRule
from baton.wire.node import Effect
from router.affinity import Affinity
from router.batching import Rules
from router.hashes import prefix_hashes
from router.ledger import Entry, Ledger
from router.placement import PLACE_DECODE, DecodeChoice
from router.workers import ENGINE, WorkerRegistry


class Engines:
    """Places requests on engine workers: PLACE_DECODE, with places for blocks."""

    def __init__(
        self,
        ledger: Ledger,
        members: WorkerRegistry,
        rules: Rules,
        affinity: Affinity,
        rope: RopeRule,
    ) -> None:
        self._ledger, self._members, self._rules = ledger, members, rules
        self._affinity, self._rope = affinity, rope

    def place(
        self,
        following: Callable[[float], Entry | None],
        start: Callable[[Entry, float], Effect],
        now: float,
    ) -> list[Effect]:
        """Start all requests that can be, in the order of the line. `following`: the next in line, no
        embedding: engines compute none, and are in no cluster with workers that do."""
        engines = self._members.alive(ENGINE, now)
        effects: list[Effect] = []
        while engines and self._ledger.count(*PLACED) < self._rules.batch_size:
            entry = following(now)
            if entry is None:
                break
            hashes = prefix_hashes(entry, engines[0].hello.block_size, self._rope)[1:]
            choices = []
            for engine in engines:
                name, here = engine.worker, self._ledger.loads.computing(engine.worker)
                cached = self._affinity.there(hashes, name) / max(1, len(hashes))
                choices.append(DecodeChoice(name, engine.hello.blocks - here, here, cached))
            worker = PLACE_DECODE(choices, 1)
            if worker is None:
                break
            self._affinity.sent(hashes, worker)
            entry.decode, entry.block_size = worker, engines[0].hello.block_size
            effects.append(start(entry, now))
        return effects
