"""B1, B2, B6: numbers at every edge, and frames from somebody who should not be there."""

import asyncio
import random
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import zmq

from baton.client.blocking import Client
from tools.faults.battery import FRAMES as FRAMED
from tools.faults.battery import POOL_MIB, Battery, Result
from tools.faults.beside import beside
from tools.faults.check import Census
from tools.faults.client import fetch
from tools.faults.rows_kill import with_leftovers
from tools.faults.stage import account
from tools.faults.workload import VOCABULARY

FRAMES = 100_000  # on every socket
LOG_BYTES = 200_000
BURST = 200
TRIES = 5
LINE_S = 1.1  # the router writes one line a second at most
LINGER_MS = 20_000  # what was sent must arrive before the connection is closed
MALFORMED = re.compile(
    r" a malformed message from .*?(?: \(([\d,]+) more since the last such line\))?$", re.M
)
SLOW_S = 2.0
NUMBERS = (
    "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "min_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "best_of", "prompt_logprobs",
)  # fmt: skip
UNKNOWN = "prompt_logprobs"  # no field of this API: ignored, whatever its value
EDGES = (
    "-1", "0", "1", "-0", "2", "2147483648", "9007199254740992", "9223372036854775808",
    "18446744073709551616", "-9223372036854775809", "NaN", "Infinity", "-Infinity", "1e400", "1e-400",
    '"1"', "true", "null", "[]", "{}", "0.5", "1" + "0" * 400,
)  # fmt: skip
NEVER = re.compile(r'":(\[\]|\{\}|"1"|true|NaN|-?Infinity|1e400|-9223372036854775809|10{400})\}$')
"""The value of a body's last field, where no field takes it."""
IDS = (-1, VOCABULARY, 1 << 31, 1 << 63, 1 << 64)


def b1(battery: Battery) -> list[Result]:
    """Every number field at every edge: 400, or 200 where the value is a legal one. Ids outside the
    vocabulary in every field that takes ids: 400. All quickly, never 5xx."""
    result = Result("B1-B2", "number fields and token ids at their edges", in_table=False)
    numbers = [
        f'{{"model":"demo","prompt":"In the","max_tokens":4,"{name}":{edge}}}'
        for name in NUMBERS
        for edge in EDGES
    ]
    ids = [
        f'{{"model":"demo","max_tokens":4,{field}}}'
        for bad in IDS
        for field in (
            f'"prompt":[{bad}]', f'"prompt":"a","logit_bias":{{"{bad}":1}}',
            f'"prompt":"a","stop_token_ids":[{bad}]', f'"prompt":"a","allowed_token_ids":[{bad}]',
        )
    ]  # fmt: skip
    wanted = battery.count(len(numbers), least=60)
    chosen = battery.rng("B1").sample(numbers, min(wanted, len(numbers)))
    with battery.shared() as service:
        before = battery.warm(service)
        for bodies, right in ((chosen, (200, 400)), (ids, (400,))):
            found = [asyncio.run(_status(service.port, body)) for body in bodies]
            judge_edges(result, bodies, found, right)
        account(result, before, service)
    return with_leftovers([(result, service)])


def judge_edges(
    result: Result,
    bodies: Sequence[str],
    found: Sequence[tuple[int, float]],
    right: Collection[int],
) -> None:
    """Status and seconds of each body: one of the right statuses, in time. Words, lists, booleans, values
    that are not finite and those beyond 64 bits are no legal number of any field: 400."""
    for body, (status, _) in zip(bodies, found, strict=True):
        result.outcomes[str(status)] += 1
        strict = NEVER.search(body) and f'"{UNKNOWN}"' not in body
        legal = (400,) if strict else right
        result.require(status in legal, f"{status}, not {legal}, for {body[:120]}")
    times = [took for _, took in found]
    result.bar(f"slowest of {len(times)} answers", max(times, default=float("nan")), SLOW_S)
    result.injected += len(bodies)
    result.requests += len(bodies)


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
    """On every socket of two services: one whose KV is in shared memory, one that sends frames."""
    shared = Result("B6", "hostile frames on the sockets of a cluster")
    frames = Result("B6-frames", "hostile frames where KV is sent as frames")
    _noise_on(battery, shared, (), 2)
    _noise_on(battery, frames, FRAMED, 2, pool_mib=POOL_MIB)
    return [shared, frames]


