"""F12, F21, B4: clients that do not read, that do not finish what they send, and that are too many."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from tools.faults.battery import CLIENTS, Battery, Result
from tools.faults.check import check
from tools.faults.client import COMPLETIONS, fetch, head, run_clients
from tools.faults.ledger import records
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import Service, fds

CUT_S = 45.0  # a client that reads nothing for 30 s is cut; looked at once a second
BODY_CUT_S = 15.0  # 10 s for a body, then an answer and the end
LIVE_S = 1.0
SMALL = 2048  # bytes of a socket's receive buffer
HUGE = {
    "model": "demo", "prompt": "In the future", "max_tokens": 2200, "ignore_eos": True,
    "temperature": 0, "stream": True, "n": 4, "logprobs": 20,
}  # fmt: skip
BODIES = {
    "a byte of the body every second": (
        head("POST", COMPLETIONS, 4_000_000), b" ",
    ),
    "half a body, then nothing": (head("POST", COMPLETIONS, 400) + b'{"model": "demo",', b""),
    "a byte of the head every second": (b"POST /v1/completions HTTP/1.1\r\nX-A: ", b"a"),
    "chunks without end": (
        head("POST", COMPLETIONS).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
        b"1\r\n \r\n",
    ),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b""),
    "nothing at all": (b"", b""),
}  # fmt: skip


def f12(battery: Battery) -> list[Result]:
    """Two clients read a byte a second, two read nothing; the answers are larger than all buffers."""
    result = Result("F12", "readers that read a byte a second, or nothing at all")
    with battery.service() as service:
        battery.warm(service)
        alone = _between_tokens(battery, service, result, "F12-alone")

        async def both() -> None:
            slow = [asyncio.create_task(_slow(service.port, every_s)) for every_s in (1, 0, 1, 0)]
            await asyncio.sleep(1.0)
            beside.append(await _chunk_times(battery, service, result, "F12-beside"))
            done, late = await asyncio.wait(slow, timeout=CUT_S)
            result.injected += len(slow)
            result.whole_s += [task.result() for task in done]
            for task in late:
                task.cancel()
            held = sum(1 for task, every_s in zip(slow, (1, 0, 1, 0), strict=True)
                       if task in late and not every_s)  # fmt: skip
            result.require(
                not held, f"{held} readers that read nothing were not cut in {CUT_S:g} s"
            )
            result.notes.append(f"{len(done)} of {len(slow)} were cut by the server")

        beside: list[float] = []
        asyncio.run(both())
        before = (
            service.census()
        )  # answers that nobody read were kept: whether for ever shows the next
        asyncio.run(both())
        ratio = beside[0] / alone
        result.notes.append(f"p99 between tokens of the others {ratio:.2f} times as long as alone")
        result.compare(before, service.census())
    return with_leftovers([(result, service)])


async def _slow(port: int, every_s: float) -> float:
    """Read a byte every so many seconds (0: never) until the server cuts the connection: after how
    long."""
    loop, data = asyncio.get_running_loop(), json.dumps(HUGE).encode()
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        link.setblocking(False)
        await loop.sock_connect(link, ("127.0.0.1", port))
        await loop.sock_sendall(link, head("POST", COMPLETIONS, len(data)) + data)
        began = time.monotonic()
        while True:
            await asyncio.sleep(every_s or 0.2)
            if link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1:  # not ESTABLISHED
                return time.monotonic() - began
            if every_s:
                with suppress(BlockingIOError):
                    link.recv(1)


def _between_tokens(battery: Battery, service: Service, result: Result, name: str) -> float:
    return asyncio.run(_chunk_times(battery, service, result, name))


async def _chunk_times(battery: Battery, service: Service, result: Result, name: str) -> float:
    """The 99th percentile of the time between chunks of streams of ordinary clients."""
    ledger, mix = battery.ledger(name), battery.mix(name)
    await run_clients(service.port, ledger, mix.clients(CLIENTS, battery.count(20, least=4)))
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids))
    gaps = sorted(
        b.at - a.at
        for record in records(ledger.events).values()
        for a, b in zip(record.chunks, record.chunks[1:], strict=False)
    )
    return gaps[int(0.99 * len(gaps))] if gaps else float("nan")


def b4(battery: Battery) -> list[Result]:
    """Requests that never become complete, from clients that keep sending a little. With a key that
    nobody knows, so that access is refused before anything is read."""
    results = []
    for row, options in (("B4", ()), ("B4-no-key", ("--api-key", "secret"))):
        result = Result(row, "heads and bodies that never end" + (", without the key" if options else ""),
                        in_table=False)  # fmt: skip
        with battery.service(*options) as service:
            server = service.pids()["server"]
            had = fds(server)
            count = battery.count(40, least=4)
            found = asyncio.run(_all_bodies(service.port, count, result))
            for name, (open_, answered) in found.items():
                result.injected += count
                result.requests += count
                result.require(not open_, f"{name}: {open_} of {count} open after {BODY_CUT_S:g} s")
                result.notes.append(f"{name}: answered {', '.join(sorted(answered)) or 'nothing'}")
            result.require(
                fds(server) <= had + 4, f"the server has {fds(server)} descriptors, had {had}"
            )
        results += with_leftovers([(result, service)])
    return results


async def _all_bodies(port: int, count: int, result: Result) -> dict[str, tuple[int, set[str]]]:
    """All kinds at the same time: of each, how many connections are still open after BODY_CUT_S, and the
    status lines that were answered. Meanwhile /livez must answer."""

    async def livez() -> float:
        await asyncio.sleep(3.0)
        began = time.monotonic()
        await fetch(port, "/livez")
        return time.monotonic() - began

    lives = asyncio.create_task(livez())
    found = await asyncio.gather(*(_trickle(port, *what, count) for what in BODIES.values()))
    took = await lives
    result.require(took < LIVE_S, f"/livez took {took:.1f} s meanwhile")
    return dict(zip(BODIES, found, strict=True))


async def _trickle(port: int, begin: bytes, more: bytes, count: int) -> tuple[int, set[str]]:
    """So many connections send `begin`, and then `more` every second."""
    answered: set[str] = set()

    async def one() -> bool:
        """Whether the server ended it in time."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        reading = asyncio.ensure_future(reader.read(-1))
        deadline = time.monotonic() + BODY_CUT_S
        try:
            while time.monotonic() < deadline and not reading.done():
                with suppress(OSError):
                    writer.write(more)
                await asyncio.wait([reading], timeout=1.0)
            if not reading.done():
                return False
            with suppress(OSError):
                answered.add(reading.result()[:12].decode("latin1"))
            return True
        finally:
            reading.cancel()
            writer.transport.abort()

    ended = await asyncio.gather(*(one() for _ in range(count)))
    return ended.count(False), answered - {""}


def f21(battery: Battery) -> list[Result]:
    """The server may open few files only, and more clients connect than that."""
    result = Result("F21", "file descriptors of the HTTP server exhausted", in_table=False)
    with battery.service() as service:
        server = service.pids()["server"]
        size = len(service.said)
        limit = fds(server) + 16
        resource.prlimit(server, resource.RLIMIT_NOFILE, (limit, limit))
        links = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(200)]
        time.sleep(5.0)
        for link in links:
            link.close()
        result.injected = len(links)
        _answers(battery, service, result, lambda: time.sleep(2.0))
        result.require(service.pids().get("server") == server, "the server died")
        lines = service.said[size:].count("\n")
        result.require(lines < 100, f"{lines} lines of log")
        result.notes.append(f"{len(links)} connections, {limit} descriptors, {lines} lines of log")
    return with_leftovers([(result, service)])


def _answers(battery: Battery, service: Service, result: Result, wait: Callable[[], None]) -> None:
    """It serves as before."""
    wait()
    ledger, mix = battery.ledger(f"{result.row}-after"), battery.mix(f"{result.row}-after")
    asyncio.run(run_clients(service.port, ledger, mix.clients(4, 3)))
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids))
