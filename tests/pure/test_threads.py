"""Work beside the event loop: tenants take turns, and no one takes more than half."""

import asyncio
from contextvars import copy_context
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.server.threads import TENANT, FairThreads, Turns
from tests.pure.listening import HEAD, POST, serving

PATIENCE_S = 20


def test_one_that_floods_leaves_a_place_and_waits_for_its_turn() -> None:
    turns = Turns[str](3)
    for job in ("a1", "a2", "a3", "a4"):
        turns.add("a", job)
    assert [turns.next(), turns.next(), turns.next()] == [("a", "a1"), ("a", "a2"), None]
    turns.add("b", "b1")
    turns.add("b", "b2")
    assert [turns.next(), turns.next()] == [("b", "b1"), None]
    turns.done("a")
    assert turns.next() == ("a", "a3")  # one of each runs: it has waited longer
    turns.done("b")
    assert turns.next() == ("b", "b2")


def test_alone_in_a_single_place_it_is_served_in_order() -> None:
    turns = Turns[int](1)
    for job in range(3):
        turns.add("a", job)
    for job in range(3):
        assert turns.next() == ("a", job)
        assert turns.next() is None
        turns.done("a")
    assert turns.next() is None


@given(st.lists(st.sampled_from(["a", "b", "c", "begin", "end"])), st.integers(1, 4))
def test_every_job_begins_once_and_none_waits_without_a_reason(
    steps: list[str], places: int
) -> None:
    turns, added, begun, running = Turns[int](places), 0, list[int](), list[str]()

    def begin() -> bool:
        found = turns.next()
        if found is not None:
            begun.append(found[1])
            running.append(found[0])
        return found is not None

    for step in steps:
        if step == "begin":
            begin()
        elif step == "end" and running:
            turns.done(running.pop())
        elif step in "abc":
            turns.add(step, added)
            added += 1
        assert len(running) <= places
        assert all(running.count(each) <= (places + 1) // 2 for each in "abc")
    while begin() or running:
        if running:
            turns.done(running.pop())
    assert sorted(begun) == list(range(added))


def test_a_flood_in_threads_does_not_stop_others() -> None:
    """asyncio's own executor would let the last one wait for ever here."""
    go_on, order = Event(), list[str]()

    def job(name: str, *, waits: bool) -> str:
        if waits:
            assert go_on.wait(PATIENCE_S)
        order.append(name)
        return name

    async def work() -> None:
        asyncio.get_running_loop().set_default_executor(FairThreads(3))
        flood = [as_tenant("a", f"a{each}", waits=True) for each in range(9)]
        await asyncio.sleep(0)
        flood[-1].cancel()
        assert await asyncio.wait_for(as_tenant("b", "b", waits=False), PATIENCE_S) == "b"
        go_on.set()
        assert await asyncio.gather(*flood[:-1]) == [f"a{each}" for each in range(8)]
        assert order[0] == "b"
        assert "a8" not in order

    def as_tenant(tenant: str, name: str, *, waits: bool) -> "asyncio.Task[str]":
        context = copy_context()
        context.run(TENANT.set, tenant)
        return asyncio.create_task(asyncio.to_thread(job, name, waits=waits), context=context)

    asyncio.run(work())


def test_errors_are_those_of_the_work_and_what_waits_at_the_end_is_cancelled() -> None:
    threads, go_on = FairThreads(1), Event()
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(PATIENCE_S)
    first, second = threads.submit(go_on.wait, PATIENCE_S), threads.submit(int)
    threads.shutdown(wait=False)
    go_on.set()
    assert first.result(PATIENCE_S)
    assert second.cancelled()
    with pytest.raises(RuntimeError):
        threads.submit(int)


def test_the_server_works_for_who_asks() -> None:
    """A large body is scanned and parsed as its tenant's."""
    seen: list[str] = []

    async def work() -> None:
        async with serving() as served:
            plain = served.app.__call__

            async def spy(scope: object, receive: object, send: object) -> None:
                seen.append(TENANT.get())
                await plain(scope, receive, send)

            served.guard._app = spy
            served.guard._inside = served.guard._answered
            body = b'{"prompt":""}'
            length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            await served.ask(POST + length + body)
            await served.ask(HEAD + b"Connection: close\r\n\r\n")

    asyncio.run(work())
    assert seen == ["127.0.0.1"] * 2
