"""RequestTracker: deadlines outlast the router, and news that cannot be harm nobody."""

from collections.abc import Sequence
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.client.tracker import (
    ANSWER_S,
    QUIET_S,
    SILENCE_S,
    Event,
    RequestTracker,
    Resubmitted,
    RouterLost,
    Update,
)
from baton.params import GenerationParams
from baton.wire.messages import (
    Abort,
    Accepted,
    ClusterInfo,
    Emissions,
    Emitted,
    Failed,
    Finished,
    Message,
    PromptScored,
    Submit,
)
from baton.wire.records import Logprob, Timings
from tests.depth import deep
from tests.pure.pretend_router import info

PARAMS = GenerationParams(9)


def connected(now: float = 0.0) -> RequestTracker:
    tracker = RequestTracker(now)
    tracker.tick(now)
    tracker.received(info(), now)
    tracker.messages_to_send()
    return tracker


def ask(wait: float = 0.0, whole: float = 0.0, name: str = "a") -> Submit:
    return Submit(name, (1,), PARAMS, queue_timeout_s=wait, timeout_s=whole)


def resubmitted(tracker: RequestTracker, now: float) -> Submit:
    """What a new router is sent."""
    tracker.received(info(), now)
    [submit] = [each for each in tracker.messages_to_send() if isinstance(each, Submit)]
    return submit


def ends(events: Sequence[Event]) -> list[Failed]:
    return [e.news for e in events if isinstance(e, Update) and isinstance(e.news, Failed)]


def test_a_router_that_answers_is_sent_the_whole_time() -> None:
    tracker = connected(100.0)
    tracker.submit(ask(60.0, 90.0), now=100.0)
    assert tracker.messages_to_send() == [ask(60.0, 90.0)]


def test_the_next_router_is_sent_the_time_that_is_left() -> None:
    tracker = connected()
    tracker.submit(ask(60.0, 90.0), now=0.0)
    tracker.messages_to_send()
    tracker.connection_lost(10.0, "cut")
    assert resubmitted(tracker, 15.0) == ask(45.0, 75.0, "a.1")
    tracker.connection_lost(20.0, "cut")
    assert resubmitted(tracker, 30.0) == ask(30.0, 60.0, "a.2")


def test_a_request_that_waits_for_its_first_router_spends_its_time_too() -> None:
    tracker = RequestTracker(0.0)
    tracker.submit(ask(60.0, 90.0), now=0.0)
    tracker.tick(20.0)
    assert resubmitted(tracker, 20.0) == ask(40.0, 70.0)


@pytest.mark.parametrize(
    ("wait", "whole", "code"),
    [(5.0, 0.0, "queue_timeout"), (0.0, 5.0, "deadline_exceeded"), (5.0, 9.0, "queue_timeout")],
)
@pytest.mark.parametrize("ever", [False, True])
def test_while_no_router_answers_it_ends_what_is_overdue(
    wait: float, whole: float, code: str, ever: bool
) -> None:
    tracker = connected() if ever else RequestTracker(0.0)
    request = tracker.submit(ask(wait, whole), now=0.0)
    if ever:
        tracker.connection_lost(1.0, "cut")
    assert ends(tracker.tick(4.9)) == []
    [failed] = ends(tracker.tick(5.0))
    assert (failed.request, failed.code) == ("a", code)
    assert request.ended
    assert len(tracker) == 0
    assert ends(tracker.tick(99.0)) == []


def test_its_words_say_what_was_waited_for() -> None:
    tracker = connected()
    tracker.submit(ask(60.0, name="a"), now=0.0)
    tracker.submit(ask(whole=60.0, name="b"), now=0.0)
    tracker.received(Emitted("b", (1,), "x"), 1.0)
    tracker.connection_lost(20.0, "cut")
    waited, took = ends(tracker.tick(60.0))
    assert waited.message == (
        "no worker took the request within 60 s: no router has answered for 40 s; send it again later"
    )
    assert took.message == "the request did not end within 60 s; 1 token was sent"


