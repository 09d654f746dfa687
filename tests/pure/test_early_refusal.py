"""Requests that are refused before they are parsed: the same answers, and none that would be accepted."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.server.admission import Admission
from baton.server.api_error import MESSAGES_PATH, ApiError
from baton.server.bodies import GENERATING, PIECE, limits_of
from baton.server.guard import AccessPolicy, Guard
from baton.server.quotas import Quotas
from tests.patience import PATIENCE_S
from tests.pure.listening import POST
from tests.pure.listening import serving as listening
from tests.pure.test_websocket import exchange
from tests.pure.town_app import Answer, TownClient, serving

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
PROMPT = {"prompt": "In the future", "max_tokens": 4}
UNREADABLE = b"[" * 40 + b"no JSON"
FULL = "the server is busy: 16 requests are waiting (limit 16); try again in 2 s"


def why_not(check: Callable[[], object]) -> str:
    """Of a refusal; empty if there is none."""
    try:
        check()
    except ApiError as error:
        return f"{error.status} {error.code} {error.retry_after} {error.message}"
    return ""


# ---- the decision


@given(
    st.integers(1, 24),
    st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 40), st.booleans()), max_size=60),
)
def test_who_is_refused_early_is_refused_for_any_number_of_choices(
    limit: int, steps: list[tuple[str, int, bool]]
) -> None:
    admission = Admission(limit)
    for tenant, choices, kept in steps:
        early = why_not(lambda: admission.check(tenant, 1))  # noqa: B023
        before = admission.waiting, admission.in_lines
        assert why_not(lambda: admission.take(tenant, 1).close()) == early  # noqa: B023
        assert (admission.waiting, admission.in_lines) == before
        try:
            ticket = admission.take(tenant, choices)
        except ApiError:
            continue
        assert not early
        if not kept:
            ticket.close()


@given(
    st.sampled_from([{"requests": 2}, {"tokens": 60}, {"requests": 2, "tokens": 60}, {}]),
    st.lists(
        st.tuples(st.sampled_from("AB"), st.integers(0, 90), st.floats(0, 40), st.booleans()),
        max_size=40,
    ),
)
def test_a_quota_that_is_used_up_is_told_early_and_asking_takes_nothing(
    limits: dict[str, int], steps: list[tuple[str, int, float, bool]]
) -> None:
    asked, silent, now = Quotas(**limits), Quotas(**limits), 0.0
    for tenant, tokens, pause, ends in steps:
        now += pause
        early = why_not(lambda: asked.check(tenant, now))  # noqa: B023
        for quotas in (asked, silent):
            late = ""
            try:
                place = quotas.take(tenant, now)
            except ApiError as error:
                late = f"{error.status} {error.code} {error.retry_after} {error.message}"
            else:
                place.charge(tokens, now)
                if ends:
                    place.close(tokens, now)
            assert early == late
    assert len(asked) == len(silent)


# ---- over the whole application


@pytest.mark.parametrize("path", sorted(GENERATING))
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_refuses_what_it_has_not_parsed(path: str, stream: bool) -> None:
    async def work() -> None:
        async with serving(max_queued=16) as client:
            parsed = await refused_after_parsing(client)
            ticket = client.service.admission.take("another", 16)
            good = json.dumps(PROMPT | {"stream": stream}).encode()
            wanted, names = parsed.json, set(parsed.headers)
            if path.startswith(MESSAGES_PATH):  # Anthropic's form
                about = {"type": "overloaded_error", "message": FULL}
                wanted, names = {"type": "error", "error": about}, names | {"request-id"}
            for body in (good, UNREADABLE):
                answer = await client.ask(path, body)
                if path.startswith(MESSAGES_PATH):
                    wanted["request_id"] = answer.headers["request-id"]
                assert (answer.status, answer.json) == (503, wanted)
                assert answer.json["error"]["message"] == FULL
                assert answer.headers["retry-after"] == "2"
                assert "connection" not in answer.headers
                assert set(answer.headers) == names
            assert (await client.ask("/tokenize", {"prompt": "a"})).status == 200
            metrics = (await client.ask("/metrics")).body.decode()
            assert 'reason="overloaded"} 3.0' in metrics
            ticket.close()
            assert (await client.ask(path, UNREADABLE)).status == 400

    asyncio.run(work())


async def refused_after_parsing(client: TownClient) -> Answer:
    """The answer to a request for which there seemed to be room while it was read."""
    service, take = client.service, client.service.admission.take
    tickets = []

    def late(tenant: str, choices: int) -> Any:
        tickets.append(take("another", 16))
        return take(tenant, choices)

    service.admission.take = late  # type: ignore[method-assign]
    answer = await client.ask(PATH, PROMPT)
    service.admission.take = take  # type: ignore[method-assign]
    for ticket in tickets:
        ticket.close()
    return answer


def test_so_do_a_quota_and_a_server_that_stops() -> None:
    async def work() -> None:
        async with serving(requests_per_key=1) as client:
            place = client.service.quotas.take("127.0.0.1", 0.0)
            answer = await client.ask(PATH, UNREADABLE)
            assert (answer.status, answer.json["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.headers["retry-after"] == "1"
            place.close(0, 0.0)
            client.service.draining = True
            answer = await client.ask(PATH, UNREADABLE)
            assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
            assert "shutting down" in answer.json["error"]["message"]

    asyncio.run(work())


def test_while_no_router_answers_a_request_waits_for_one_and_is_read() -> None:
    async def work() -> None:
        async with serving(max_queued=16) as client:
            client.service.router._tracker.info = None
            ticket = client.service.admission.take("another", 16)
            assert (await client.ask(PATH, UNREADABLE)).status == 400
            ticket.close()

    asyncio.run(work())


def test_a_websocket_is_told_the_same_and_may_still_cancel() -> None:
    async def work() -> None:
        async with serving(max_queued=16) as client:
            ticket = client.service.admission.take("another", 16)
            invalid = json.dumps({"prompt": 5, "max_tokens": "x"})
            for text in (json.dumps(PROMPT), invalid):
                (answer,) = await exchange(client, text)
                assert answer["error"]["message"] == FULL
                assert answer["id"] is None
            ticket.close()
            (answer,) = await exchange(client, invalid)
            assert answer["error"]["type"] == "invalid_request_error"

    asyncio.run(work())


# ---- while a body arrives


class Reader:
    """The application: tells what it was given."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})


