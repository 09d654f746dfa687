"""RequestTracker: whatever happens to the router, the caller sees one uninterrupted stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.client.tracker import (
    ANSWER_S,
    FORGOTTEN,
    INQUIRE_S,
    SILENCE_S,
    Event,
    News,
    PendingRequest,
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
    GetClusterInfo,
    Message,
    PromptScored,
    Submit,
    Unreachable,
)
from baton.wire.node import ROUTER
from baton.wire.records import Logprob, Timings
from tests.pure.pretend_router import info

PIECES = ("a", "", "bcd", "é", "", "\n", "xyz", "", "w")
"""What each token adds to the text; an empty piece is held back for a later one."""


PARAMS = GenerationParams(9)


def pieces_of(request: str) -> Sequence[str]:
    """The text of a request, token by token: a function of its id alone, not of the attempt."""
    shift = int(request[1:].partition(".")[0])
    return [*PIECES[shift:], f"[{shift}]"]


@dataclass
class Attempt:
    """A request with a router, which has yet to send these messages."""

    messages: list[News]


@dataclass
class World:
    """A tracker, its caller and its router. Routers answer at any time and in portions of any size."""

    tracker: RequestTracker = field(default_factory=lambda: RequestTracker(0.0))
    now: float = 0.0
    connected: bool = True
    attempts: dict[str, Attempt] = field(default_factory=dict)
    inquired: bool = False
    late: list[Message] = field(default_factory=list)  # of routers and attempts that are gone
    requests: list[PendingRequest] = field(default_factory=list)
    forgotten: set[PendingRequest] = field(default_factory=set)
    heard: dict[PendingRequest, list[News]] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)

    def submit(self) -> None:
        request = self.tracker.submit(
            Submit(f"r{len(self.requests)}", (1, 2), PARAMS), now=self.now
        )
        self.requests.append(request)
        self.heard[request] = []
        self.flush()

    def flush(self) -> None:
        messages = self.tracker.messages_to_send()
        if messages and not self.connected:
            self.take(self.tracker.connection_lost(self.now, "cut", messages))
            return
        for message in messages:
            match message:
                case GetClusterInfo():
                    self.inquired = True
                case Abort(name):
                    if self.attempts.pop(name, None) is not None:
                        self.late.append(Finished(name, "abort", Timings(total_s=1.0)))
                case Submit(request=name):
                    assert name not in self.attempts
                    self.attempts[name] = Attempt(self.life(name))

    def life(self, name: str) -> list[News]:
        found: list[News] = [Accepted(name, 2, 0.0), PromptScored(name, (Logprob(-1.0),))]
        if name.partition(".")[0] in self.failing:
            return [*found, Failed(name, "worker_lost", "gone")]
        held = ""
        pieces = pieces_of(name)
        for token, piece in enumerate(pieces):
            found.append(Emitted(name, (token,), held + piece, (Logprob(-float(token)),), (0.1,)))
            held = ""
        return [*found, Finished(name, "length", Timings())]

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Update):
                assert event.news.request == event.request.id
                assert event.request not in self.forgotten, "news of a forgotten request"
                self.heard[event.request].append(event.news)

    def receive(self, message: Message) -> None:
        self.take(self.tracker.received(message, self.now))
        self.flush()

    def answer(self, which: int, portion: int) -> None:
        """The router sends up to `portion` messages of one attempt, its tokens merged at random."""
        if self.inquired:
            self.inquired = False
            self.receive(info())
        if not self.attempts:
            return
        name = sorted(self.attempts)[which % len(self.attempts)]
        messages = self.attempts[name].messages
        sent, messages[:] = messages[:portion], messages[portion:]
        if not messages:
            del self.attempts[name]
        emitted = [each for each in sent if isinstance(each, Emitted)]
        for each in sent:
            if not isinstance(each, Emitted):
                self.receive(each)
            elif each is emitted[0]:
                self.receive(merged(emitted) if which % 2 else Emissions(tuple(emitted)))

    def lose(self, *, same_router: bool, reconnects: bool) -> None:
        """The connection is cut. What is under way is lost; another router knows nothing."""
        self.connected, self.inquired = reconnects, False
        if not same_router:
            self.late += [m for each in self.attempts.values() for m in each.messages]
            self.attempts.clear()
        self.receive(Unreachable(ROUTER))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.tracker.tick(self.now))
        self.flush()

    def settle(self) -> None:
        """From now on all goes well."""
        self.connected = True
        for _ in range(10_000):
            if not len(self.tracker):
                return
            self.tick(INQUIRE_S)
            self.answer(0, 3)
        raise AssertionError("requests without an end")


def merged(emitted: Sequence[Emitted]) -> Emitted:
    return Emitted(
        emitted[0].request,
        tuple(token for each in emitted for token in each.token_ids),
        "".join(each.text for each in emitted),
        tuple(one for each in emitted for one in each.logprobs),
        tuple(age for each in emitted for age in each.ages),
    )


STEPS = st.one_of(
    st.tuples(st.just("submit")),
    st.tuples(st.just("answer"), st.integers(0, 5), st.integers(1, 8)),
    st.tuples(st.just("answer"), st.integers(0, 5), st.integers(1, 8)),
    st.tuples(st.just("tick"), st.sampled_from([0.1, INQUIRE_S, SILENCE_S, ANSWER_S])),
    st.tuples(st.just("lose"), st.booleans(), st.booleans()),
    st.tuples(st.just("connect")),
    st.tuples(st.just("late"), st.integers(0, 50)),
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("forget"), st.integers(0, 5)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=40), st.sets(st.integers(0, 3)))
def test_every_request_gets_one_outcome_and_the_text_of_a_calm_run(
    steps: list[tuple[str, int, int]], failing: set[int]
) -> None:
    world = World(failing={f"r{i}" for i in failing})
    aborted: set[PendingRequest] = set()
    world.submit()
    for name, *values in steps:
        match name, values:
            case "submit", _ if len(world.requests) < len(PIECES):
                world.submit()
            case "answer", [which, portion]:
                world.answer(which, portion)
            case "tick", [seconds]:
                world.tick(seconds)
            case "lose", [same, reconnects]:
                world.lose(same_router=bool(same), reconnects=bool(reconnects))
            case "connect", _:
                world.connected = True
            case "late", [which] if world.late:
                world.receive(world.late.pop(which % len(world.late)))
            case "abort", [which]:
                request = world.requests[which % len(world.requests)]
                aborted.add(request)
                world.take(world.tracker.abort(request))
                world.flush()
            case "forget", [which]:
                request = world.requests[which % len(world.requests)]
                world.tracker.forget(request)
                world.forgotten.add(request)
                world.flush()
    for each in list(world.late):
        world.receive(each)
        if isinstance(each, Accepted):
            assert each.request not in world.attempts
    # The router confirms an abort with Finished, unless it was lost; what still runs goes on to its end.
    for request in aborted - world.forgotten:
        if not request.ended:
            world.receive(Finished(request.attempt_id, "abort", Timings()))
    world.settle()
    for request, heard in world.heard.items():
        check(world, request, heard, aborted=request in aborted)


def check(world: World, request: PendingRequest, heard: Sequence[News], *, aborted: bool) -> None:
    emitted = [each for each in heard if isinstance(each, Emitted)]
    pieces = pieces_of(request.id)
    tokens = [token for each in emitted for token in each.token_ids]
    text = "".join(each.text for each in emitted)
    assert tokens == list(range(len(tokens)))
    assert "".join(pieces).startswith(text)
    assert [one.value for each in emitted for one in each.logprobs] == [-float(i) for i in tokens]
    assert all(len(each.ages) == len(each.token_ids) for each in emitted)
    assert sum(isinstance(each, Accepted) for each in heard) <= 1
    assert sum(isinstance(each, PromptScored) for each in heard) <= 1
    ends = [each for each in heard if isinstance(each, Finished | Failed)]
    assert ends == list(heard[-1:] if ends else [])
    if request in world.forgotten:
        return
    assert len(ends) == 1
    if isinstance(ends[0], Finished) and ends[0].reason != "abort":
        assert tokens == list(range(len(pieces)))
        assert text == "".join(pieces)
    assert aborted or request.id in world.failing or ends[0].reason == "length"  # type: ignore[union-attr]


def connected(**options: float) -> RequestTracker:
    tracker = RequestTracker(0.0, **options)  # type: ignore[arg-type]
    tracker.tick(0.0)
    assert tracker.messages_to_send() == [GetClusterInfo()]
    assert tracker.received(info(), 0.0) == [info()]
    return tracker


def test_requests_wait_for_the_first_router_and_go_together() -> None:
    tracker = RequestTracker(0.0)
    first, second = Submit("a", (1,), PARAMS), Submit("b", (2,), PARAMS)
    tracker.submit(first, now=0.0)
    tracker.submit(second, now=0.0)
    assert tracker.messages_to_send() == []
    assert tracker.received(info(), 0.0) == [info()]  # nothing is sent a second time
    assert tracker.messages_to_send() == [first, second]


def test_a_new_router_is_sent_what_the_old_one_had_under_new_ids() -> None:
    tracker = connected()
    request = tracker.submit(Submit("a", (1,), PARAMS), now=0.0)
    tracker.messages_to_send()
    for number in (1, 2):
        assert tracker.connection_lost(1.0, "cut") == [RouterLost("cut")]
        assert tracker.info is None
        assert tracker.received(info(), 2.0) == [Resubmitted(1), info()]
        old = "a" if number == 1 else f"a.{number - 1}"
        assert tracker.messages_to_send() == [Abort(old), Submit(f"a.{number}", (1,), PARAMS)]
    assert tracker.losses == 2
    (event,) = tracker.received(Failed("a.2", "worker_lost", "gone"), 3.0)
    assert event == Update(request, Failed("a", "worker_lost", "gone"))
    assert len(tracker) == 0


def test_a_silent_router_is_asked_once_and_then_counts_as_lost() -> None:
    tracker = connected()
    assert tracker.tick(SILENCE_S - 1) == []
    assert tracker.messages_to_send() == []
    tracker.tick(SILENCE_S)
    assert tracker.messages_to_send() == [GetClusterInfo()]
    assert tracker.tick(SILENCE_S + ANSWER_S - 1) == []
    assert tracker.messages_to_send() == []
    (lost,) = tracker.tick(SILENCE_S + ANSWER_S)
    assert isinstance(lost, RouterLost)


def test_an_answer_to_the_inquiry_is_enough() -> None:
    tracker = connected()
    tracker.tick(SILENCE_S)
    tracker.received(info(), SILENCE_S + 1)
    assert tracker.tick(SILENCE_S + ANSWER_S) == []
    assert tracker.lost_since is None


def test_requests_fail_when_no_router_has_answered_for_too_long() -> None:
    tracker = connected(give_up_s=30.0)
    request = tracker.submit(Submit("a", (1,), PARAMS), now=0.0)
    tracker.connection_lost(5.0, "cut")
    assert tracker.tick(34.0) == []
    (event,) = tracker.tick(35.0)
    assert event == Update(request, Failed("a", "not_ready", "no router has answered for 30 s"))


def test_an_abort_that_could_not_be_sent_is_sent_to_the_next_router() -> None:
    tracker = connected()
    request = tracker.submit(Submit("a", (1,), PARAMS), now=0.0)
    tracker.messages_to_send()
    tracker.forget(request)
    unsent = tracker.messages_to_send()
    assert unsent == [Abort("a")]
    tracker.connection_lost(1.0, "cut", unsent)
    tracker.received(info(), 2.0)
    assert tracker.messages_to_send() == [Abort("a")]


def test_a_late_accepted_of_a_forgotten_request_is_answered_with_abort() -> None:
    tracker = connected()
    assert tracker.received(Accepted("ghost", 2, 0.0), 1.0) == []
    assert tracker.messages_to_send() == [Abort("ghost")]
    assert tracker.received(Emitted("ghost", (1,), "x"), 1.0) == []
    assert tracker.messages_to_send() == []


def test_the_router_confirms_an_abort_with_its_timings() -> None:
    tracker = connected()
    request = tracker.submit(Submit("a", (1,), PARAMS), now=0.0)
    tracker.messages_to_send()
    assert tracker.abort(request) == []
    assert tracker.abort(request) == []
    assert tracker.messages_to_send() == [Abort("a")]
    confirmed = Finished("a", "abort", Timings(total_s=2.0))
    assert tracker.received(confirmed, 1.0) == [Update(request, confirmed)]


def test_where_no_router_can_confirm_an_abort_the_tracker_does() -> None:
    tracker = connected()
    request = tracker.submit(Submit("a", (1,), PARAMS), now=0.0)
    tracker.messages_to_send()
    tracker.abort(request)
    end = Update(request, Finished("a", "abort", Timings()))
    assert tracker.connection_lost(1.0, "cut") == [RouterLost("cut"), end]
    assert isinstance(tracker.received(info(), 2.0)[0], ClusterInfo)


def test_a_router_that_comes_back_after_requests_were_given_up_is_found() -> None:
    tracker = connected(give_up_s=30.0)
    tracker.received(Unreachable(ROUTER), now=0.0)
    for second in range(1, 100):
        tracker.tick(float(second))
        assert tracker.messages_to_send() == [GetClusterInfo()], f"not asked in second {second}"
    assert tracker.received(info(), now=100.0) == [info()]
    assert tracker.info == info()


def test_a_new_request_under_a_forgotten_ones_id_gets_none_of_its_news() -> None:
    """The first one's last messages are still under way when the second one is sent."""
    tracker = RequestTracker(0.0)
    tracker.received(info(), 0.0)
    for attempt in range(3):
        tracker.messages_to_send()
        request = tracker.submit(Submit("a", (1, 2), PARAMS), now=0.0)
        (sent,) = tracker.messages_to_send()
        assert isinstance(sent, Submit)
        assert sent.request == request.attempt_id == (f"a.{attempt}" if attempt else "a")
        old = f"a.{attempt - 1}" if attempt > 1 else "a"
        if attempt:
            for late in (Emitted(old, (9,), "late"), Finished(old, "abort", Timings())):
                assert tracker.received(late, 0.0) == []
        mine = Emitted(sent.request, (5,), "x")
        assert tracker.received(mine, 0.0) == [Update(request, Emitted("a", (5,), "x"))]
        tracker.forget(request)
    assert len(tracker) == 0