def test_time_that_ends_between_two_ticks_is_not_sent_as_no_limit() -> None:
    tracker = connected()
    tracker.submit(ask(whole=5.0), now=0.0)
    tracker.messages_to_send()
    tracker.connection_lost(4.0, "cut")
    events = tracker.received(info(), 5.0)
    assert [failed.code for failed in ends(events)] == ["deadline_exceeded"]
    assert [each for each in tracker.messages_to_send() if isinstance(each, Submit)] == []
    assert not [each for each in events if isinstance(each, Resubmitted)]


@pytest.mark.parametrize("started", [False, True])
def test_a_request_that_had_been_placed_waits_anew_when_its_router_is_lost(started: bool) -> None:
    """It has a token; or its queue timeout has passed, and the router did not end it."""
    tracker = connected()
    tracker.submit(ask(60.0), now=0.0)
    tracker.messages_to_send()
    if started:
        tracker.received(Emitted("a", (1,), "x"), 30.0)
    at = 50.0 if started else 70.0
    tracker.connection_lost(at, "cut")
    assert ends(tracker.tick(at + 59.9)) == []
    assert resubmitted(tracker, at + 20.0).queue_timeout_s == 40.0
    tracker.connection_lost(at + 25.0, "cut")
    [failed] = ends(tracker.tick(at + 25.0 + (60.0 if started else 35.0)))
    assert failed.code == "queue_timeout"


def test_a_router_that_answers_ends_requests_itself() -> None:
    tracker = connected()
    tracker.submit(ask(1.0, 2.0), now=0.0)
    tracker.received(Emitted("other", (), ""), 5.0)
    assert tracker.tick(5.0 + QUIET_S - 0.1) == []


def test_a_silent_router_does_not_keep_a_request_beyond_its_time() -> None:
    """It may be stalled, and is lost after 40 s only."""
    tracker = connected()
    tracker.submit(ask(1.0, 5.0), now=0.0)
    tracker.messages_to_send()
    assert ends(tracker.tick(4.9)) == []  # its queue timeout is the router's to judge
    [failed] = ends(tracker.tick(5.0))
    assert failed.code == "deadline_exceeded"
    assert tracker.messages_to_send() == [Abort("a")]
    lost = tracker.tick(SILENCE_S) + tracker.tick(SILENCE_S + ANSWER_S)
    assert [type(each) for each in lost] == [RouterLost]


def test_a_timeout_is_told_in_the_callers_numbers_and_not_in_those_of_the_last_attempt() -> None:
    tracker = connected()
    tracker.submit(ask(whole=60.0), now=0.0)
    tracker.received(Emitted("a", (1, 2), "x"), 1.0)
    tracker.messages_to_send()
    tracker.connection_lost(50.0, "cut")
    tracker.received(info(), 51.0)
    late = Failed(
        "a.1", "deadline_exceeded", "the request did not end within 9 s; 0 tokens were sent"
    )
    [failed] = ends(tracker.received(late, 60.0))
    assert failed == Failed(
        "a", "deadline_exceeded", "the request did not end within 60 s; 2 tokens were sent"
    )


# ---- news that cannot be

NONSENSE = [
    (Emitted("a", (1, 2), "x", (Logprob(-1.0),)), "1 logprobs and 0 ages with 2 tokens"),
    (Emitted("a", (), "x", (), (0.1,)), "0 logprobs and 1 ages with 0 tokens"),
    (Finished("a", "because", Timings()), "with reason 'because'"),
    (Accepted("a", -3, 0.0), "-3 tokens in the prompt"),
]


