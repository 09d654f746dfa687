"""F12, F21, B4: clients that do not read, that do not finish what they send, and that are too many."""

import asyncio
import json
import resource
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from tools.faults.battery import CLIENTS, Battery, Result
from tools.faults.beside import asked_again
from tools.faults.check import check
from tools.faults.client import COMPLETIONS, fetch, head, run_clients
from tools.faults.ledger import records
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import Service, fds, memory_mib
from tools.faults.stage import account

CUT_S = 45.0  # a client that reads nothing for 30 s is cut; looked at once a second
BODY_CUT_S = 15.0  # 10 s for a body, then an answer and the end
LIVE_S = 1.0
SMALL = 2048  # bytes of a socket's receive buffer
SLOW_BODY, HALF_BODY = "a byte of the body every second", "half a body, then nothing"
SLOW_HEAD, ENDLESS = "a byte of the head every second", "chunks without end"
TLS, NOTHING = "TLS", "nothing at all"
MORE_RATIO = (
    3.0  # RELIABILITY asks for 5 % on cores of their own; here clients and service share two
)
MOST_HELD_MIB = 64.0  # that the server may grow by while four readers do not read
RESERVE = 16  # descriptors that the server keeps for itself, baton/server/accept.py
MOST_PAUSES, MOST_LINES = 3, 12  # one a minute
PAUSED = "no more connections for now"
HUGE = {
    "model": "demo", "prompt": "In the future", "max_tokens": 2200, "ignore_eos": True,
    "temperature": 0, "stream": True, "n": 4, "logprobs": 20,
}  # fmt: skip
BODIES = {
    SLOW_BODY: (head("POST", COMPLETIONS, 4_000_000), b" "),
    HALF_BODY: (head("POST", COMPLETIONS, 400) + b'{"model": "demo",', b""),
    SLOW_HEAD: (b"POST /v1/completions HTTP/1.1\r\nX-A: ", b"a"),
    ENDLESS: (
        head("POST", COMPLETIONS).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
        b"1\r\n \r\n",
    ),
    TLS: (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b""),
    NOTHING: (b"", b""),
}  # fmt: skip
ANSWERS: Mapping[str, int] = {SLOW_BODY: 408, HALF_BODY: 408, ENDLESS: 408, TLS: 400}
"""The status of each; without the key, 401 where a head was complete. Without a head there is nothing to
answer: the connection is closed."""


def f12(battery: Battery) -> list[Result]:
    """Two clients read a byte a second, two read nothing; the answers are larger than all buffers."""
    result = Result("F12", "readers that read a byte a second, or nothing at all")
    with battery.service() as service:
        quiet = battery.warm(service).processes["server"].memory_mib
        held: list[float] = []
        alone = _between_tokens(battery, service, result, "F12-alone")

        async def both() -> None:
            slow = [asyncio.create_task(_slow(service.port, every_s)) for every_s in (1, 0, 1, 0)]
            await asyncio.sleep(1.0)
            held.append(memory_mib(service.pids().get("server", 0)))
            beside.append(await _chunk_times(battery, service, result, "F12-beside"))
            held.append(memory_mib(service.pids().get("server", 0)))
            done, late = await asyncio.wait(slow, timeout=CUT_S)
            held.append(memory_mib(service.pids().get("server", 0)))
            result.injected += len(slow)
            result.whole_s += [task.result() for task in done]
            for task in late:
                task.cancel()
            uncut = sum(1 for task, every_s in zip(slow, (1, 0, 1, 0), strict=True)
                        if task in late and not every_s)  # fmt: skip
            result.require(
                not uncut, f"{uncut} readers that read nothing were not cut in {CUT_S:g} s"
            )
            result.notes.append(f"{len(done)} of {len(slow)} were cut by the server")

        beside: list[float] = []
        asyncio.run(both())
        before = (
            service.census()
        )  # answers that nobody read were kept: whether for ever shows the next
        asyncio.run(both())
        result.bar(
            "p99 between tokens of the others, to that alone", max(beside) / alone, MORE_RATIO, ""
        )
        judge_held(result, quiet, held)
        account(result, before, service)
    return with_leftovers([(result, service)])


