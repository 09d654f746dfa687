"""Battery: what all rows share: a seed, a scale, the fault-free answers, and the form of a result."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.faults.check import Answer, Census, Verdict, answers, compare
from tools.faults.client import run_clients
from tools.faults.ledger import Event, Ledger
from tools.faults.service import Service
from tools.faults.workload import Mix, cases

CASES = 160
CLIENTS, REQUESTS = 8, 100
"""A row's load at scale 1: so many clients with so many requests each."""


@dataclass(slots=True)
class Result:
    """One row. Times are seconds; `problems` say why it fails its pass line."""

    row: str
    fault: str
    injected: int = 0
    requests: int = 0
    lost: int = 0
    wrong: int = 0
    token_s: list[float] = field(
        default_factory=list
    )  # from the fault to the next token of any stream
    whole_s: list[float] = field(default_factory=list)  # ... until everything is as before
    leaked: int = 0  # KV blocks
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems

    def judge(self, verdict: Verdict) -> None:
        """Add what the check of a ledger found."""
        self.requests += verdict.requests
        self.lost += len(verdict.lost)
        self.wrong += len(verdict.wrong)
        self.outcomes += verdict.outcomes
        self.problems += verdict.problems

    def compare(self, before: Census, after: Census) -> None:
        """Add what the service holds that it did not hold before."""
        self.leaked += after.leased + after.quarantined
        self.problems += compare(before, after)

    def require(self, good: bool, otherwise: str) -> None:
        """A pass line."""
        if not good:
            self.problems.append(otherwise)


def p50(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values) if values else float("nan")


@dataclass(slots=True)
class Battery:
    """What a row is given."""

    seed: int
    scale: float
    folder: Path  # for ledgers
    say: Callable[[str], None]
    bodies: dict[int, dict[str, object]] = field(default_factory=dict)
    reference: dict[int, Answer] = field(default_factory=dict)

    def count(self, number: int, *, least: int = 1) -> int:
        """So many at this scale."""
        return max(least, round(number * self.scale))

    def rng(self, name: str) -> random.Random:
        """Random numbers of a row: they depend on the seed and the row alone."""
        return random.Random(f"{self.seed} {name}")

    def ledger(self, name: str, listener: Callable[[Event], None] = lambda event: None) -> Ledger:
        """A new one in the folder."""
        return Ledger(self.folder / f"{name}.jsonl", listener)

    def mix(self, name: str, *, streams: bool = False) -> Mix:
        """Requests drawn from all cases."""
        return Mix(name, self.seed, self.bodies, streams=streams)

    def make_reference(self, count: int | None = None) -> None:
        """Ask every case once, on a service that nothing happens to. Raises ValueError if even that goes
        wrong."""
        bodies = cases(self.seed, count or self.count(CASES, least=24))
        self.bodies = dict(enumerate(bodies))
        began = time.monotonic()
        with Service() as service:
            self.reference = self.ask_all(service, "reference", self.bodies)
        self.say(f"{len(bodies)} fault-free answers in {time.monotonic() - began:.1f} s")

    def ask_all(
        self, service: Service, name: str, bodies: dict[int, dict[str, object]]
    ) -> dict[int, Answer]:
        """The fault-free answers to these bodies by this service."""
        ledger, several = self.ledger(name), 4
        mixes = [Mix(f"{name}{case}", self.seed, {case: body}) for case, body in bodies.items()]
        queues = [_one_after_the_other(mixes[i::several]) for i in range(several)]
        asyncio.run(run_clients(service.port, ledger, queues))
        ledger.close()
        return answers(ledger.events)


def _one_after_the_other(mixes: Iterable[Mix]):  # type: ignore[no-untyped-def]
    made = [mix.client(0, 1)() for mix in mixes]
    return iter([*made, None]).__next__
