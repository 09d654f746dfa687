"""L1, L2, L4, L7: many at once, a burst, long prompts before short ones, and nothing for a while."""

import asyncio
import math
import os
import signal
import time
from collections.abc import Sequence

from tools.faults.battery import Battery, Result, p50
from tools.faults.check import check
from tools.faults.client import ask, run_clients
from tools.faults.ledger import End, Event, records
from tools.faults.rows_kill import with_leftovers
from tools.faults.workload import Mix, cases

QUEUE = 256
REFUSED_S = 0.1  # the median 503 of a single request while the queue is full, RELIABILITY L2
BURST_S = 1.0  # ... of 1,000 that come at once, on cores that their clients share
FULL = 1000  # requests of a burst at scale 1
PROBES, PROBE_S, QUIET_S = 20, 0.05, 0.15
HEAD_OF_LINE = 3.0
LONG_TOKENS = 2290


def l1(battery: Battery) -> list[Result]:
    """64 streams at a time."""
    result = Result("L1", "no fault: 64 clients at once", in_table=False)
    with battery.shared() as service:
        before = battery.warm(service)
        ledger, mix = battery.ledger("L1"), battery.mix("L1")
        began = time.monotonic()
        asyncio.run(run_clients(service.port, ledger, mix.clients(64, battery.count(31, least=2))))
        ledger.close()
        result.judge(check(ledger.events, battery.reference, mix.ids))
        result.notes.append(_figures(ledger.events, time.monotonic() - began))
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


def _figures(events: list[Event], took: float) -> str:
    found = records(events).values()
    tokens = sum(r.ends[0].tokens or 0 for r in found if r.ends)
    first = sorted(
        r.chunks[0].at - r.sent[0].at for r in found if r.chunks and r.sent[0].body["stream"]
    )
    middle, late = (first[int(share * len(first))] for share in (0.5, 0.99))
    return f"{tokens / took:.0f} tokens/s, first token p50 {middle:.2f} s, p99 {late:.2f} s"


