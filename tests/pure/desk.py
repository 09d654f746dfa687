"""A router with pretend workers at its doors: what tests of the router alone share."""

import dataclasses

from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.lifecycle import State
from baton.params import GenerationParams, Limits
from baton.wire import messages as msg
from baton.wire.node import Effect, To
from router.admission import Served
from router.batching import Rules
from router.router import Identity, Router
from tests.pure.test_workers import hello
from tests.pure.town import EOS, GREEDY, VOCABULARY, PretendTokenizer

RECEIPT = Receipt(0, b"", 0.0, "shm")

RULES = Rules(batch_size=4, window_s=0.0, token_budget=64)


class Desk:
    """A router with pretend workers d1 and p1 at its doors; every effect is kept."""

    def __init__(self, *workers: str, rules: Rules = RULES, pool: int = 64) -> None:
        served = Served("m", "m" * 16, Limits(512, VOCABULARY), (EOS,), GREEDY)
        self.router = Router(
            Identity("router/1", "here", 1), served, PretendTokenizer(), rules, lambda: 0.0
        )
        self.now = 0.0
        self.pool = pool
        for worker in workers or ("d1", "p1"):
            self.join(worker)
        for p in [w for w in workers or ("d1", "p1") if w.startswith("p")]:
            for d in [w for w in workers or ("d1", "p1") if w.startswith("d")]:
                self.hear(p, msg.Attached(d, f"{d}/0", "shm", 0.0, ""))

    def join(self, worker: str, **changes: object) -> list[Effect]:
        blocks = self.pool if worker.startswith("d") else 0
        return self.hear(worker, dataclasses.replace(hello(worker), blocks=blocks, **changes))

    def hear(self, sender: str, message: msg.Message) -> list[Effect]:
        return self.router.handle(sender, message, self.now)

    def step(self) -> list[Effect]:
        return self.router.step(self.now)

    def submit(
        self, name: str, prompt: tuple[int, ...] = (1, 2, 3), length: int = 4
    ) -> list[Effect]:
        return self.hear("client", msg.Submit(name, prompt, GenerationParams(length)))

    def grant(self, run: str, worker: str = "d1") -> Grant:
        return Grant(worker, f"{worker}/0", run, 1, (0,))

    def state(self, name: str) -> State | None:
        entry = self.router.ledger.get(name)
        return entry.state if entry else None

    def run(self, name: str) -> str:
        """The name of the request's current run."""
        return self.router.ledger.entry(name).run

    def to_filling(self, name: str = "a") -> None:
        self.submit(name)
        self.step()
        self.hear("d1", msg.Reserved(self.grant(self.run(name))))
        self.step()
        assert self.state(name) is State.FILLING

    def to_decoding(self, name: str = "a") -> None:
        self.to_filling(name)
        self.hear("p1", msg.Filled(self.run(name), RECEIPT, 0.0))
        assert self.state(name) is State.DECODING


def sent(effects: list[Effect], kind: type) -> list[tuple[str, object]]:
    return [
        (e.peer, e.message) for e in effects if isinstance(e, To) and isinstance(e.message, kind)
    ]