def judge_held(result: Result, quiet: float, held: Sequence[float]) -> None:
    """The server's memory in MiB: before, and at moments while readers do not read. What they do not read
    is bounded. 0 is a server that is gone."""
    result.require(bool(held) and all(held), f"the server's memory was not read: {held}")
    most = max(held, default=0.0) - quiet
    result.notes.append(f"the server grew by {most:.0f} MiB while nobody read")
    result.require(
        most <= MOST_HELD_MIB, f"the server grew by {most:.0f} MiB, {MOST_HELD_MIB:g} allowed"
    )


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
            before = service.census()
            count = battery.count(40, least=4)
            found = asyncio.run(_all_bodies(service.port, count, result))
            for name, (open_, answered) in found.items():
                judge_endless(result, name, count, open_, answered, key=not options)
            account(result, before, service)
        results += with_leftovers([(result, service)])
    return results


def judge_endless(
    result: Result, name: str, count: int, open_: int, answered: Counter[str], *, key: bool
) -> None:
    """So many connections of one kind: how many are still open, and how often each status was answered
    ("": none). All of them get the one status of their kind."""
    result.injected += count
    result.requests += count
    result.require(not open_, f"{name}: {open_} of {count} open after {BODY_CUT_S:g} s")
    told = ", ".join(f"{number} {status or 'nothing'}" for status, number in answered.items())
    result.notes.append(f"{name}: answered {told or 'nothing'}")
    status = ANSWERS.get(name, 0)
    right = "" if not status else str(status) if key or name == TLS else "401"
    wrong = count - open_ - answered[right]
    result.require(
        wrong == 0 and set(answered) <= {right},
        f"{name}: {wrong} of {count} were not answered with {right or 'nothing'}: {told}",
    )


async def _all_bodies(port: int, count: int, result: Result) -> dict[str, tuple[int, Counter[str]]]:
    """All kinds at the same time: of each, how many connections are still open after BODY_CUT_S, and the
    statuses that were answered. Meanwhile /livez must answer."""

    async def livez() -> float:
        await asyncio.sleep(3.0)
        began = time.monotonic()
        await fetch(port, "/livez")
        return time.monotonic() - began

    lives = asyncio.create_task(livez())
    found = await asyncio.gather(*(_trickle(port, *what, count) for what in BODIES.values()))
    took = await lives
    result.bar("/livez meanwhile", took, LIVE_S)
    return dict(zip(BODIES, found, strict=True))


async def _trickle(port: int, begin: bytes, more: bytes, count: int) -> tuple[int, Counter[str]]:
    """So many connections send `begin`, and then `more` every second."""
    answered: Counter[str] = Counter()

    async def one() -> bool:
        """Whether the server ended it in time."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        reading = asyncio.ensure_future(_first_and_end(reader))
        deadline = time.monotonic() + BODY_CUT_S
        try:
            while time.monotonic() < deadline and not reading.done():
                with suppress(OSError):
                    writer.write(more)
                await asyncio.wait([reading], timeout=1.0)
            if not reading.done():
                return False
            line = reading.result().split(b" ", 2)
            answered[line[1].decode("latin1") if len(line) > 1 else ""] += 1
            return True
        finally:
            reading.cancel()
            writer.transport.abort()

    ended = await asyncio.gather(*(one() for _ in range(count)))
    return ended.count(False), answered


async def _first_and_end(reader: asyncio.StreamReader) -> bytes:
    """What came until the other side ended the connection, in whatever way."""
    found = b""
    with suppress(OSError):
        while part := await reader.read(4096):
            found += part
    return found


def f21(battery: Battery) -> list[Result]:
    """The server may open few files only, and more clients connect than that."""
    result = Result("F21", "file descriptors of the HTTP server exhausted", in_table=False)
    with battery.service() as service:
        before = battery.warm(service)
        server = service.pids()["server"]
        size = len(service.said)
        limit = fds(server) + RESERVE + 16
        resource.prlimit(server, resource.RLIMIT_NOFILE, (limit, limit))
        links = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(200)]
        time.sleep(5.0)
        for link in links:
            link.close()
        result.injected = len(links)
        asked_again(battery, service, result)
        result.require(service.pids().get("server") == server, "the server died")
        result.notes.append(f"{len(links)} connections, {limit} descriptors")
        judge_pause(result, service.said[size:])
        account(result, before, service)
    return with_leftovers([(result, service)])


def judge_pause(result: Result, said: str) -> None:
    """The server says that it accepts no more, and is not talkative about it."""
    lines = [line for line in said.splitlines() if " server.access: " not in line]
    pauses = sum(PAUSED in line for line in lines)
    result.notes.append(f"{pauses} lines about the pause, {len(lines)} lines of log in all")
    result.require(
        1 <= pauses <= MOST_PAUSES, f"{pauses} lines about the pause, not 1 to {MOST_PAUSES}"
    )
    result.require(len(lines) <= MOST_LINES, f"{len(lines)} lines of log: {lines[-3:]}")