def l2(battery: Battery) -> list[Result]:
    """1,000 requests at once: as many as the queue holds are accepted, the others refused at once. Then
    clients that ask again all get their answer."""
    result = Result("L2", "no fault: a burst of 1,000 requests", in_table=False)
    number = battery.count(FULL, least=50)
    queue = min(QUEUE, number // 4)
    with battery.service("--max-num-queued-reqs", queue) as service:
        before = battery.warm(service)
        ledger, mix = battery.ledger("L2"), battery.mix("L2")
        probing = mix.client(number, PROBES)
        filling = [mix.client(number + 1 + each, 1) for each in range(queue)]

        async def burst() -> None:
            waiting = run_clients(service.port, ledger, mix.clients(number, 1))
            tasks: list[asyncio.Task[object]] = [asyncio.create_task(waiting)]
            await _all_refused(ledger.events, tasks[0])
            decode = service.pids()["decode-0"]
            os.kill(decode, signal.SIGSTOP)  # a queue that is full stays full
            try:
                filled = run_clients(service.port, ledger, filling)
                tasks.append(asyncio.create_task(filled))
                await _all_refused(ledger.events, tasks[-1])
                await probes(tasks)
            finally:
                os.kill(decode, signal.SIGCONT)
            await asyncio.gather(*tasks)

        async def probes(tasks: list[asyncio.Task[object]]) -> None:
            while (request := probing()) is not None:
                probe = ask(service.port, ledger, request.id, request.case, request.body)
                tasks.append(asyncio.create_task(probe))
                await asyncio.sleep(PROBE_S)

        asyncio.run(burst())
        ledger.close()
        verdict = check(ledger.events, battery.reference, mix.ids, accepted=["error overloaded"])
        result.judge(verdict)
        judge_refused(result, ledger.events, number, f"L2-{number}-")
        again, patient = battery.ledger("L2-again"), battery.mix("L2-again")
        last = asyncio.run(
            run_clients(
                service.port, again, patient.clients(number // 4, 1), again=["error"], tries=30
            )
        )
        again.close()
        lost = [id for id, how in last.items() if how != "done"]
        result.lost += len(lost)
        result.require(not lost, f"never answered, however often asked: {lost[:5]}")
        retried = check(again.events, battery.reference, patient.ids, accepted=["error overloaded"])
        result.judge(retried)
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


async def _all_refused(events: Sequence[Event], burst: asyncio.Task[object]) -> None:
    """The server has come to the end of a burst: the last 503 is a while ago."""
    looked, last = len(events), math.inf
    while not burst.done() and time.monotonic() - last < QUIET_S:
        await asyncio.sleep(0.02)
        new, looked = events[looked:], len(events)
        if any(isinstance(each, End) and each.status == 503 for each in new):
            last = time.monotonic()


def judge_refused(result: Result, events: Sequence[Event], number: int, probes: str) -> None:
    """The 503s of a burst of so many requests, and of the single requests after it, whose ids begin with
    `probes`: enough of them, each with Retry-After, quickly."""
    refused = [
        record
        for record in records(events).values()
        if record.ends and record.ends[0].status == 503
    ]
    result.require(len(refused) > number / 8, f"{len(refused)} of {number} were refused")
    mute = [record.id for record in refused if not record.ends[0].retry_after]
    result.require(not mute, f"{len(mute)} answers 503 have no Retry-After: {mute[:3]}")
    times = [record.ends[0].at - record.sent[0].at for record in refused]
    result.bar(f"{len(times)} refused, p50", p50(times), BURST_S)
    single = [r.ends[0].at - r.sent[0].at for r in refused if r.id.startswith(probes)]
    if single or number >= FULL:
        told = f"{len(single)} of them alone while the queue is full, p50"
        result.bar(told, p50(single), REFUSED_S)
    else:
        result.notes.append("NOT MEASURED: so small a queue was empty before a single request came")
    result.notes.append(f"the slowest 503 after {max(times, default=0.0):.2f} s")


def l4(battery: Battery) -> list[Result]:
    """Short prompts beside one of the greatest length, and alone."""
    result = Result(
        "L4", "no fault: one prompt of 2,290 tokens before 50 short ones", in_table=False
    )
    shorts = dict(
        enumerate(cases(battery.seed + 4, 25, prompt=(8, 16), answer=(16, 16), sampled=False))
    )
    for body in shorts.values():
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    long = cases(
        battery.seed + 5, 1, prompt=(LONG_TOKENS, LONG_TOKENS), answer=(8, 8), sampled=False
    )[0]
    with battery.shared() as service:
        known = battery.ask_all(service, "L4-reference", {**shorts, 99: long})
        firsts: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(4):
            beside = turn % 2 == 1
            ledger, mix = (
                battery.ledger(f"L4-{turn}"),
                Mix(f"L4-{turn}", battery.seed, shorts, salted=1),
            )

            async def both(beside: bool = beside, ledger=ledger, mix=mix, turn=turn) -> None:  # type: ignore[no-untyped-def]
                body = {**long, "cache_salt": f"L4-{turn}"}
                first = [ask(service.port, ledger, f"long-{turn}", 99, body)] if beside else []
                waiting = [asyncio.create_task(each) for each in first]
                await asyncio.sleep(0.02)
                await run_clients(service.port, ledger, mix.clients(25, 1))
                for task in waiting:
                    await task

            asyncio.run(both())
            ledger.close()
            result.judge(check(ledger.events, known, mix.ids))
            firsts[beside] += [
                r.chunks[0].at - r.sent[0].at
                for r in records(ledger.events).values()
                if r.chunks and not r.id.startswith("long")
            ]
        alone, late = (
            sorted(firsts[each])[int(0.99 * len(firsts[each]))] for each in (False, True)
        )
        result.notes.append(
            f"p99 of the short ones' first token: {late * 1e3:.0f} ms beside the long one, "
            f"{alone * 1e3:.0f} ms alone"
        )
        result.bar("that, to that alone", late / alone, HEAD_OF_LINE, "")
    return with_leftovers([(result, service)])


def l7(battery: Battery) -> list[Result]:
    """Nothing happens for a while; then requests find everything as it was."""
    idle_s = battery.idle_s
    result = Result("L7", f"no fault: {idle_s:g} s idle, then 50 requests", in_table=False)
    with battery.shared() as service:
        before = battery.warm(service)
        time.sleep(idle_s)
        ledger, mix = battery.ledger("L7"), battery.mix("L7")
        asyncio.run(run_clients(service.port, ledger, mix.clients(5, 10)))
        ledger.close()
        result.judge(check(ledger.events, battery.reference, mix.ids))
        result.compare(before, service.census())
    return with_leftovers([(result, service)])
