"""F20, F22: workers that come and go under load, and links between processes that misbehave."""

import asyncio
import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from tools.faults.battery import Battery, Result
from tools.faults.beside import beside
from tools.faults.by_hand import ByHand
from tools.faults.check import outcome
from tools.faults.ledger import Chunk, Event, records
from tools.faults.proxy import Faults, Proxy
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import Service, free_port
from tools.faults.stage import Fault, Injected, longest_gap, record_recovery

GAP_S = 1.0
STEP_S = 3.0
ROUNDS = 3
STOPPED = ("error not_ready", "error shutting_down", "unanswered")
ON_ITS_WAY_S = 0.5  # a connection may wait so long to be accepted; the end of the listener cuts it
LINK_FAULTS: Sequence[tuple[str, Faults]] = (
    ("200 ms delay", Faults(delay_s=0.2)),
    ("64 KB/s", Faults(bytes_per_s=64_000)),
    ("1 % of chunks with a flipped bit", Faults(flip=0.01)),
    ("half-open: nothing passes", Faults(silent=True)),
    ("cut", Faults()),
    ("half-closed", Faults()),
)


def f20(battery: Battery) -> list[Result]:
    """A second worker of each role joins and leaves under load; then the service itself is stopped."""
    return [*_come_and_go(battery), *_stopped(battery)]


def _come_and_go(battery: Battery) -> list[Result]:
    result = Result("F20-drain", "a second worker of each role joins, and leaves by SIGTERM")
    names = ("decode-1", "prefill-1", "decode-0", "prefill-0")
    with ByHand({"prefill-0": (), "decode-0": ()}, keep=battery.kept) as service:
        before = battery.warm(service)
        codes: list[int] = []

        async def come_and_go() -> None:
            for turn in range(battery.count(ROUNDS)):
                mine = names[:2] if turn % 2 == 0 else names[2:]  # each of both leaves in turns
                others = names[2:] if turn % 2 == 0 else names[:2]
                service.expected = {"prefill": 2, "decode": 2}
                for name in mine:
                    service.join(name)
                await _until_whole(service)
                for name in others:
                    service.expected[name.partition("-")[0]] = 1
                    codes.append(await asyncio.to_thread(service.leave, name))
                    result.injected += 1
                    await _until_whole(service)

        gap = longest_gap(beside(battery, service, result, come_and_go))
        result.bar("longest wait of a stream for its first or next token", gap, GAP_S)
        result.require(not any(codes), f"exit codes of the workers that left: {codes}")
        after = battery.warm(service)
        result.compare(replace(before, processes=after.processes), after)  # others are there now
    return with_leftovers([(result, service)])


async def _until_whole(service: Service, within_s: float = 90.0) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not service.whole(await service.state()):
            await asyncio.sleep(0.05)


def _stopped(battery: Battery) -> list[Result]:
    """SIGTERM: what runs ends well, what is new is refused; a second SIGTERM: everything ends now."""
    return [
        *_sigterm(battery, "F20-stop", "SIGTERM of the service under load", 1, (0,), 35.0, STOPPED),
        *_sigterm(
            battery, "F20-now", "SIGTERM twice under load", 2, (0, 130), 8.0, (*STOPPED, "broken")
        ),
    ]


def _sigterm(
    battery: Battery,
    row: str,
    fault: str,
    times: int,
    codes: Collection[int],
    limit_s: float,
    accepted: Collection[str],
) -> list[Result]:
    result = Result(row, fault, injected=1, in_table=False)
    began = 0.0
    with battery.service() as service:

        async def stop() -> None:
            nonlocal began
            await asyncio.sleep(1.0)
            began = time.monotonic()
            for _ in range(times):
                os.kill(service.main_pid, signal.SIGTERM)
                await asyncio.sleep(0.3)
            while service.exit_code is None and time.monotonic() < began + limit_s:
                await asyncio.sleep(0.02)
            told = f"exit code {service.exit_code} after {time.monotonic() - began:.1f} s"
            result.notes.append(told)
            result.require(service.exit_code in codes, told)

        events = beside(battery, service, result, stop, accepted=accepted)
        if times == 1:
            judge_stop(result, events, began)
        result.require("Traceback" not in service.said, "a traceback in the log")
    return with_leftovers([(result, service)])


def judge_stop(result: Result, events: Sequence[Event], at: float) -> None:
    """One SIGTERM at `at` cuts nothing silently: a request without an answer was sent after it, or so
    shortly before that the server may not have accepted its connection."""
    cut = [
        f"{record.id}: {became}, sent {at - record.sent[0].at:.1f} s before"
        for record in records(events).values()
        if (became := outcome(record)) in ("broken", "unanswered")
        and (became == "broken" or record.sent[0].at < at - ON_ITS_WAY_S)
    ]
    result.require(not cut, f"{len(cut)} requests were cut silently: {'; '.join(cut[:5])}")


def f22(battery: Battery) -> list[Result]:
    """Router and workers over tcp with keys, each worker behind a proxy that misbehaves in turns."""
    result = Result("F22", "links to the router delayed, throttled, flipped, silent, cut")
    router = free_port()
    with (
        Proxy(router, seed=battery.seed) as proxy,
        ByHand(
            {"prefill-0": (), "decode-0": ("--kv-host", "127.0.0.1")},
            address=f"tcp://127.0.0.1:{router}",
            worker_address=f"tcp://127.0.0.1:{proxy.port}",
            keys=True,
            keep=battery.kept,
        ) as service,
    ):
        before = battery.warm(service)
        injected: list[Injected] = []

        async def misbehave() -> None:
            for name, faults in LINK_FAULTS:
                for _ in range(battery.count(2)):
                    at = time.monotonic()
                    proxy.faults = faults
                    if name in ("cut", "half-closed"):
                        await asyncio.to_thread(proxy.cut, half=name == "half-closed")
                    await asyncio.sleep(STEP_S)
                    proxy.faults = Faults()
                    await _until_whole(service)
                    injected.append(Injected(Fault(("link",), name), at, {}, time.monotonic()))

        events = beside(battery, service, result, misbehave)
        chunks = [event.at for event in events if isinstance(event, Chunk)]
        record_recovery(result, injected, chunks)
        result.notes.append(f"{proxy.flipped} bits flipped, {proxy.cuts} connections cut")
        result.require(proxy.flipped > 0 and proxy.cuts > 0, "nothing was flipped, or nothing cut")
        result.compare(before, service.census())
    return with_leftovers([(result, service)])
