"""Soak: an hour at 70 % of the measured capacity with one random fault a minute, and what it does to
memory and latency. `python -m tools.faults soak --minutes 60` writes docs/soak.md."""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from baton.timeline import REMEMBERED
from tools.faults.battery import CLIENTS, Battery, Result, p50
from tools.faults.check import Census, check
from tools.faults.client import Leave, ask, run_clients
from tools.faults.ledger import Chunk, Event, Ledger, Record, records
from tools.faults.rows_kill import CHUNKED, with_leftovers
from tools.faults.service import Service, memory_mib
from tools.faults.stage import RANDOM, STAGES, Fault, Injector, account, record_recovery
from tools.faults.workload import Mix

SHARE = 0.7  # of the capacity
MEASURE_S = 20.0
FAULT_EVERY_S = 60.0
LOOK_S = 5.0
WARM_UP = 0.2  # of the time: so long a process fills its caches and histories, and is not judged
WARM_REQUESTS = 2 * REMEMBERED
"""Or longer, on a slow machine: until so many requests came. Histories are full after half of them; then
the tables of dictionaries, from which the oldest is deleted each time, grow once more."""
MOST_WARM_UP = 0.6  # of the time; a short soak says how uncertain its slopes are
KILLING = 0.5
"""Of the time with kills. Then faults are pauses and damaged messages: every process lives on, and what
its memory does after the warm-up can be seen."""
LONGEST_PAUSE_S, WARM_PAUSE_S = 4.0, 5.0
"""SIGSTOP until SIGCONT. In the second half of the warm-up, when histories are full, each fault is a
pause, longer than any later one: while requests wait, the heap of whoever keeps them grows, and not all
of its pages can be given back. So the line begins at that high-water mark."""
VICTIMS = ("prefill-0", "decode-0", "router")
MOST_MIB_H = 1.0  # slope of a process's memory, or what the line's own spread explains
MOST_DRIFT = 0.10
MOST_ERROR = 30.0  # MiB an hour; a leak of that size shows, a smaller one needs a longer soak
LEAST_ERROR = 1e-3  # of a line without any spread
MOST_LIKE_THE_LAST = 0.99  # correlation of neighbouring samples
LEAST_THIRD = 100
FLIPS = ("prefill.stamp:damage:3", "decode.token:delay:5:0.5", "prefill.chunk:delay:3:0.5")


@dataclass(slots=True)
class Sample:
    """Memory of the processes at a moment."""

    at: float
    mib: dict[tuple[str, int], float]  # by name and pid: a new process has a new line


@dataclass(slots=True)
class Soak:
    """One soak, while it runs."""

    battery: Battery
    service: Service
    ledger: Ledger
    mix: Mix
    began: float
    warm: float  # the end of the warm-up
    until: float
    samples: list[Sample] = field(default_factory=list)
    left: int = 0

    async def load(self, per_s: float) -> None:
        """Requests come at random moments, so many in a second, whatever became of the others. One of
        twenty clients leaves in the middle."""
        rng, running = self.battery.rng("soak load"), set()
        following = self.mix.client(0, 1 << 60)
        while time.monotonic() < self.until:
            await asyncio.sleep(rng.expovariate(per_s))
            request = following()
            assert request is not None
            leave = None
            if rng.random() < 0.05:
                leave, self.left = (
                    Leave(rng.choice([1, 3, 1000]), rng.uniform(0.01, 1.0)),
                    self.left + 1,
                )
            asking = ask(
                self.service.port, self.ledger, request.id, request.case, request.body, leave=leave
            )
            task = asyncio.create_task(asking)
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def faults(self, injector: Injector) -> int:
        """One a minute, of any kind. How many of the small ones acted; what nobody came to did not."""
        rng, small, paused = self.battery.rng("soak faults"), 0, itertools.cycle(VICTIMS)
        while (wait := time.monotonic() + FAULT_EVERY_S) < self.until:
            armed, now = None, time.monotonic()
            if (self.began + self.warm) / 2 <= now < self.warm:
                pause = Fault((next(paused),), RANDOM, "stop", WARM_PAUSE_S, replaced=False)
                await injector.run([pause])
            elif rng.random() < 0.2:
                armed = self.service.arm(rng.choice(FLIPS))
            else:
                kills = now < self.began + KILLING * (self.until - self.began)
                await injector.run([_any_fault(rng, kills)])
            await asyncio.sleep(max(0.0, wait - time.monotonic()))
            if armed is not None:  # who acts on it removes it
                small += not armed.exists()
                armed.unlink(missing_ok=True)
        return small

    async def watch(self) -> None:
        """Samples of memory."""
        while time.monotonic() < self.until:
            pids = {"main": self.service.main_pid, **self.service.pids()}
            mib = {(name, pid): memory_mib(pid) for name, pid in pids.items()}
            self.samples.append(Sample(time.monotonic(), mib))
            await asyncio.sleep(LOOK_S)


