"""What one client may ask for: requests at once, tokens a minute; and 429 beyond that, over HTTP."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.clock import monotonic
from baton.server.api_error import ApiError
from baton.server.quotas import SWEEP, Place, Quotas, duration
from tests.pure.town_app import TownClient, serving


def refused(quotas: Quotas, tenant: str, now: float) -> int:
    """Seconds that it is told to wait."""
    with pytest.raises(ApiError) as caught:
        quotas.take(tenant, now)
    error = caught.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after is not None
    return error.retry_after


def test_requests_at_once_are_counted_by_tenant() -> None:
    quotas = Quotas(requests=2)
    first, second = quotas.take("a", 0.0), quotas.take("a", 0.0)
    refused(quotas, "a", 0.0)
    quotas.take("b", 0.0)
    first.close(5, 1.0)
    first.close(5, 1.0)
    quotas.take("a", 1.0)
    refused(quotas, "a", 1.0)
    second.close(0, 2.0)
    quotas.take("a", 2.0)


def test_tokens_come_back_with_time_and_a_large_request_only_waits_longer() -> None:
    quotas = Quotas(tokens=60)
    place = quotas.take("a", 0.0)
    place.charge(30, 0.0)
    quotas.take("a", 0.0).charge(90, 0.0)  # 60 too many
    assert refused(quotas, "a", 0.0) == 61
    assert refused(quotas, "a", 30.0) == 31
    quotas.take("a", 61.0)
    place.close(20, 61.0)  # ten were not needed
    quotas.take("a", 61.0)
    quotas.take("b", 0.0)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.floats(0, 50)), max_size=30))
def test_over_any_time_a_client_gets_its_rate_and_one_bucket_and_what_it_overdraws(
    asked: list[tuple[int, int, float]],
) -> None:
    quotas, now, used, last = Quotas(tokens=60), 0.0, 0, 0
    for estimate, took, pause in asked:
        now += pause
        try:
            place = quotas.take("a", now)
        except ApiError as error:
            now += error.retry_after or 0
            quotas.take("a", now).close(0, now)
            continue
        assert used <= now + 60 + 1e-6
        place.charge(estimate, now)
        place.close(took, now)
        used, last = used + took, took
    assert used <= now + 60 + last + 1e-6


def test_who_is_like_new_is_forgotten_and_nobody_else() -> None:
    quotas = Quotas(requests=1, tokens=60)
    held = quotas.take("held", 0.0)
    quotas.take("poor", 0.0).close(10**6, 0.0)
    for index in range(3 * SWEEP):
        quotas.take(f"c{index}", index * 100.0).close(1, index * 100.0)
    assert len(quotas) <= 2 * SWEEP + 4
    refused(quotas, "held", 0.0)
    assert refused(quotas, "poor", 3 * SWEEP * 100.0) > 1
    held.close(0, 0.0)
    assert isinstance(quotas.take("held", 0.0), Place)


@pytest.mark.parametrize("limits", [{}, {"requests": 1}])
def test_without_a_limit_on_tokens_nothing_is_kept_of_who_has_left(limits: dict[str, int]) -> None:
    quotas = Quotas(**limits)
    for index in range(3 * SWEEP):
        place = quotas.take(f"c{index}", float(index))
        place.charge(100, float(index))
        place.charge(20, float(index))
        place.close(130 - index % 50, float(index))
        assert len(quotas) == 0


HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


def test_over_http_one_key_is_told_to_wait_and_the_other_is_served() -> None:
    async def work() -> None:
        options = {"api_keys": ("one", "two"), "tokens_per_key": 10, "requests_per_key": 1}
        async with serving(**options) as client:
            assert await status(client, "one") == (200, None)  # more than 10 tokens
            code, retry = await status(client, "one")
            assert code == 429
            assert int(retry or 0) > 0
            assert await status(client, "two") == (200, None)
            metrics = await client.ask("/metrics", headers={"authorization": "Bearer one"})
            assert 'reason="rate_limit_exceeded"} 1.0' in metrics.body.decode()

    async def status(client: TownClient, key: str) -> tuple[int, str | None]:
        headers = {"authorization": f"Bearer {key}"}
        answer = await client.ask("/v1/chat/completions", HELLO, headers=headers)
        return answer.status, answer.headers.get("retry-after")

    asyncio.run(work())


def test_a_request_that_is_refused_or_fails_leaves_its_place() -> None:
    async def work() -> None:
        async with serving(requests_per_key=1) as client:
            for _ in range(2):
                bad = {"messages": HELLO["messages"], "max_tokens": 10**6}
                assert (await client.ask("/v1/chat/completions", bad)).status == 400
                assert (
                    await client.ask("/v1/completions", {"prompt": "a", "model": "x"})
                ).status == 404
            good = await client.ask("/v1/chat/completions", HELLO | {"stream": True}, submits=1)
            assert good.status == 200
            assert (await client.ask("/v1/chat/completions", HELLO, submits=1)).status == 200

    asyncio.run(work())


def test_what_is_left_is_told_as_openai_tells_it() -> None:
    quotas = Quotas(requests=2, tokens=60)
    place = quotas.take("a", 0.0)
    place.charge(15, 0.0)
    assert quotas.headers("a", 0.0) == {
        "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "0ms", "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "45", "x-ratelimit-reset-tokens": "15s",
    }  # fmt: skip
    quotas.take("a", 0.0).charge(90, 0.0)
    found = quotas.headers("a", 5.0)
    assert found["x-ratelimit-remaining-requests"] == found["x-ratelimit-remaining-tokens"] == "0"
    assert found["x-ratelimit-reset-requests"] == "1s"
    assert found["x-ratelimit-reset-tokens"] == "1m40s"
    assert quotas.headers("b", 5.0)["x-ratelimit-remaining-tokens"] == "60"
    assert Quotas().headers("a", 0.0) == {}
    assert len(Quotas(tokens=3)) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.0123, "13ms"), (1.0, "1s"), (1.5, "1.5s"), (60.0, "1m0s"), (90.2, "1m31s")],
)
def test_durations_are_not_shorter_than_they_are(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_headers_and_metrics_show_the_share_of_each_key() -> None:
    limits = {"requests_per_key": 3, "tokens_per_key": 1000}

    async def work() -> None:
        async with serving(api_keys=("key-of-ann", "key-of-bob"), **limits) as client:
            own = {"authorization": "Bearer key-of-bob"}
            answer = await client.ask(
                "/v1/completions", {"prompt": "Hi", "max_tokens": 4}, submits=1, headers=own
            )
            took = answer.json["usage"]["total_tokens"]
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == "2"
            assert 1000 - took <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 1000
            place = client.service.quotas.take(client.service.tenants[1], monotonic())
            place.charge(10_000, monotonic())
            again = await client.ask("/v1/completions", {"prompt": "Hi"}, headers=own)
            assert again.status == 429
            assert again.headers["x-ratelimit-remaining-tokens"] == "0"
            found = (await client.ask("/metrics", headers=own)).body.decode()
            for name, ann, bob in (("tokens_total", 0, took), ("requests", 0, 1)):
                for number, value in (("1", ann), ("2", bob)):
                    labels = f'key="{number}",model_name="pretend"'
                    shown = f"baton:key_{name}{{{labels}}} {float(value)}"
                    assert shown in found
            assert "key-of-ann" not in found

    asyncio.run(work())
