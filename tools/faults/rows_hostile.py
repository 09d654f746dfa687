"""B1, B2, B6: numbers at every edge, and frames from somebody who should not be there."""

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq

from baton.client.blocking import Client
from tools.faults.battery import Battery, Result
from tools.faults.check import check
from tools.faults.client import fetch, run_clients
from tools.faults.rows_kill import with_leftovers
from tools.faults.workload import VOCABULARY

FRAMES = 100_000  # on every socket
LOG_BYTES = 200_000
BURST = 200
SLOW_S = 2.0
NUMBERS = (
    "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "min_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "best_of", "prompt_logprobs",
)  # fmt: skip
EDGES = (
    "-1", "0", "1", "-0", "2", "2147483648", "9007199254740992", "9223372036854775808",
    "18446744073709551616", "-9223372036854775809", "NaN", "Infinity", "-Infinity", "1e400", "1e-400",
    '"1"', "true", "null", "[]", "{}", "0.5", "1" + "0" * 400,
)  # fmt: skip
IDS = (-1, VOCABULARY, 1 << 31, 1 << 63, 1 << 64)


def b1(battery: Battery) -> list[Result]:
    """Every number field at every edge, and ids outside the vocabulary in every field that takes ids:
    answered with 200 or 400, quickly, never 5xx."""
    result = Result("B1-B2", "number fields and token ids at their edges", in_table=False)
    bodies = [
        f'{{"model":"demo","prompt":"In the","max_tokens":4,"{name}":{edge}}}'
        for name in NUMBERS
        for edge in EDGES
    ]
    for bad in IDS:
        for field in (
            f'"prompt":[{bad}]', f'"prompt":"a","logit_bias":{{"{bad}":1}}',
            f'"prompt":"a","stop_token_ids":[{bad}]', f'"prompt":"a","allowed_token_ids":[{bad}]',
        ):  # fmt: skip
            bodies.append(f'{{"model":"demo","max_tokens":4,{field}}}')
    wanted = battery.count(len(bodies), least=60)
    chosen = battery.rng("B1").sample(bodies, min(wanted, len(bodies)))
    with battery.service() as service:
        before = battery.warm(service)
        found = [asyncio.run(_status(service.port, body)) for body in chosen]
        for body, (status, took) in zip(chosen, found, strict=True):
            result.outcomes[str(status)] += 1
            result.require(status in (200, 400), f"{status} for {body[:120]}")
            result.require(took < SLOW_S, f"{took:.1f} s for {body[:120]}")
        refused = [
            s for b, (s, _) in zip(chosen, found, strict=True) if any(str(i) in b for i in IDS[1:])
        ]
        result.require(400 in refused, "no id outside the vocabulary was refused")
        result.injected = result.requests = len(chosen)
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


async def _status(port: int, body: str) -> tuple[int, float]:
    began = time.monotonic()
    try:
        status, _ = await fetch(port, "/v1/completions", body.encode(), timeout_s=30)
    except (OSError, TimeoutError):
        status = 0
    return status, time.monotonic() - began


def b6(battery: Battery) -> list[Result]:
    """Noise, then stolen names."""
    return [*_noise(battery), *_takeover(battery)]


def _noise(battery: Battery) -> list[Result]:
    """Noise, wrong messages and a pickle on the router's socket and on the one for KV,
    while clients are served."""
    result = Result("B6", "hostile frames on every socket of the cluster")
    count, rng = battery.count(FRAMES, least=500), battery.rng("B6")
    with battery.service() as service:
        before = battery.warm(service)
        folder = service.run_folder()
        assert folder is not None
        canary = service.folder / "canary"
        ledger, mix = battery.ledger("B6"), battery.mix("B6")

        async def attack() -> None:
            names = await asyncio.to_thread(_known_names, folder)
            for path in sorted(folder.glob("*.sock")):
                frames = _frames(rng, canary, names)
                result.injected += await asyncio.to_thread(_send, path, frames, count)

        async def both() -> None:
            attacking = asyncio.create_task(attack())
            requests = mix.clients(4, battery.count(20, least=3), lambda: not attacking.done())
            await run_clients(service.port, ledger, requests)
            await attacking

        asyncio.run(both())
        ledger.close()
        result.judge(check(ledger.events, battery.reference, mix.ids))
        result.require(not canary.exists(), "a pickle was executed")
        for log in (folder / "logs").glob("*.log"):
            size = log.stat().st_size
            result.require(size < LOG_BYTES, f"{log.name} has {size:,} bytes")
        after = service.census()
        died = [n for n, p in before.processes.items() if after.processes.get(n, p).pid != p.pid]
        result.require(not died, f"replaced meanwhile: {died}")
        result.compare(before, after)
    return with_leftovers([(result, service)])