class Slow:
    """A guard with a body under way."""

    def __init__(self) -> None:
        self.full = False
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http", "method": "POST", "path": PATH, "query_string": b"", "client": ("1.1.1.1", 1),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        guard = Guard(Reader(), AccessPolicy(), lambda path: limits_of(path, 1024), self.check_room)
        self.task = asyncio.ensure_future(guard(scope, self.parts.get, self.send))

    def check_room(self, path: str, tenant: str) -> None:
        assert (path, tenant) == (PATH, "1.1.1.1")
        if self.full:
            raise ApiError.overloaded(1, 1, 2)

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def part(self, body: bytes, *, full: bool, last: bool = False) -> None:
        """It arrives, and is handled."""
        self.full = full
        self.parts.put_nowait({"type": "http.request", "body": body, "more_body": not last})
        while not self.task.done() and not self.parts.empty():
            await asyncio.sleep(0)
        for _ in range(len(body) // PIECE + 3):
            await asyncio.sleep(0)
        if last or self.task.done():
            await self.task

    def answer(self) -> tuple[int, bytes]:
        return self.sent[0]["status"], self.sent[1]["body"]


DEEP = b"[" * 20


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([(b"[1,", True), (b"2]", False)], 200),
        ([(b"[1,", False), (b"2]", True)], 503),
        ([(DEEP, True), (DEEP, True), (b"", True)], 503),
        ([(DEEP, True), (DEEP, False)], 400),
        ([(DEEP, True), (b"1", True), (DEEP, False), (b"]", False)], 400),
        ([(DEEP, True), (b"1," * PIECE, False), (b"1" + b"]" * 20, False)], 200),
        ([(DEEP, False), (b"1" + b"]" * 20, True), (b" ", False)], 200),
    ],
)
def test_it_is_decided_when_all_has_come_and_nothing_escapes_the_limits(
    parts: list[tuple[bytes, bool]], status: int
) -> None:
    async def work() -> None:
        slow = Slow()
        for number, (body, full) in enumerate(parts, 1):
            if not slow.task.done():
                await slow.part(body, full=full, last=number == len(parts))
        found, content = slow.answer()
        assert found == status
        if status == 200:
            assert int(content) == sum(len(body) for body, _ in parts)

    asyncio.run(work())


def test_a_connection_is_used_again_after_a_refusal() -> None:
    """Also after one whose body came in several parts."""

    async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        assert b"connection" not in fields
        if b"content-length" in fields:
            return int(head.split()[1]), await reader.readexactly(int(fields[b"content-length"]))
        chunk = await reader.readuntil(b"0\r\n\r\n")
        return int(head.split()[1]), chunk

    async def work() -> None:
        full = True

        def check_room(path: str, tenant: str) -> None:
            if full:
                raise ApiError.overloaded(1, 1, 2)

        async with listening() as served:
            served.guard._check_room = check_room
            reader, writer = await served.open()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    for size in (2, 500_000):
                        body = b"[" + b" " * size + b"]"
                        writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                        status, content = await answer(reader)
                        assert (status, json.loads(content)["error"]["code"]) == (503, "overloaded")
                    assert served.app.asked == []
                    full = False
                    writer.write(POST + b"Content-Length: 2\r\n\r\n[]")
                    assert (await answer(reader))[0] == 200
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    asyncio.run(work())