def test_only_so_many_forgotten_ids_are_remembered() -> None:
    tracker = RequestTracker(0.0)
    tracker.received(info(), 0.0)
    for number in range(FORGOTTEN + 10):
        tracker.forget(tracker.submit(Submit(f"r{number}", (1,), PARAMS), now=0.0))
    assert len(tracker._forgotten) == FORGOTTEN


@pytest.mark.parametrize(
    "end", [Finished("", "abort", Timings()), Failed("", "overloaded", "full")]
)
def test_a_forgotten_id_is_remembered_until_its_last_news(end: Finished | Failed) -> None:
    tracker = RequestTracker(0.0)
    tracker.received(info(), 0.0)
    for attempt in range(3):
        request = tracker.submit(Submit("a.1", (1,), PARAMS), now=0.0)
        tracker.forget(request)
        assert tracker._forgotten == {"a.1": attempt}
        for other in ("a", "b.1", f"a.1.{attempt + 1}", "a.1.x", "a.1."):
            tracker.received(replace(end, request=other), 1.0)
        assert tracker._forgotten == {"a.1": attempt}
        tracker.received(Emitted(request.attempt_id, (9,), "late"), 1.0)
        if attempt < 2:  # the next attempt is told apart from this one
            continue
        tracker.received(replace(end, request=request.attempt_id), 1.0)
        assert tracker._forgotten == {}
    first = tracker.submit(Submit("b", (1,), PARAMS), now=0.0)
    tracker.forget(first)
    tracker.received(replace(end, request="b"), 1.0)
    assert tracker._forgotten == {}
