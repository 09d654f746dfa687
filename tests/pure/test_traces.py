"""The trace of a whole history, and a page's beginning: made beside the event loop, shared, in pieces."""

import asyncio
import json
import threading
from typing import Any

import pytest

from baton import timeline as timeline_module
from baton.client.aio import RouterClient
from baton.server import traces as under_test
from baton.server.metrics import Metrics
from baton.server.monitor import AT_ONCE, Monitor
from baton.server.traces import Traces, encoded
from baton.timeline import Life, Moment, Timeline
from baton.trace import chrome_trace
from baton.wire.messages import Observed
from tests.pure.test_exposition import counts_of

STATES = ("queued", "reserving", "filling", "decoding", "finished")


def history(requests: int) -> Timeline:
    """So many that have ended, and one that has not."""
    timeline = Timeline()
    for index in range(requests):
        timeline.add(
            Moment(f"r{index}", float(at), state, "w/1") for at, state in enumerate(STATES)
        )
    timeline.add([Moment("last", 9.0, "queued")])
    return timeline


@pytest.mark.parametrize("requests", [0, 1, 700])
def test_the_pieces_are_the_whole(requests: int) -> None:
    trace = chrome_trace(history(requests), model='a "traceEvents":[] b')
    assert json.loads(encoded(trace)) == trace
    nothing: dict[str, Any] = trace | {"traceEvents": []}
    assert json.loads(encoded(nothing)) == nothing


def test_it_is_made_in_a_thread_of_what_there_was_when_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeline, begun, go_on, made_by = history(5), threading.Event(), threading.Event(), []

    def slow(lives: Any, *, model: str) -> dict[str, Any]:
        made_by.append(threading.current_thread())
        begun.set()
        assert go_on.wait(20)
        return chrome_trace(lives, model=model)

    monkeypatch.setattr(under_test, "chrome_trace", slow)
    expected = encoded(chrome_trace(timeline, model="m"))

    async def work() -> None:
        traces = Traces(timeline, lambda: "m")
        first = asyncio.create_task(traces.text())
        await asyncio.to_thread(begun.wait, 20)
        timeline.add([Moment("last", 12.0, "finished"), Moment("later", 12.0, "queued")])
        second, leaver = [asyncio.create_task(traces.text()) for _ in range(2)]
        await asyncio.sleep(0)
        leaver.cancel()
        go_on.set()
        assert await first is await second
        assert await first == expected

    asyncio.run(work())
    assert len(made_by) == 1
    assert made_by[0] is not threading.main_thread()


def test_only_the_thread_unpacks_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline, unpacked_by, unpacked = history(3), [], timeline_module._unpacked

    def seen(request: str, packed: bytes) -> Life:
        unpacked_by.append(threading.current_thread())
        return unpacked(request, packed)

    monkeypatch.setattr(timeline_module, "_unpacked", seen)
    asyncio.run(Traces(timeline, lambda: "m").text())
    assert len(unpacked_by) == len(timeline)
    assert threading.main_thread() not in unpacked_by


def test_it_is_given_again_for_a_time_that_grows_with_its_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, made = [100.0], []

    def costly(lives: Any, *, model: str) -> dict[str, Any]:
        now[0] += 2.0
        made.append(now[0])
        return chrome_trace(lives, model=model)

    monkeypatch.setattr(under_test, "chrome_trace", costly)
    monkeypatch.setattr(under_test, "monotonic", lambda: now[0])

    async def work() -> None:
        traces = Traces(history(1), lambda: "m")
        first = await traces.text()
        now[0] += 19.0
        assert await traces.text() is first
        now[0] += 2.0
        assert await traces.text() is not first

    asyncio.run(work())
    assert made == [102.0, 125.0]


def test_a_page_begins_with_pieces_that_pages_share() -> None:
    monitor = Monitor(RouterClient("ipc:///nowhere"), Metrics("m"))
    moments = tuple(Moment(f"r{index}", 1.0, "queued") for index in range(3 * AT_ONCE - 1))
    monitor.observed(Observed(1.0, moments, (), counts_of("r/1", 8), ()))

    async def page() -> list[dict[str, Any]]:
        feed = monitor.feed()
        kinds = [(await anext(feed)).decode().partition("\ndata: ") for _ in range(5)]
        assert [kind for kind, _, _ in kinds] == [
            "event: cluster", *["event: moments"] * 3, "event: numbers",
        ]  # fmt: skip
        await feed.aclose()
        return [json.loads(data) for _, _, data in kinds[1:4]]

    async def late() -> list[str]:
        """What comes between a page's first event and its next is in one of them only."""
        feed = monitor.feed()
        await anext(feed)
        monitor.observed(Observed(2.0, (Moment("new", 2.0, "queued"),), (), None, ()))
        return [(await anext(feed)).decode() for _ in range(5)]

    first = asyncio.run(page())
    shown = [each["request"] for data in first for each in data["moments"]]
    assert shown == [each.request for each in moments]
    assert monitor._shared_backlog() is monitor._shared_backlog()
    assert ['"new"' in each for each in asyncio.run(late())] == [False] * 4 + [True]