def _frames(rng: random.Random, canary: Path, names: list[str]) -> Iterator[list[bytes]]:
    """Messages without end."""
    pickle = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    kinds = [
        "Hello",
        "Submit",
        "Filled",
        "Reserved",
        "Decoded",
        "PoolStats",
        "Heartbeat",
        "Nothing",
    ]
    wrong: list[Any] = [None, -1, 1 << 63, "x" * 300, b"\xff" * 300, [[]] * 9, {"a": {}}, 1.5, True]
    while True:
        kind = rng.choice(kinds)
        fields = [rng.choice(wrong) for _ in range(rng.randrange(12))]
        nested: Any = []
        for _ in range(rng.randrange(400)):
            nested = [nested]
        yield rng.choice([
            [rng.randbytes(rng.randrange(1, 400))],
            [msgpack.packb([kind, *fields])],
            [msgpack.packb({"kind": kind, "worker": rng.choice(names), "fields": fields})],
            [msgpack.packb([1, "kv", "epoch", rng.choice([-1, 0, 1 << 62]), 0, 0, b"1234"]), b"x" * 100],
            [msgpack.packb(nested)],
            [pickle],
            [b""] * rng.randrange(1, 20),
            [b"\xdd\xff\xff\xff\xff" + rng.randbytes(20)],
        ])  # fmt: skip


def _send(path: Path, frames: Iterator[list[bytes]], count: int) -> int:
    """Send so many messages from a few connections under changing names. How many were taken."""
    context, sent = zmq.Context(), 0
    try:
        while sent < count:
            link = context.socket(zmq.DEALER)
            link.linger, link.sndtimeo = 2000, 5000
            link.identity = f"stranger-{sent}".encode()
            link.connect(f"ipc://{path}")
            for _ in range(min(BURST * 50, count - sent)):
                link.send_multipart(next(frames))
                sent += 1
            link.close()
    except zmq.Again:
        pass  # the peer reads no more from this connection: it counts what was taken
    finally:
        context.destroy(linger=2000)
    return sent


def _takeover(battery: Battery) -> list[Result]:
    """The router gives a name to the newest connection that claims it. Whoever takes a worker's name can
    cut it off, and no more: what was on it is computed again, and a worker with that name comes back."""
    result = Result("B6-takeover", "somebody connects to the router under a worker's name")
    with battery.service() as service:
        before = battery.warm(service)
        ledger, mix = battery.ledger(result.row), battery.mix(result.row)
        folder = service.run_folder()
        assert folder is not None

        async def attack() -> None:
            for _ in range(battery.count(5)):
                names = await asyncio.to_thread(_known_names, folder)
                began = time.monotonic()
                await asyncio.to_thread(_claim, folder, names)
                result.injected += len(names)
                async with asyncio.timeout(90):
                    await asyncio.sleep(1.0)
                    while not service.whole(await service.state()):
                        await asyncio.sleep(0.05)
                result.whole_s.append(time.monotonic() - began)

        async def both() -> None:
            attacking = asyncio.create_task(attack())
            requests = mix.clients(4, battery.count(20, least=3), lambda: not attacking.done())
            await run_clients(service.port, ledger, requests)
            await attacking

        asyncio.run(both())
        ledger.close()
        result.judge(check(ledger.events, battery.reference, mix.ids))
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


def _claim(folder: Path, names: list[str]) -> None:
    """Connect under these names and say nothing sensible."""
    context = zmq.Context()
    for name in names:
        link = context.socket(zmq.DEALER)
        link.linger = 500
        link.identity = name.encode()
        link.connect(f"ipc://{folder}/router.sock")
        link.send(b"\x00not a message")
        link.close()
    context.destroy(linger=500)


def _known_names(folder: Path) -> list[str]:
    """Names of workers with their random tails, from the router itself: any member may ask."""
    client = Client(f"ipc://{folder}/router.sock")
    try:
        return [each.worker for each in client.info(timeout_s=5.0).workers]
    finally:
        client.close()
