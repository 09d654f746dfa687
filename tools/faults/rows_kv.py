"""F7, F9, F16, F17: KV that arrives damaged, a pool in which everybody is preempted, logits that are NaN,
memory that runs out."""

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.faults.battery import CLIENTS, FRAMES, POOL_MIB, REQUESTS, Battery, Result
from tools.faults.check import check
from tools.faults.client import run_clients
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import ROOT, Service
from tools.faults.stage import longest_gap
from tools.faults.workload import Mix

BLOCK_BYTES = 131_080  # of the bundled model in float32, with its stamp
NAN_ROUNDS = 20
COUNTS_S = 5.0
OOM_FORWARDS = 100
SQUEEZES = 3
BIG, START_BYTES = "random:qwen2-7b", 3 << 30


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


def f17(battery: Battery) -> list[Result]:
    """Memory that runs out: within forwards, by a failpoint; of whole processes, whose address space is
    limited to what they have; and of a start."""
    return [*_forwards(battery), *_squeezed(battery), _start_without_memory(battery)]


def _forwards(battery: Battery) -> list[Result]:
    """Nothing is lost, and nobody dies: less is computed at a time."""
    result = Result("F17-forwards", "memory runs out within a forward, prefill and decode")
    wanted = battery.count(OOM_FORWARDS, least=10)
    points = ("prefill.forward:oom:%7", "decode.forward:oom:%50")
    with battery.service() as service:
        before, pids = battery.warm(service), service.pids()
        for point in points:
            service.arm(point)
        sites = ("prefill.forward", "decode.forward")
        more = lambda: any(_acted(service, site) < wanted for site in sites)  # noqa: E731
        _load(battery, service, result, more=more)
        for point in points:
            service.disarm(point)
        result.injected = len(service.fired())
        result.require(service.pids() == pids, f"somebody died: {pids} are {service.pids()} now")
        for site in sites:
            result.require(_acted(service, site) >= wanted, f"{_acted(service, site)} at {site}")
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


def _acted(service: Service, site: str) -> int:
    return sum(each.site == site for each in service.fired())


def _squeezed(battery: Battery) -> list[Result]:
    """Workers may have no more memory than at their start, when prompts come. Whoever dies of it is
    replaced, and its requests go on elsewhere."""
    result = Result("F17-limit", "workers may have no more memory than at their start")
    deaths = ran_out = 0
    leftovers: list[str] = []
    for _ in range(battery.count(SQUEEZES, least=1)):
        with battery.service() as service:
            pids = {n: p for n, p in service.pids().items() if n.startswith(("prefill", "decode"))}
            for pid in pids.values():
                _limit(pid, _address_space(pid))
            result.injected += len(pids)
            mix = Mix(f"F17-{result.injected}", battery.seed, battery.bodies)
            _load(battery, service, result, each=10, mix=mix)
            deaths += sum(service.pids().get(name) != pid for name, pid in pids.items())
            for pid in service.pids().values():
                _limit(pid, resource.RLIM_INFINITY)
            service.await_whole()
            ran_out += service.logged("has no memory left for")
            after = service.census()  # a replaced worker has other caches: memory is not compared
            result.leaked += after.leased + after.quarantined
        leftovers += service.leftovers
    result.problems += leftovers
    result.notes.append(
        f"{ran_out} forwards found no memory, {deaths} of {result.injected} workers died of it"
    )
    result.require(ran_out + deaths > 0, "no worker noticed its limit")
    return [result]


def _address_space(pid: int) -> int:
    """Bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _limit(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        _, most = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (number, most))


def _start_without_memory(battery: Battery) -> Result:
    """A model that does not fit ends the start with code 6, and one line that says what it needs."""
    result = Result("F17-start", "a start without memory for the model", injected=1, in_table=False)
    out = battery.folder / "no-memory.txt"
    words = [sys.executable, "main.py", "-b", "1", "-l", "4", "--model", BIG, "-o", str(out)]
    limit = (START_BYTES, resource.RLIM_INFINITY)
    done = subprocess.run(
        words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    what = f"{BIG} with {START_BYTES >> 20} MiB: exit code {done.returncode}: {' '.join(errors)[-300:]}"
    result.notes.append(what)
    good = done.returncode == 6 and len(errors) == 1 and "GiB are free" in errors[0]
    result.require(good and "Traceback" not in done.stderr, what)
    return result
