"""How long a request may wait and take, and what its client is told: over the whole application."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from baton.server import service as service_module
from baton.wire import messages as msg
from tests.pure.town_app import TownClient, WordyTown, serving

PATH = "/v1/completions"
PROMPT = {"prompt": "In the future", "max_tokens": 4}


class Refusing(WordyTown):
    """A town whose router gives every request up."""

    code = "queue_timeout"

    def answer(self, asked: Any) -> list[msg.Message]:
        self.asked = [each for each in asked if isinstance(each, msg.Submit)]
        said: list[msg.Message] = []
        for each in self.asked:
            said += [
                msg.Accepted(each.request, 3, 0.0),
                msg.Failed(each.request, self.code, "too late"),
            ]
        return said or super().answer(asked)


@pytest.mark.parametrize(
    ("code", "status", "retry"), [("queue_timeout", 503, "2"), ("deadline_exceeded", 504, None)]
)
def test_a_request_that_is_too_late_is_told_so(code: str, status: int, retry: str | None) -> None:
    async def work() -> None:
        town = Refusing()
        town.code = code
        async with serving(town, request_timeout_s=90.0) as client:
            answer = await client.ask(PATH, PROMPT | {"timeout": 7.5}, submits=1)
            assert (answer.status, answer.json["error"]["code"]) == (status, code)
            assert answer.headers.get("retry-after") == retry
            again = answer.headers.get("x-should-retry")  # what openai's client goes by
            assert again == (None if retry else "false")
            (submit,) = town.asked
            assert 0 < submit.timeout_s <= 7.5
            assert submit.queue_timeout_s == 60
            assert (submit.tenant, submit.group) == ("127.0.0.1", submit.request.rpartition("-")[0])
            stream = await client.ask(PATH, PROMPT | {"stream": True}, submits=1)
            assert stream.status == 200
            assert f'"code":"{code}"' in stream.body.decode()
            assert stream.body.endswith(b"data: [DONE]\n\n")
            (submit,) = town.asked
            assert 80 < submit.timeout_s <= 90

    asyncio.run(work())


@pytest.mark.parametrize("timeout", [0, -1, 1e-400, 90.5, 86401, True, "1", [], {}])
def test_a_timeout_is_a_number_of_seconds_within_the_servers_own(timeout: Any) -> None:
    async def work() -> None:
        async with serving(request_timeout_s=90.0) as client:
            answer = await client.ask(PATH, PROMPT | {"timeout": timeout})
            assert (answer.status, answer.json["error"]["param"]) == (400, "timeout")

    asyncio.run(work())


def set_info(client: TownClient, **changes: Any) -> None:
    """What the router says of its cluster."""
    tracker = client.service.router._tracker
    assert tracker.info is not None
    tracker.info = replace(tracker.info, **changes)


def test_a_cluster_that_is_down_says_why_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a short time. Until then a worker may be restarting, and requests wait for it."""
    now = 1000.0
    monkeypatch.setattr(service_module, "monotonic", lambda: now)

    async def work() -> None:
        nonlocal now
        async with serving() as client:
            set_info(
                client, ready=False, waiting_for="decode-0 died 5 times; its log: decode-0.log"
            )
            client.service.look()
            for path in ("/health", "/readyz"):
                answer = await client.ask(path)
                assert answer.status == 503
                assert "decode-0.log" in answer.body.decode()
            now += service_module.RESTART_S - 1
            assert (await client.ask(PATH, PROMPT, submits=1)).status == 200
            now += 2
            client.service.look()
            answer = await client.ask(PATH, PROMPT)
            assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
            assert "decode-0.log" in answer.json["error"]["message"]
            assert answer.headers["retry-after"]
            set_info(client, ready=True, degraded="no prefill worker")
            assert (await client.ask(PATH, PROMPT, submits=1)).status == 200
            answer = await client.ask("/readyz")
            assert (answer.status, answer.json["degraded"]) == (200, "no prefill worker")

    asyncio.run(work())


def test_places_are_given_back_however_a_request_ends() -> None:
    async def work() -> None:
        async with serving(max_queued=16) as client:
            admission = client.service.admission
            for body, status, submits in (
                (PROMPT | {"n": 3}, 200, 3),
                (PROMPT | {"n": 2, "stream": True}, 200, 2),
                (PROMPT | {"prompt": [[5]] * 40}, 200, 0),
                (PROMPT | {"prompt": [1, 99999]}, 400, 0),
                (PROMPT | {"prompt": "a" * 100_000}, 400, 0),
                (PROMPT | {"guided_regex": "("}, 400, 0),
                (PROMPT | {"prompt": [[5]] * 256, "n": 16}, 400, 0),
            ):
                answer = await client.ask(PATH, body, submits=submits)
                assert answer.status == status, body
                assert (admission.waiting, admission.in_lines) == (0, 0)

    asyncio.run(work())


def test_a_full_queue_is_told_with_its_limit() -> None:
    async def work() -> None:
        async with serving(max_queued=16) as client:
            ticket = client.service.admission.take("another", 16)
            answer = await client.ask(PATH, PROMPT)
            assert (answer.status, answer.json["error"]["code"]) == (503, "overloaded")
            assert "16" in answer.json["error"]["message"]
            assert answer.headers["retry-after"] == "2"
            metrics = (await client.ask("/metrics")).body.decode()
            assert 'baton:num_requests_admitted{model_name="pretend"} 16.0' in metrics
            ticket.close()

    asyncio.run(work())
