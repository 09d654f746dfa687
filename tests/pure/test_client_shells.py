"""Client and RouterClient over real sockets: the same stream from both when the router is replaced."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import pytest

from baton.client.aio import Queue, RouterClient
from baton.client.blocking import Client
from baton.client.tracker import News
from baton.params import GenerationParams
from baton.wire.channel import Listener
from baton.wire.messages import Abort, Accepted, Emitted, Finished, GetClusterInfo, Message, Submit
from baton.wire.records import Timings
from tests.pure.pretend_router import info

DEADLINE_S = 30.0
SUBMIT = Submit("r", (1, 2), GenerationParams(3))


class Shell(Protocol):
    """What both clients can do here."""

    news: list[News]

    def submit(self) -> None: ...
    async def turn(self) -> None: ...
    def close(self) -> None: ...


class Blocking:
    def __init__(self, address: str) -> None:
        self.news: list[News] = []
        self._client = Client(address)

    def submit(self) -> None:
        self._client.submit(SUBMIT)

    async def turn(self) -> None:
        self.news += [each for each in self._client.poll(0.005) if isinstance(each, News)]

    def close(self) -> None:
        self._client.close()


class Aio:
    def __init__(self, address: str) -> None:
        self.news: list[News] = []
        self._queue: Queue = Queue()
        self._client = RouterClient(address)
        self._client.connect()

    def submit(self) -> None:
        self._client.submit(SUBMIT, self._queue)

    async def turn(self) -> None:
        await asyncio.sleep(0.005)
        while not self._queue.empty():
            self.news.append(self._queue.get_nowait()[1])

    def close(self) -> None:
        self._client.close()


class Router:
    """Answers GetClusterInfo, and records the ids of Submit and Abort."""

    def __init__(self, address: str) -> None:
        self._listener = Listener(address)
        self._peer = ""
        self.submitted: list[str] = []
        self.aborted: list[str] = []

    def turn(self) -> None:
        for peer, messages in self._listener.receive():
            self._peer = peer
            for message in messages:
                match message:
                    case GetClusterInfo():
                        self.send(info())
                    case Submit(request=name):
                        self.submitted.append(name)
                    case Abort(name):
                        self.aborted.append(name)

    def send(self, *messages: Message) -> None:
        assert self._listener.send(self._peer, *messages)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def address() -> Iterator[str]:
    with TemporaryDirectory(prefix="bt-", dir="/tmp") as folder:
        yield f"ipc://{Path(folder)}/r.sock"


async def until(shell: Shell, router: Router, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{router.submitted}, {shell.news}"
        router.turn()
        await shell.turn()


@pytest.mark.parametrize("kind", [Blocking, Aio])
def test_a_replaced_router_continues_the_stream(kind: type[Shell], address: str) -> None:
    async def work() -> list[News]:
        first = Router(address)
        shell = kind(address)  # type: ignore[call-arg]
        shell.submit()
        await until(shell, first, lambda: first.submitted == ["r"])
        first.send(Accepted("r", 2, 0.0), Emitted("r", (5,), "a"))
        await until(shell, first, lambda: len(shell.news) == 2)
        first.close()
        second = Router(address)
        await until(shell, second, lambda: second.submitted == ["r.1"])
        assert second.aborted == ["r"]
        second.send(
            Accepted("r.1", 2, 0.0),
            Emitted("r.1", (5, 6), "ab"),
            Emitted("r.1", (7,), "c"),
            Finished("r.1", "length", Timings()),
        )
        await until(shell, second, lambda: isinstance(shell.news[-1], Finished))
        shell.close()
        second.close()
        return shell.news

    assert asyncio.run(work()) == [
        Accepted("r", 2, 0.0),
        Emitted("r", (5,), "a"),
        Emitted("r", (6,), "b"),
        Emitted("r", (7,), "c"),
        Finished("r", "length", Timings()),
    ]