@pytest.mark.parametrize(("news", "words"), NONSENSE)
def test_news_that_cannot_be_end_their_request_in_words(news: Message, words: str) -> None:
    tracker = connected()
    tracker.submit(ask(), now=0.0)
    tracker.submit(ask(name="b"), now=0.0)
    tracker.messages_to_send()
    [failed] = ends(tracker.received(news, 1.0))
    assert (failed.request, failed.code) == ("a", "internal_error")
    assert words in failed.message
    assert tracker.messages_to_send() == [Abort("a")]
    assert tracker.received(news, 2.0) in ([], [Abort("a")])
    assert len(tracker) == 1


def test_times_that_cannot_be_are_left_out_and_the_request_ends() -> None:
    tracker = connected()
    request = tracker.submit(ask(), now=0.0)
    timings = Timings(queue_s=-1.0, prefill_s=nan, decode_s=inf, total_s=3.0, retries=-2)
    assert tracker.received(Finished("a", "stop", timings), 1.0) == [
        Update(request, Finished("a", "stop", Timings(total_s=3.0)))
    ]


def test_an_end_counts_once_and_nothing_comes_after_it() -> None:
    tracker = connected()
    tracker.submit(ask(), now=0.0)
    assert len(tracker.received(Finished("a", "stop", Timings()), 1.0)) == 1
    late: list[Message] = [
        Finished("a", "stop", Timings()), Failed("a", "c", "m"), Emitted("a", (1,), "x"),
        Emissions((Emitted("a", (1,), "x"),)), PromptScored("a", ()),
    ]  # fmt: skip
    assert [tracker.received(each, 1.0) for each in late] == [[]] * len(late)


NAMES = st.sampled_from(["a", "b", "a.1", "b.1", "b.-1", "", "ghost"])
NUMBERS = st.integers(-(2**63), 2**63) | st.floats()
TIMES = st.builds(Timings, *[NUMBERS] * 5)  # type: ignore[arg-type]
IDS = st.lists(st.integers(-5, 5), max_size=4).map(tuple)
EMITTED = st.builds(
    Emitted,
    NAMES,
    IDS,
    st.text(max_size=4),
    st.lists(st.just(Logprob(nan)), max_size=4).map(tuple),
    st.lists(st.floats(), max_size=4).map(tuple),
)
FORGED = st.one_of(
    EMITTED,
    st.lists(EMITTED, max_size=3).map(lambda each: Emissions(tuple(each))),
    st.builds(Accepted, NAMES, st.integers(), st.floats()),
    st.builds(PromptScored, NAMES, st.just(())),
    st.builds(Finished, NAMES, st.text(max_size=9) | st.sampled_from(["stop", "abort"]), TIMES),
    st.builds(Failed, NAMES, st.text(max_size=9), st.text(max_size=9)),
    st.just(info()),
    st.just("lost"),
)


@settings(max_examples=deep(500, usual=100), deadline=None)
@given(st.lists(FORGED, max_size=30))
def test_no_message_of_a_router_raises_and_every_request_has_one_end_at_most(
    messages: list[Message | str],
) -> None:
    tracker = connected()
    for name in ("a", "b"):
        tracker.submit(ask(30.0, 60.0, name), now=0.0)
    heard: dict[str, list[Message]] = {"a": [], "b": []}
    now = 0.0
    for message in messages:
        now += 1.0
        if isinstance(message, str):
            events = tracker.connection_lost(now, message)
        else:
            events = tracker.received(message, now)
        for event in [*events, *tracker.tick(now)]:
            if isinstance(event, Update):
                heard[event.news.request].append(event.news)
            else:
                assert isinstance(event, RouterLost | Resubmitted | ClusterInfo)
        tracker.messages_to_send()
    for name, news in heard.items():
        ended = [isinstance(each, Finished | Failed) for each in news]
        assert sum(ended) <= 1, name
        assert not any(ended[:-1]), f"{name} has news after its end"
        for each in news:
            if isinstance(each, Emitted):
                assert len(each.logprobs) in (0, len(each.token_ids))
                assert len(each.ages) in (0, len(each.token_ids))
