"""Battery: what all rows share: a seed, a scale, the fault-free answers, and the form of a result."""

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tools.faults.check import Answer, Census, Verdict, answers, compare
from tools.faults.client import Request, run_clients
from tools.faults.ledger import Event, Ledger
from tools.faults.service import Service
from tools.faults.workload import SALTED, Mix, cases

CASES = 160
GROWING = 100_000  # the first case of those with short prompts and long answers
CLIENTS, REQUESTS = 8, 100
"""A row's load at scale 1: so many clients with so many requests each."""
POOL_BYTES = 64 << 20
FRAMES = ("--kv-transport", "frames", "--kv-cache-memory-bytes", POOL_BYTES)
"""KV is sent, into a private pool of known size."""
POOL_MIB = POOL_BYTES / 2**20
UNJUDGED = "TIME BAR MISSED, not judged"
WARM = 4  # requests of each client before a census


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
    late: list[str] = field(default_factory=list)  # time bars that were missed; see settle()
    seconds: float = 0.0
    ran: str = ""  # the commit and when, if another call of the battery ran it: see --resume
    in_table: bool = True  # the README's; others stand in docs/faults.md

    @property
    def passed(self) -> bool:
        return not self.problems and not self.late

    def judge(self, verdict: Verdict) -> None:
        """Add what the check of a ledger found."""
        self.requests += verdict.requests
        self.lost += len(verdict.lost)
        self.wrong += len(verdict.wrong)
        self.outcomes += verdict.outcomes
        self.problems += verdict.problems

    def compare(self, before: Census, after: Census, *, pool_mib: float = 0.0) -> None:
        """Add what the service holds that it did not hold before. `pool_mib`: of a private KV pool."""
        self.leaked += after.leased + after.quarantined
        self.problems += compare(before, after, pool_mib=pool_mib)

    def require(self, good: bool, otherwise: str) -> None:
        """A pass line."""
        if not good:
            self.problems.append(otherwise)

    def bar(self, what: str, value: float, most: float, unit: str = "s") -> None:
        """A pass line on a time, or on a ratio of times: the figure is a note, and beyond the bar the row
        fails on a calm machine. No figure at all (NaN) is always a failure."""
        told = f"{what}: {value:.2f} {unit}".rstrip() + f", bar {most:g} {unit}".rstrip()
        self.notes.append(told)
        if math.isnan(value):
            self.problems.append(f"{told}: nothing was measured")
        elif value > most:
            self.late.append(told)

    def settle(self, why_not_calm: str) -> None:
        """Make missed time bars problems, or notes if the machine was not calm: then the row says why."""
        if why_not_calm:
            self.notes += [f"{UNJUDGED} ({why_not_calm}): {each}" for each in self.late]
        else:
            self.problems += [f"too slow: {each}" for each in self.late]
        self.late = []


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
    lenient: bool = False  # times beyond their bar are notes
    idle_s: float = 20.0  # of L7
    bodies: dict[int, dict[str, object]] = field(default_factory=dict)
    growing: dict[int, dict[str, object]] = field(default_factory=dict)
    reference: dict[int, Answer] = field(default_factory=dict)
    _shared: Service | None = field(init=False, default=None)

    def count(self, number: float, *, least: int = 1) -> int:
        """So many at this scale."""
        return max(least, round(number * self.scale))

    @property
    def kept(self) -> Path:
        """Where services leave their logs."""
        return self.folder / "logs"

    def service(self, *options: object) -> Service:
        """A new service; its logs are kept."""
        return Service(*options, keep=self.kept)

    @contextmanager
    def shared(self) -> Iterator[Service]:
        """A service without options, which stays for the next row that hurts no process either. Starts
        take a good part of the battery's time."""
        if self._shared is None:
            self._shared = self.service().__enter__()
        try:
            yield self._shared
        except BaseException:
            self.end_shared()
            raise

    def end_shared(self) -> list[str]:
        """End it, if there is one; what it left behind."""
        service, self._shared = self._shared, None
        if service is None:
            return []
        service.stop()
        return service.leftovers

    def rng(self, name: str) -> random.Random:
        """Random numbers of a row: they depend on the seed and the row alone."""
        return random.Random(f"{self.seed} {name}")

    def ledger(self, name: str, listener: Callable[[Event], None] = lambda event: None) -> Ledger:
        """A new one in the folder."""
        return Ledger(self.folder / f"{name}.jsonl", listener)

    def mix(self, name: str, *, salted: float = SALTED) -> Mix:
        """Requests drawn from all cases."""
        return Mix(name, self.seed, self.bodies, salted=salted)

    def make_reference(self, count: int | None = None, *, service: Service | None = None) -> None:
        """Ask every case once, on a service that nothing happens to: a new one, or this one before its
        first fault. Raises ValueError if even that goes wrong."""
        number = count or self.count(CASES, least=24)
        self.bodies = dict(enumerate(cases(self.seed, number)))
        growing = cases(self.seed, number // 4, prompt=(8, 32), answer=(150, 300))
        self.growing = {GROWING + i: body for i, body in enumerate(growing)}
        began = time.monotonic()
        with nullcontext(service) if service else self.service() as calm:
            self.reference = self.ask_all(calm, "reference", self.bodies | self.growing)
        self.say(f"{len(self.reference)} fault-free answers in {time.monotonic() - began:.1f} s")

    def warm(self, service: Service) -> Census:
        """Let every process do what it does, so that its memory has its usual size; then its census."""
        ledger, mix = self.ledger("warm"), Mix("warm", self.seed, self.bodies)
        asyncio.run(run_clients(service.port, ledger, mix.clients(CLIENTS, WARM)))
        ledger.close()
        return service.census()

    def ask_all(
        self, service: Service, name: str, bodies: dict[int, dict[str, object]]
    ) -> dict[int, Answer]:
        """The fault-free answers to these bodies by this service."""
        ledger = self.ledger(name)
        waiting = iter([Request(f"{name}-{case}", case, body) for case, body in bodies.items()])
        asyncio.run(run_clients(service.port, ledger, [lambda: next(waiting, None)] * 4))
        ledger.close()
        return answers(ledger.events)
