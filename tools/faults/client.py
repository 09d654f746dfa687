"""Client: asks over HTTP as bluntly as a socket can, and writes what it sees into the ledger.

No library stands between: a body that ends early, a stream without [DONE] and a reset connection stay
different things.
"""

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tools.faults.ledger import Chunk, End, Ledger, Sent

DEADLINE_S = 120.0
COMPLETIONS = "/v1/completions"
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)\r", re.IGNORECASE)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes away: after so many chunks, or so many seconds, whichever comes first."""

    chunks: int
    seconds: float
    reset: bool = False  # with RST instead of FIN


class _Left(Exception):
    """This client goes away now."""


def head(method: str, path: str, length: int = 0, headers: str = "") -> bytes:
    """An HTTP request up to its body."""
    lines = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{headers}"
    if method == "POST":
        lines += f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
    return f"{lines}\r\n".encode()


async def fetch(
    port: int,
    path: str,
    body: Mapping[str, Any] | bytes | None = None,
    *,
    headers: str = "",
    timeout_s: float = 10.0,
) -> tuple[int, bytes]:
    """Status and body of one request. OSError or TimeoutError if there is none."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head("GET" if body is None else "POST", path, len(data), headers) + data)
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer.split()[1])
            return status, b"".join([part async for part in _body(reader, answer)])
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise ConnectionError(f"{path}: the answer is broken: {error}") from error
        finally:
            writer.close()


async def _body(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """The parts of a body as they arrive. IncompleteReadError if it ends too early."""
    if b"chunked" in head.lower():
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif found := LENGTH.search(head):
        yield await reader.readexactly(int(found[1]))
    else:
        yield await reader.read()


async def ask(
    port: int,
    ledger: Ledger,
    id: str,
    case: int,
    body: Mapping[str, Any],
    *,
    deadline_s: float = DEADLINE_S,
    leave: Leave | None = None,
) -> End:
    """One request from the first byte to its outcome, all of it in the ledger."""
    talk = _Talk(ledger, id, leave)
    ledger.add(Sent(id, case, time.monotonic(), body))
    patience = min(deadline_s, leave.seconds) if leave else deadline_s
    try:
        async with asyncio.timeout(patience):
            how = await talk.run(port, body)
    except _Left:
        how = "left"
    except TimeoutError:
        how = "left" if leave and leave.seconds <= deadline_s else "hang"
    except (OSError, asyncio.IncompleteReadError, ValueError):  # ValueError: cut within a line
        how = "broken"
    finally:
        talk.close(reset=leave is not None and leave.reset)
    end = End(id, time.monotonic(), how, talk.status, talk.code, talk.tokens, talk.retry_after)
    ledger.add(end)
    return end


class _Talk:
    """One connection with one request."""

    def __init__(self, ledger: Ledger, id: str, leave: Leave | None) -> None:
        self._ledger, self._id, self._leave = ledger, id, leave
        self._chunks = 0
        self._writer: asyncio.StreamWriter | None = None
        self.status, self.code = 0, ""
        self.tokens: int | None = None
        self.retry_after: int | None = None

    async def run(self, port: int, body: Mapping[str, Any]) -> str:
        """How it ended, see ledger.py."""
        data = json.dumps(body).encode()
        reader, self._writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        self._writer.write(head("POST", COMPLETIONS, len(data)) + data)
        await self._writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        self.status = int(answer.split()[1])
        if found := RETRY_AFTER.search(answer):
            self.retry_after = int(found[1])
        if b"text/event-stream" in answer.lower():
            return await self._events(_body(reader, answer))
        whole = json.loads(b"".join([part async for part in _body(reader, answer)]))
        if self.status != 200 or "error" in whole:
            self._failed(whole.get("error"))
            return "error"
        self._take(whole)
        return "done"

    async def _events(self, parts: AsyncIterator[bytes]) -> str:
        waiting, how = b"", "ended"
        async for part in parts:
            *events, waiting = (waiting + part).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    how = how if how == "error" else "done"
                elif event.startswith(b"data: "):
                    data = json.loads(event[6:])
                    if "error" in data:
                        self._failed(data["error"])
                        how = "error"
                    else:
                        self._take(data)
        return how

    def _take(self, data: Mapping[str, Any]) -> None:
        if usage := data.get("usage"):
            self.tokens = usage["completion_tokens"]
        for choice in data["choices"]:
            finish = choice.get("finish_reason")
            self._ledger.add(Chunk(self._id, time.monotonic(), choice.get("text") or "", finish))
            self._chunks += 1
            if self._leave is not None and self._chunks >= self._leave.chunks:
                raise _Left

    def _failed(self, error: Any) -> None:
        self.code = str((error or {}).get("code") or (error or {}).get("message") or "unknown")

    def close(self, *, reset: bool) -> None:
        if self._writer is None:
            return
        if reset and (sock := self._writer.get_extra_info("socket")) is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Request:
    """What a client is to send."""

    id: str
    case: int
    body: Mapping[str, Any]
    leave: Leave | None = None


async def run_clients(
    port: int,
    ledger: Ledger,
    requests: Sequence[Callable[[], Request | None]],
    *,
    again: Sequence[str] = (),
    tries: int = 1,
    deadline_s: float = DEADLINE_S,
) -> dict[str, str]:
    """One client for each of `requests`: it sends what the function makes, one after the other, until
    that makes None. Outcomes (see End.how) in `again` are tried again as ID+1, ID+2, ... Returns the
    last outcome by the first id."""
    last: dict[str, str] = {}

    async def client(following: Callable[[], Request | None]) -> None:
        while (request := following()) is not None:
            for attempt in range(tries):
                id = f"{request.id}+{attempt}" if attempt else request.id
                end = await ask(
                    port, ledger, id, request.case, request.body,
                    deadline_s=deadline_s, leave=request.leave,
                )  # fmt: skip
                last[request.id] = end.how
                if end.how not in again:
                    break
                await asyncio.sleep(0.2 * 2 ** min(attempt, 4))  # as any client backs off

    await asyncio.gather(*map(client, requests))
    return last
