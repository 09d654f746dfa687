"""Stage: faults under load. Where a request stands when a process is hit is chosen, not left to chance.

A stage is a failpoint in the process that a request passes there. If that process is the victim, it hits
itself; if it is another one, it holds still for HELD_S, and the victim is signalled meanwhile. Between
stages, victims are also hit at random moments.
"""

import asyncio
import os
import random
import signal
import time
from bisect import bisect_right
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from tools.faults.battery import CLIENTS, REQUESTS, Battery, Result, p50
from tools.faults.check import Census, check
from tools.faults.client import run_clients
from tools.faults.ledger import Chunk, Event, Ledger, records
from tools.faults.service import Service
from tools.faults.workload import Mix

STAGES = {  # stage of a request: the failpoint, and the process that comes to it
    "queue": ("received.Submit", "router"),
    "reserve": ("received.Reserve", "decode-0"),
    "prefill": ("prefill.chunk", "prefill-0"),
    "mid-push": ("prefill.computed", "prefill-0"),
    "before Filled": ("sending.Filled", "prefill-0"),
    "first token": ("decode.first_token", "decode-0"),
    "mid-stream": ("decode.token", "decode-0"),
    "last token": ("decode.last_token", "decode-0"),
}
SERVER_STAGES = {  # where the HTTP server comes by itself: for what only the victim can do
    "accepted": ("server.accepted", "server"),
    "chunk": ("server.chunk", "server"),
}
RANDOM = "a random moment"
LATEST_HIT = {
    "decode.token": 200
}  # which hit of a site acts is random; of others within the first 10
HELD_S = 0.3
REACHED_S = 120.0  # a stage that nobody comes to for so long was not hit
WHOLE_S = 240.0
RECOVERED_S = 5.0  # with the tiny model, RELIABILITY F1; from the kill, or from SIGCONT
WORKED_S = 3.1  # a process that has worked for 3 s is in no crash loop: F6 has those
LOOK_S = 0.005
STATE_S = 0.03


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `resume_s`: SIGSTOP, and SIGCONT after so long; None: the victim does not come back by
    itself. `replaced`: another process takes its place."""

    victims: tuple[str, ...]
    stage: str
    action: str = "kill"  # or stop, wedge
    resume_s: float | None = None
    replaced: bool = True
    site: str = ""  # instead of the stage's own

    def __str__(self) -> str:
        return f"{self.action} {' and '.join(self.victims)}: {self.stage}"


@dataclass(slots=True)
class Injected:
    """A fault that happened."""

    fault: Fault
    at: float  # monotonic seconds
    pids: dict[str, int]
    whole_at: float | None = None  # everything was as before


def each_stage(
    victims: Sequence[str],
    times: int,
    rng: random.Random,
    *,
    action: str = "kill",
    resume_s: float | None = None,
    replaced: bool = True,
    stages: Collection[str] = (*STAGES, RANDOM),
) -> list[Fault]:
    """Every stage so many times, in random order."""
    faults = [
        Fault((victim,), stage, action, resume_s, replaced)
        for victim in victims
        for stage in stages
        for _ in range(times)
    ]
    rng.shuffle(faults)
    return faults


class Injector:
    """Injects faults into one service, and watches it recover."""

    def __init__(self, service: Service, rng: random.Random) -> None:
        self._service = service
        self._rng = rng
        self.injected: list[Injected] = []
        self.problems: list[str] = []

    async def run(self, faults: Sequence[Fault]) -> None:
        """One after the other, each once the service is whole again."""
        for fault in faults:
            if self._service.exit_code is not None:
                self.problems.append(
                    f"the service ended with {self._service.exit_code}: "
                    f"{self._service.said[-300:].strip()}"
                )
                return
            before = self._service.pids()
            injected = await self._inject(fault)
            if injected is None:
                self.problems.append(f"{fault}: no request came to this stage in {REACHED_S:g} s")
                continue
            self.injected.append(injected)
            if missed := [each for each in fault.victims if each not in injected.pids]:
                self.problems.append(f"{fault}: {' and '.join(missed)} did not run, so was not hit")
            if not await self._recovered(injected, before):
                return
            least = WORKED_S if fault.replaced else 0.1
            await asyncio.sleep(self._rng.uniform(least, least + 0.5))

    async def _inject(self, fault: Fault) -> Injected | None:
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(fault.action)
        if fault.stage == RANDOM:
            await asyncio.sleep(self._rng.uniform(0.05, 1.0))
            assert number is not None, f"{fault.action} happens at a stage"
            return self._signal(fault, number)
        site, owner = (STAGES | SERVER_STAGES)[fault.stage]
        site = fault.site or site
        itself = owner in fault.victims
        nth = self._rng.randint(1, LATEST_HIT.get(site, 10))
        doing = f"{fault.action}:{nth}" if itself else f"delay:{nth}:{HELD_S:g}"
        seen = len(self._service.fired())
        self._service.arm(f"{site}:{doing}")
        deadline = time.monotonic() + REACHED_S
        while len(fired := self._service.fired()) == seen:
            if time.monotonic() >= deadline:
                self._service.disarm(f"{site}:{doing}")
                return None
            await asyncio.sleep(LOOK_S)
        if not itself:
            assert number is not None, f"{fault.action} is done by the victim itself"
            return self._signal(fault, number)
        others = Fault(tuple(v for v in fault.victims if v != owner), fault.stage)
        also = self._signal(others, number).pids if number is not None else {}
        return Injected(fault, fired[seen].at, {owner: fired[seen].pid, **also})

    def _signal(self, fault: Fault, number: signal.Signals) -> Injected:
        now = time.monotonic()
        hit = {victim: self._service.signal(victim, number) for victim in fault.victims}
        return Injected(fault, now, {v: pid for v, pid in hit.items() if pid is not None})

    async def _recovered(self, injected: Injected, before: dict[str, int]) -> bool:
        """Wait until the service is whole, with new processes in the places of dead ones."""
        fault = injected.fault
        if fault.resume_s is not None:
            await asyncio.sleep(max(0.0, injected.at + fault.resume_s - time.monotonic()))
            for pid in injected.pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + WHOLE_S
        while time.monotonic() < deadline and self._service.exit_code is None:
            pids = self._service.pids()
            replaced = all(pids.get(v, p) != p for v, p in injected.pids.items())
            there = set(pids) >= set(before)
            ours = there and (replaced or not fault.replaced)
            if ours and self._service.whole(await self._service.state()):
                injected.whole_at = time.monotonic()
                return True
            await asyncio.sleep(STATE_S)
        self.problems.append(
            f"{fault}: not whole again after {WHOLE_S:g} s, exit code {self._service.exit_code}: "
            f"{await self._service.state()} {self._service.said[-400:].strip()}"
        )
        return False


@dataclass(slots=True)
class Load:
    """How the load of a row differs from 8 clients with 100 requests."""

    clients: int = CLIENTS
    each: int = REQUESTS
    again: Sequence[str] = ()
    tries: int = 1
    accepted: Collection[str] = ()
    deadline_s: float = 120.0
    pool_mib: float = 0.0  # of a private KV pool
    whole_s: float = RECOVERED_S  # bar of the median time until everything is as before


def under_load(
    battery: Battery,
    service: Service,
    result: Result,
    faults: Sequence[Fault],
    load: Load | None = None,
) -> list[Injected]:
    """Run clients, inject the faults, and judge everything into `result`. The clients send their number
    of requests, and then go on until the last fault is over."""
    load = load or Load()
    chunks: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Chunk):
            chunks.append(event.at)

    ledger = battery.ledger(result.row, listen)
    mix = battery.mix(result.row)
    injector = Injector(service, battery.rng(f"{result.row} faults"))
    before = battery.warm(service)
    last = asyncio.run(
        _both(service, load, battery.count(load.each, least=3), mix, ledger, injector, faults)
    )
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids, accepted=load.accepted))
    if load.again:
        unanswered = [id for id, how in last.items() if how != "done"]
        result.lost += len(unanswered)
        result.require(not unanswered, f"never answered, however often asked: {unanswered[:5]}")
    result.problems += injector.problems
    record_recovery(result, injector.injected, chunks)
    result.require(len(injector.injected) == len(faults), f"{len(faults)} faults were planned")
    longest = longest_gap(ledger.events)
    result.notes.append(f"longest wait of a stream for its first or next token {longest:.1f} s")
    judge_recovery(result, injector.injected, load.whole_s)
    account(result, before, service, pool_mib=load.pool_mib)
    return injector.injected


async def _both(
    service: Service,
    load: Load,
    each: int,
    mix: Mix,
    ledger: Ledger,
    injector: Injector,
    faults: Sequence[Fault],
) -> dict[str, str]:
    """Clients and faults at the same time, from the first chunk on."""
    going = True

    async def inject() -> None:
        nonlocal going
        try:
            while not any(isinstance(event, Chunk) for event in ledger.events[-50:]):
                await asyncio.sleep(LOOK_S)
            await injector.run(faults)
        finally:
            going = False

    requests = mix.clients(load.clients, each, lambda: going)
    injecting = asyncio.create_task(inject())
    last = await run_clients(
        service.port, ledger, requests,
        again=load.again, tries=load.tries, deadline_s=load.deadline_s,
    )  # fmt: skip
    await injecting
    return last


def record_recovery(result: Result, injected: Sequence[Injected], chunks: Sequence[float]) -> None:
    """The times to the next token and to the whole service. What was on its way when the fault came is
    no recovery: the time to the next token is the longest silence until the service was whole."""
    for each in injected:
        result.injected += 1
        if each.whole_at is None:
            continue
        result.whole_s.append(each.whole_at - each.at)
        result.token_s.append(silence(chunks, each.at, each.whole_at))


def judge_recovery(result: Result, injected: Sequence[Injected], most_s: float) -> None:
    """The bar on the median recovery. A process that hangs for good is given up after its patience, which
    is no recovery: those faults are left out."""
    times = [
        each.whole_at - each.at - (each.fault.resume_s or 0.0)
        for each in injected
        if each.whole_at is not None
        and (each.fault.action == "kill" or each.fault.resume_s is not None)
    ]
    if times:
        result.bar(f"whole again, p50 of {len(times)}", p50(times), most_s)
    elif any(each.fault.action == "kill" for each in injected):
        result.problems.append("not whole again after any kill")


def account(result: Result, before: Census, service: Service, *, pool_mib: float = 0.0) -> None:
    """The census afterwards, judged. A service that has ended cannot be counted: that is a failure."""
    if (code := service.exit_code) is not None:
        result.problems.append(f"no census: the service ended with {code}")
        return
    result.compare(before, service.census(), pool_mib=pool_mib)


def silence(chunks: Sequence[float], begin: float, end: float) -> float:
    """The longest time without a chunk of any stream that began between `begin` and `end`. `chunks`:
    their times, rising."""
    first = bisect_right(chunks, begin)
    marks = [begin, *chunks[first : bisect_right(chunks, end) + 1]]
    if marks[-1] < end:
        marks.append(end)
    return max((b - a for a, b in pairwise(marks)), default=0.0)


def longest_gap(events: Sequence[Event]) -> float:
    """The longest time that a stream waited for its first or next piece; NaN if there was none. An answer
    that is not streamed is one piece, which takes as long as all its tokens."""
    waits: list[float] = []
    for record in records(events).values():
        if any(each.body.get("stream") for each in record.sent):
            times = [*(s.at for s in record.sent), *(c.at for c in record.chunks)]
            waits += [b - a for a, b in pairwise(times)]
    return max(waits, default=float("nan"))
