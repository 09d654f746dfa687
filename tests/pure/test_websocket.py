"""The WebSocket's answers to what goes wrong in the server itself."""

import asyncio
import json
import logging
import threading
from typing import Any

import pytest

from baton.server.structured import StructuredFields
from tests.patience import PATIENCE_S
from tests.pure.town_app import TownClient, serving


async def exchange(client: TownClient, *texts: str) -> list[dict[str, Any]]:
    """What is answered to each of these messages: the first message after it."""
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    scope = {
        "type": "websocket", "path": "/v1/stream", "query_string": b"", "subprotocols": [],
        "headers": [(b"host", b"localhost"), (b"x-request-id", b"mine")],
        "extensions": {"websocket.http.response": {}}, "asgi": {"version": "3.0"}, "root_path": "",
        "scheme": "ws", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    await asked.put({"type": "websocket.connect"})
    running = asyncio.create_task(client.app(scope, asked.get, sent.put))
    found = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert (await sent.get())["type"] == "websocket.accept"
            for text in texts:
                await asked.put({"type": "websocket.receive", "text": text})
                found.append(json.loads((await sent.get())["text"]))
            await asked.put({"type": "websocket.disconnect", "code": 1000})
            await running
    finally:
        running.cancel()
    return found


def test_what_nobody_expected_is_answered_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> tuple[str, str]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(StructuredFields, "grammar_field", broken)

    async def work() -> list[dict[str, Any]]:
        async with serving() as client:
            return await exchange(client, '{"prompt": "x"}', '{"prompt": "y"}')

    with caplog.at_level(logging.ERROR):
        answers = asyncio.run(work())
    for answer in answers:
        error = answer["error"]
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "see request mine in the server's log" in error["message"]
        assert answer["id"] is None
    logged = [each for each in caplog.records if each.name == "baton.server.websocket"]
    assert len(logged) == 2
    assert all(each.exc_info and each.exc_info[0] is ZeroDivisionError for each in logged)


@pytest.mark.parametrize("rules", ["[" * 16_384, "[" * 10])
def test_a_long_grammar_is_read_in_a_thread(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StructuredFields.grammar_field
    threads = []

    def watched(self: StructuredFields) -> tuple[str, str]:
        threads.append(threading.current_thread() is threading.main_thread())
        return read(self)

    monkeypatch.setattr(StructuredFields, "grammar_field", watched)

    async def work() -> list[dict[str, Any]]:
        async with serving() as client:
            return await exchange(client, json.dumps({"prompt": "x", "guided_grammar": rules}))

    (answer,) = asyncio.run(work())
    assert answer["error"]["code"] == "invalid_grammar"
    assert answer["error"]["param"] == "guided_grammar"
    assert threads == [len(rules) < 4096]
