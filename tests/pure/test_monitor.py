"""What a server keeps of the router's events has a bound, however many come within its time."""

import asyncio
import json
from dataclasses import replace

import pytest

from baton.client.aio import RouterClient
from baton.server import monitor as under_test
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.timeline import Moment
from baton.wire.messages import Observed
from baton.wire.records import Ended, Timings
from tests.pure.test_exposition import FIRST, counts_of

MANY = 100


def test_a_busy_second_leaves_no_more_than_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_BACKLOG", 30)
    monkeypatch.setattr(under_test, "REMEMBERED", 20)
    monitor = Monitor(RouterClient("ipc:///nowhere"), Metrics("m"))
    for index in range(MANY):
        name = f"r{index}"
        moments = tuple(Moment(name, 1.0, state) for state in ("queued", "finished"))
        ended = (Ended(name, "stop", 3, 2, "shm", Timings()),)
        first = (replace(FIRST, request=name),)
        monitor.observed(Observed(1.0, moments, ended, counts_of("r/1", 8), first))

    async def page() -> list[bytes]:
        feed = monitor.feed()
        found = [await anext(feed) for _ in range(3)]
        await feed.aclose()
        return found

    _, moments_event, numbers_event = asyncio.run(page())
    shown = json.loads(moments_event.decode().partition("data: ")[2])["moments"]
    assert [each["request"] for each in shown] == [f"r{i}" for i in range(85, MANY) for _ in "ab"]
    rests_on = json.loads(numbers_event.decode().partition("data: ")[2])["rests_on"]
    assert (rests_on["ended"], rests_on["first_tokens"]) == (20, 20)
