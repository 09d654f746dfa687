"""Client and RouterClient over real sockets: the same stream from both when the router is replaced, and
what the supervisor's Client reports to each router."""

import asyncio
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
from baton.wire.messages import (
    Abort,
    Accepted,
    ClusterInfo,
    Emitted,
    Finished,
    GetClusterInfo,
    Message,
    Submit,
    Supervised,
)
from baton.wire.records import ProcessDown, Timings
from tests.patience import patiently
from tests.pure.pretend_router import info

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
        self.reports: list[tuple[ProcessDown, ...]] = []

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
                    case Supervised(down):
                        self.reports.append(down)

    def send(self, *messages: Message) -> None:
        assert self._listener.send(self._peer, *messages)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def address() -> Iterator[str]:
    with TemporaryDirectory(prefix="bt-", dir="/tmp") as folder:
        yield f"ipc://{Path(folder)}/r.sock"


async def until(shell: Shell, router: Router, condition: Callable[[], bool]) -> None:
    for _ in patiently(lambda: f"{router.submitted}, {shell.news}"):
        if condition():
            return
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


class Supervisor:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.seen: list[ClusterInfo] = []
        self.reported: tuple[ProcessDown, ...] = ()

    def check(self, info: ClusterInfo | None) -> list[str]:
        if info is not None:
            self.seen.append(info)
        return []

    def down(self) -> tuple[ProcessDown, ...]:
        return self.reported


def down(deaths: int, restart_in_s: float) -> ProcessDown:
    return ProcessDown("decode-0", "decode", deaths, "signal 9", restart_in_s, "/tmp/decode-0.log")


def turns(client: Client, router: Router, condition: Callable[[], bool]) -> None:
    for _ in patiently(lambda: router.reports):
        if condition():
            return
        router.turn()
        client.poll(0.005)


def settled(client: Client, router: Router) -> None:
    """Whatever was on its way has arrived: the answer to a question sent after it is here."""
    router.send(info())
    before = client._unchecked
    turns(client, router, lambda: client._unchecked is not before)
    turns(client, router, lambda: client._unchecked is None)


def test_a_router_is_told_what_is_down_after_every_change_and_so_is_the_next_one(
    address: str,
) -> None:
    supervisor = Supervisor()
    client = Client(address, supervise=supervisor.check, down=supervisor.down)
    first = Router(address)
    turns(client, first, lambda: bool(supervisor.seen))
    assert first.reports == []  # nothing is down, and it knows of nothing else
    told = [(down(1, 0.0),), (down(2, 0.5),), (down(2, 0.0),), ()]
    for count, each in enumerate(told, 1):
        supervisor.reported = each
        turns(client, first, lambda count=count: len(first.reports) >= count)
    assert first.reports == told
    supervisor.reported = (down(3, 1.0),)
    turns(client, first, lambda: len(first.reports) == 5)
    supervisor.reported = (down(3, 0.4),)  # time passes: no news
    settled(client, first)
    assert len(first.reports) == 5
    seen = len(supervisor.seen)
    first.close()
    second = Router(address)
    turns(client, second, lambda: bool(second.reports))
    assert second.reports == [(down(3, 0.4),)]
    assert len(supervisor.seen) > seen
    client.close()
    second.close()


def test_a_report_is_withdrawn_after_the_connection_was_cut_too(address: str) -> None:
    """Perhaps it is the same router, which still has the last report."""
    supervisor = Supervisor()
    supervisor.reported = (down(1, 0.0),)
    client = Client(address, supervise=supervisor.check, down=supervisor.down)
    first = Router(address)
    turns(client, first, lambda: bool(first.reports))
    first.close()
    supervisor.reported = ()
    second = Router(address)
    turns(client, second, lambda: bool(second.reports))
    assert second.reports == [()]
    client.close()
    second.close()