def _noise_on(
    battery: Battery,
    result: Result,
    options: Sequence[object],
    sockets: int,
    *,
    pool_mib: float = 0.0,
) -> None:
    """Noise, wrong messages and a pickle on at least so many sockets, while clients are served."""
    count, rng = battery.count(FRAMES, least=500), battery.rng(result.row)
    with battery.service(*options) as service:
        before = battery.warm(service)
        folder = service.run_folder()
        assert folder is not None
        canary = service.folder / "canary"
        sent: dict[str, int] = {}

        async def attack() -> None:
            names = await asyncio.to_thread(_known_names, folder)
            paths = sorted(folder.rglob("*.sock"))
            noise = [_frames(random.Random(rng.random()), canary, names) for _ in paths]
            taken = await asyncio.gather(
                *(asyncio.to_thread(send, *each, count) for each in zip(paths, noise, strict=True))
            )
            sent.update({path.name: each for path, each in zip(paths, taken, strict=True)})
            await asyncio.sleep(LINE_S)  # the next line counts those since the last
            last = iter([[b"not a message"]])
            await asyncio.to_thread(send, folder / "router.sock", last, 1)

        beside(battery, service, result, attack, clients=4)
        result.require(not canary.exists(), "a pickle was executed")
        logs = {log.name: log.read_text(errors="replace") for log in folder.glob("logs/*.log")}
        judge_noise(result, sent, count, sockets, logs)
        if service.exit_code is None:
            after = service.census()
            judge_same_processes(result, before, after)
        account(result, before, service, pool_mib=pool_mib)
    with_leftovers([(result, service)])


def judge_noise(
    result: Result, sent: Mapping[str, int], count: int, sockets: int, logs: Mapping[str, str]
) -> None:
    """What each socket took, and what the logs say: every frame was sent to every socket, the malformed
    were noticed, and no log was filled."""
    result.injected = sum(sent.values())
    result.notes.append(", ".join(f"{name}: {taken:,} messages" for name, taken in sent.items()))
    result.require(len(sent) >= sockets, f"{len(sent)} sockets were found, not {sockets}")
    short = {name: taken for name, taken in sent.items() if taken != count}
    result.require(not short, f"not all of {count:,} messages were taken: {short}")
    noticed = sum(
        1 + int(more.replace(",", "") or 0)
        for text in logs.values()
        for more in MALFORMED.findall(text)
    )
    result.notes.append(f"{noticed:,} malformed messages in the router's log")
    result.require(
        noticed > count / 4, f"the logs count {noticed:,} malformed of {count:,} messages"
    )
    for name, text in logs.items():
        result.require(len(text) < LOG_BYTES, f"{name} has {len(text):,} bytes")


def judge_same_processes(result: Result, before: Census, after: Census) -> None:
    """Nobody died of it, and nobody's memory grew."""
    for name, was in before.processes.items():
        now = after.processes.get(name)
        result.require(now is not None and now.pid == was.pid, f"{name} was replaced meanwhile")


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


def send(path: Path, frames: Iterator[list[bytes]], count: int) -> int:
    """Send so many messages from a few connections under changing names: how many left this process.
    A connection that the peer no longer reads, or cut, is given up for a new one; after TRIES in a row
    that took nothing, so is the socket."""
    context, sent, idle = zmq.Context(), 0, 0
    try:
        while sent < count and idle < TRIES:
            link = context.socket(zmq.DEALER)
            link.linger, link.sndtimeo, link.immediate = LINGER_MS, 2000, True
            link.identity = f"stranger-{sent}-{idle}".encode()
            link.connect(f"ipc://{path}")
            had = sent
            with suppress(zmq.Again):
                for _ in range(min(BURST * 50, count - sent)):
                    link.send_multipart(next(frames))
                    sent += 1
            idle = 0 if sent > had else idle + 1
            link.close()
    finally:
        context.destroy(linger=LINGER_MS)
    return sent


def _takeover(battery: Battery) -> list[Result]:
    """The router gives a name to the newest connection that claims it. Whoever takes a worker's name can
    cut it off, and no more: what was on it is computed again, and a worker with that name comes back."""
    result = Result("B6-takeover", "somebody connects to the router under a worker's name")
    with battery.service() as service:
        before = battery.warm(service)
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

        beside(battery, service, result, attack, clients=4)
        account(result, before, service)
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