def _any_fault(rng: random.Random, kills: bool) -> Fault:
    """Pauses, and kills if wanted, of workers and router. A dead HTTP server breaks connections, which
    the ledger of a soak has no other word for than lost; F4 kills it."""
    victim = rng.choice([*VICTIMS, "prefill-0", "decode-0"])
    stage = rng.choice([*STAGES, RANDOM])
    if rng.random() < 0.3 or not kills:
        paused_s = rng.uniform(0.5, LONGEST_PAUSE_S)
        return Fault((victim,), stage, "stop", resume_s=paused_s, replaced=False)
    return Fault((victim,), stage)


def capacity(battery: Battery, service: Service) -> float:
    """Requests a second of closed-loop clients."""
    ledger, mix = battery.ledger("soak-capacity"), battery.mix("soak-capacity")
    began = time.monotonic()
    going = lambda: time.monotonic() - began < MEASURE_S  # noqa: E731
    asyncio.run(run_clients(service.port, ledger, mix.clients(2 * CLIENTS, 1, going)))
    ledger.close()
    return len(mix.ids) / (time.monotonic() - began)


def slope_mib_h(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares slope in MiB an hour, and twice its standard error. `points`: seconds, MiB, evenly
    spaced. Memory moves in steps, so a sample is much like the last one: the error counts as many
    samples as an autoregression of order 1 leaves independent."""
    if len(points) < 3:
        return 0.0, float("inf")
    xs, ys = zip(*points, strict=True)
    mean = statistics.fmean(xs)
    spread = sum((x - mean) ** 2 for x in xs)
    slope, intercept = statistics.linear_regression(xs, ys)
    off = [y - slope * x - intercept for x, y in points]
    rest = sum(each * each for each in off)
    same = sum(a * b for a, b in pairwise(off)) / rest if rest else 0.0
    same = min(max(same, 0.0), MOST_LIKE_THE_LAST)
    error = (rest / (len(points) - 2) / spread * (1 + same) / (1 - same)) ** 0.5
    return slope * 3600, 2 * error * 3600


@dataclass(frozen=True, slots=True)
class Slope:
    """Of the memory of all processes of one name."""

    lives: int
    points: int
    mib_h: float
    error: float  # twice the standard error


def memory_slopes(samples: Sequence[Sample], warm_s: float) -> dict[str, Slope]:
    """By name, over all its lives without the first `warm_s` of each. Each life has its own level, so
    each is fitted alone, and the slopes are combined by the inverse of their variance."""
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    born: dict[tuple[str, int], float] = {}
    for sample in samples:
        for key, mib in sample.mib.items():
            if not mib:
                continue
            first = born.setdefault(key, sample.at)
            lines.setdefault(key, [])
            if sample.at >= first + warm_s:
                lines[key].append((sample.at, mib))
    found: dict[str, Slope] = {}
    for name in sorted({name for name, _ in lines}):
        lives = [line for (each, _), line in lines.items() if each == name and len(line) >= 3]
        found[name] = _combined(lives)
    return found


def _combined(lives: Sequence[Sequence[tuple[float, float]]]) -> Slope:
    fits = [slope_mib_h(line) for line in lives]
    points = sum(map(len, lives))
    weights = [1 / max(error, LEAST_ERROR) ** 2 for _, error in fits]
    if not fits or sum(weights) == 0:
        return Slope(len(lives), points, 0.0, float("inf"))
    slope = sum(w * s for w, (s, _) in zip(weights, fits, strict=True)) / sum(weights)
    return Slope(len(lives), points, slope, sum(weights) ** -0.5)


def judge_memory(result: Result, slopes: Mapping[str, Slope]) -> list[str]:
    """The bar on every name's slope, and the lines for the report. A slope that is not known to
    MOST_ERROR is no evidence: a failure, too. `main` is there in every soak."""
    lines = []
    result.require("main" in slopes, f"no memory of the main process was sampled: {sorted(slopes)}")
    for name, slope in slopes.items():
        told = (
            f"{name}: {slope.mib_h:+.2f} ± {slope.error:.2f} MiB an hour, "
            f"{slope.lives} lives that outlived the warm-up, {slope.points} samples"
        )
        lines.append(f"* memory of {told}")
        result.require(slope.mib_h - slope.error < MOST_MIB_H, f"memory grows: {told}")
        result.require(slope.error < MOST_ERROR, f"its memory's slope is not known: {told}")
    return lines


def latencies(
    found: Sequence[Record], quiet: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """When a request was sent and how long its first piece took, for those of no fault's time."""
    return [
        (r.sent[0].at, r.chunks[0].at - r.sent[0].at)
        for r in found
        if r.chunks
        and r.sent[0].body["stream"]
        and all(not a <= r.sent[0].at <= b for a, b in quiet)
    ]


def drift(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The 99th percentiles of the first and the last third, and by how much the second is larger. NaN
    with fewer than LEAST_THIRD points in a third, which have no 99th percentile."""
    ordered = sorted(points)
    third = len(ordered) // 3
    if third < LEAST_THIRD:
        return (float("nan"),) * 3
    first, last = (
        sorted(value for _, value in part)[int(0.99 * third)]
        for part in (ordered[:third], ordered[-third:])
    )
    return first, last, last / first - 1


def run(battery: Battery, minutes: float) -> tuple[Result, list[str]]:
    """The result, and lines for the report."""
    result = Result("L5", f"soak of {minutes:g} minutes, a fault every minute")
    with battery.service(*CHUNKED) as service:
        before = battery.warm(service)
        rate = SHARE * capacity(battery, service)
        battery.say(f"{rate:.1f} requests a second, {SHARE:.0%} of the capacity")
        chunks: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, Chunk):
                chunks.append(event.at)

        began = time.monotonic()
        soak = Soak(
            battery,
            service,
            battery.ledger("soak", listen),
            battery.mix("soak"),
            began,
            warm := began + warm_up_s(minutes, rate),
            began + 60 * minutes,
        )
        injector = Injector(service, battery.rng("soak moments"))

        async def all_of_it() -> int:
            _, small, _ = await asyncio.gather(soak.load(rate), soak.faults(injector), soak.watch())
            return int(small)

        small = asyncio.run(all_of_it())
        soak.ledger.close()
        result.judge(check(soak.ledger.events, battery.reference, soak.mix.ids, accepted=["left"]))
        result.problems += injector.problems
        record_recovery(result, injector.injected, chunks)
        result.injected += small
        _keep(battery, soak.samples)
        account(result, settled(before, soak.samples, warm), service)
    lines = _judge(result, soak, injector, rate, began, minutes)
    return with_leftovers([(result, service)])[0], lines


def warm_up_s(minutes: float, rate: float) -> float:
    """Seconds of each process's life in which its memory is not judged. `rate`: requests a second."""
    seconds = 60 * minutes
    return min(max(WARM_UP * seconds, WARM_REQUESTS / rate), MOST_WARM_UP * seconds)


def settled(before: Census, samples: Sequence[Sample], begin: float) -> Census:
    """A census with the memory that its processes had at `begin`: caches and histories take minutes to
    reach their bounds."""
    later = next((each.mib for each in samples if each.at >= begin), {})
    processes = {
        name: replace(process, memory_mib=later.get((name, process.pid), process.memory_mib))
        for name, process in before.processes.items()
    }
    return replace(before, processes=processes)


def _keep(battery: Battery, samples: Sequence[Sample]) -> None:
    """The curves of memory, for whoever looks for what grows."""
    rows = [
        {"at": each.at, "mib": {f"{name} {pid}": mib for (name, pid), mib in each.mib.items()}}
        for each in samples
    ]
    (battery.folder / "soak-memory.json").write_text(json.dumps(rows))


def _judge(
    result: Result, soak: Soak, injector: Injector, rate: float, began: float, minutes: float
) -> list[str]:
    lines = [
        f"* load: {rate:.1f} requests a second, {SHARE:.0%} of the capacity; {soak.left} clients left"
    ]
    lines += judge_memory(result, memory_slopes(soak.samples, warm_up_s(minutes, rate)))
    disturbed = [(each.at - 1.0, (each.whole_at or each.at) + 5.0) for each in injector.injected]
    found = list(records(soak.ledger.events).values())
    first, last, more = drift(latencies(found, disturbed))
    lines.append(
        f"* first token away from faults, p99: {first * 1e3:.0f} ms in the first third, "
        f"{last * 1e3:.0f} ms in the last: {more:+.0%}"
    )
    result.bar("drift of the first token's p99", more, MOST_DRIFT, "")
    times = [each.whole_at - each.at for each in injector.injected if each.whole_at]
    lines.append(
        f"* whole again after {p50(times):.1f} s (median), {max(times, default=0):.1f} s (most)"
    )
    for each in injector.injected:
        took = f"{each.whole_at - each.at:.1f} s" if each.whole_at else "never"
        lines.append(f"  * minute {(each.at - began) / 60:.0f}: {each.fault}, whole after {took}")
    return lines
