"""A stream of events: kept alive, ended by whoever leaves, and always closed."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from baton.server.sse import KEEP_ALIVE, EventStream, event
from tests.patience import PATIENCE_S


class Events:
    """A generator that says when it was closed. After its chunks it waits for ever, or ends."""

    def __init__(self, *chunks: bytes, ends: bool) -> None:
        self.chunks, self.ends, self.closed = chunks, ends, False

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self.chunks:
                yield chunk
            if not self.ends:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def stays() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


async def leaves() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def run(events: Events, receive: Any, send: Any) -> None:
    asyncio.run(asyncio.wait_for(EventStream(events())({}, receive, send), PATIENCE_S))
    assert events.closed


def test_what_ends_by_itself_is_sent_whole() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    run(Events(b"a", b"b", ends=True), stays, send)
    assert [message.get("body") for message in sent] == [None, b"a", b"b", b""]
    assert [message.get("more_body") for message in sent[1:]] == [True, True, False]
    names = [name for name, _ in sent[0]["headers"]]
    assert b"content-length" not in names
    assert (b"cache-control", b"no-cache") in sent[0]["headers"]


def test_who_leaves_ends_it() -> None:
    async def send(message: dict[str, Any]) -> None:
        pass

    run(Events(b"a", ends=False), leaves, send)


def test_a_silent_line_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.sse.KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr("baton.server.sse.LOOK_S", 0.02)
    enough = asyncio.Event()
    sent: list[bytes] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message.get("body", b""))
        if sent.count(KEEP_ALIVE) == 2:
            enough.set()

    async def receive() -> dict[str, Any]:
        await enough.wait()
        return {"type": "http.disconnect"}

    run(Events(b"a", ends=False), receive, send)
    assert sent[:2] == [b"", b"a"]


def test_an_event_is_one_line_of_json_whatever_is_in_it() -> None:
    data = event({"text": "a\n\nb ü 🙂\r"}, "moments")
    assert data.startswith(b"event: moments\ndata: {")
    assert data.endswith(b"}\n\n")
    assert data.count(b"\n") == 3
    assert b"\r" not in data


def test_what_goes_wrong_in_the_generator_is_not_hidden() -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise ValueError("a bug")

    async def send(message: dict[str, Any]) -> None:
        pass

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(EventStream(broken())({}, stays, send))


@pytest.mark.parametrize("begun", [False, True])
def test_what_holds_the_request_is_closed_also_if_the_client_leaves_before_the_first_byte(
    begun: bool,
) -> None:
    """A generator that was not begun runs no `finally`."""
    closed, began = [], []

    async def events() -> AsyncGenerator[bytes, None]:
        began.append(True)
        await asyncio.Event().wait()
        yield b""

    async def send(message: dict[str, Any]) -> None:
        if not begun:
            await asyncio.Event().wait()

    async def leaves_soon() -> dict[str, Any]:
        while begun and not began:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    stream = EventStream(events(), close=lambda: closed.append(True))
    asyncio.run(asyncio.wait_for(stream({}, leaves_soon, send), PATIENCE_S))
    assert (bool(began), closed) == (begun, [True])
