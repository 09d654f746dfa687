"""F7, F9, F16: KV that arrives damaged, a pool in which everybody is preempted, logits that are NaN."""

import asyncio
import time
from collections.abc import Callable, Sequence

from tools.faults.battery import CLIENTS, FRAMES, POOL_MIB, REQUESTS, Battery, Result
from tools.faults.check import check
from tools.faults.client import run_clients
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import Service
from tools.faults.stage import longest_gap
from tools.faults.workload import Mix

BLOCK_BYTES = 131_080  # of the bundled model in float32, with its stamp
NAN_ROUNDS = 20
COUNTS_S = 5.0


def f7(battery: Battery) -> list[Result]:
    """1,000 damaged transfers: stamps in shared memory, and bytes of frames."""
    stamps = _damaged(battery, "F7-stamps", "a bit flipped in the stamp of a filled block",
                      "prefill.stamp", 3, 300, ())  # fmt: skip
    frames = _damaged(battery, "F7-frames", "a bit of KV flipped on its way (frames)",
                      "prefill.payload", 9, 700, FRAMES)  # fmt: skip
    return [*stamps, *frames]


def _damaged(
    battery: Battery,
    row: str,
    fault: str,
    site: str,
    every: int,
    number: int,
    options: Sequence[object],
) -> list[Result]:
    result, wanted = Result(row, fault), battery.count(number, least=10)
    point = f"{site}:damage:%{every}"
    with battery.service(*options) as service:
        before = battery.warm(service)
        service.arm(point)
        _load(battery, service, result, more=lambda: len(service.fired()) < wanted)
        service.disarm(point)
        result.injected = len(service.fired())
        after = service.census()
        refilled = _counted(service, result.injected)
        result.notes.append(f"{refilled:g} fills refused")
        result.require(result.injected >= wanted, f"{result.injected} of {wanted} flips happened")
        least, most = (result.injected,) * 2 if not options else (1, result.injected)
        result.require(
            least <= refilled <= most, f"{result.injected} flips, but {refilled:g} fills refused"
        )
        result.compare(before, after, pool_mib=POOL_MIB if options else 0.0)
    return with_leftovers([(result, service)])


def _counted(service: Service, wanted: int) -> float:
    """Fills that were refused. The server has the router's counts once a second."""
    deadline = time.monotonic() + COUNTS_S
    while (found := service.metric("kv_transfer_failures")) < wanted:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return found


def f9(battery: Battery) -> list[Result]:
    """Everybody is preempted: 24 clients in a pool that holds two or three of them."""
    result = Result("F9", "KV pool too small for what runs: everybody is preempted")
    longest = 24  # blocks; the longest case takes 21, and begins with 2
    options = ("--kv-cache-memory-bytes", longest * BLOCK_BYTES, "--max-model-len", 640)
    with battery.service(*options) as service:
        before = battery.warm(service)
        mix = Mix("F9", battery.seed, battery.growing)
        _load(battery, service, result, clients=24, each=16, mix=mix)
        result.injected = int(service.metric("num_preemptions"))
        result.require(
            result.injected >= result.requests,
            f"{result.injected} preemptions among {result.requests} requests: the pool is too large",
        )
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


def f16(battery: Battery) -> list[Result]:
    """NaN in one row of a batch: that request fails by name, its neighbours do not notice."""
    result = Result("F16", "NaN in the KV of one row of a batch")
    rounds = battery.count(NAN_ROUNDS, least=2)
    rng = battery.rng("F16")
    with battery.shared() as service:
        before = battery.warm(service)
        ledger, mix = battery.ledger("F16"), battery.mix("F16", salted=1.0)
        going = True

        async def poison() -> None:
            nonlocal going
            for number in range(1, rounds + 1):
                service.arm(f"decode.kv:nan:{rng.randint(20, 200)}")
                while len(service.fired()) < number:
                    await asyncio.sleep(0.02)
            going = False

        async def both() -> None:
            poisoning = asyncio.create_task(asyncio.wait_for(poison(), 120))
            await run_clients(service.port, ledger, mix.clients(8, 4, lambda: going))
            await poisoning

        asyncio.run(both())
        ledger.close()
        verdict = check(
            ledger.events, battery.reference, mix.ids, accepted=["error numerical_error"]
        )
        result.judge(verdict)
        result.injected = len(service.fired())
        failed = verdict.outcomes["error numerical_error"]
        result.require(
            failed == result.injected, f"{result.injected} rows were NaN, {failed} requests said so"
        )
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


def _load(
    battery: Battery,
    service: Service,
    result: Result,
    *,
    clients: int = CLIENTS,
    each: int = REQUESTS,
    more: Callable[[], bool] = lambda: False,
    mix: Mix | None = None,
) -> None:
    """Clients without a plan of faults, judged into `result`."""
    ledger, mix = battery.ledger(result.row), mix or battery.mix(result.row)
    requests = mix.clients(clients, battery.count(each, least=3), more)
    asyncio.run(run_clients(service.port, ledger, requests))
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids))
    result.notes.append(f"longest wait of a stream for a token {longest_gap(ledger.events):.1f} s")
