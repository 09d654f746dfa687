"""What a server waits for before it leaves: the router's events of requests that were answered."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from opentelemetry.sdk.trace import TracerProvider

from baton.client.aio import RouterClient
from baton.client.unreported import Unreported
from baton.params import GenerationParams
from baton.server.otel import Spans
from baton.server.run import unless
from baton.wire.channel import Listener
from baton.wire.messages import (
    Accepted,
    Failed,
    Finished,
    Message,
    Observed,
    Submit,
    Unreachable,
)
from baton.wire.node import ROUTER
from baton.wire.records import Ended, Timings
from tests.patience import PATIENCE_S
from tests.pure.pretend_router import info


def observed(*requests: str) -> Observed:
    ended = tuple(Ended(each, "stop", 3, 2, "shm", Timings()) for each in requests)
    return Observed(1.0, (), ended, None, ())


@pytest.mark.parametrize(
    ("messages", "missing"),
    [
        ([], 0), ([Accepted("a", 3, 0.0)], 1),
        ([Accepted("a", 3, 0.0), Finished("a", "stop", Timings())], 1),
        ([Accepted("a", 3, 0.0), Finished("a", "stop", Timings()), observed("a")], 0),
        ([Accepted("a", 3, 0.0), Accepted("b", 3, 0.0), observed("b", "of another")], 1),
        ([Accepted("a", 3, 0.0), Failed("a", "deadline_exceeded", "late"), observed()], 1),
        ([Failed("a", "invalid_request", "no")], 0),  # refused: the router has no such request
        ([Accepted("a", 3, 0.0), Unreachable(ROUTER)], 0),
        ([Accepted("a", 3, 0.0), Unreachable(ROUTER), Accepted("a.1", 3, 0.0)], 1),
    ],
)  # fmt: skip
def test_what_is_accepted_is_missing_until_its_end_is_reported(
    messages: list[Message], missing: int
) -> None:
    unreported = Unreported()
    for each in messages:
        unreported.received(each)
    assert len(unreported) == missing


def connected(work: Callable[[RouterClient, Listener, str], Awaitable[None]]) -> None:
    """`work` with a client and the socket of its router, which knows the client."""

    async def run() -> None:
        with TemporaryDirectory(prefix="last-") as folder:
            address = f"ipc://{Path(folder)}/r"
            listener, client = Listener(address), RouterClient(address)
            client.connect(lambda _: None)
            try:
                peer = ""
                while not peer:
                    peer = next((sender for sender, _ in listener.receive()), "")
                    await asyncio.sleep(0)
                listener.send(peer, info())
                assert await client.answered(PATIENCE_S)
                await work(client, listener, peer)
            finally:
                client.close()
                listener.close()

    asyncio.run(run())


def test_a_client_waits_until_the_last_end_is_reported() -> None:
    async def work(client: RouterClient, listener: Listener, peer: str) -> None:
        assert await client.reported(PATIENCE_S) == 0
        news: asyncio.Queue[object] = asyncio.Queue()
        client.submit(Submit("a", "Hi", GenerationParams(5)), news)  # type: ignore[arg-type]
        listener.send(peer, Accepted("a", 3, 0.0))
        listener.send(peer, Finished("a", "stop", Timings()))
        await news.get()
        await news.get()
        assert await client.reported(0.0) == 1
        waiting = asyncio.ensure_future(client.reported(PATIENCE_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        listener.send(peer, observed("a"))
        assert await waiting == 0

    connected(work)


def test_the_wait_is_cut_short_by_a_second_signal() -> None:
    async def run() -> list[str]:
        done, stop = list[str](), asyncio.Event()

        async def endless() -> None:
            await asyncio.Event().wait()

        async def short() -> None:
            done.append("short")

        await unless(stop, short())
        asyncio.get_running_loop().call_soon(stop.set)
        await unless(stop, endless())
        with pytest.raises(ValueError, match="no number"):
            await unless(asyncio.Event(), failing())
        return done

    async def failing() -> None:
        raise ValueError("no number")

    assert asyncio.run(run()) == ["short"]


def test_a_collector_that_does_not_answer_keeps_no_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers = threading.Event()

    def finish() -> None:
        answers.wait(PATIENCE_S)

    spans = Spans(TracerProvider(), "demo", finish)
    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(spans.close(0.0))
        assert "did not take the last traces within 0 s" in caplog.text
        answers.set()
        assert asyncio.run(spans.close(PATIENCE_S))
        assert asyncio.run(Spans(TracerProvider(), "demo").close(0.0))
    assert len(caplog.records) == 1
