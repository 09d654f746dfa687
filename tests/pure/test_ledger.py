"""The ledger: states, runs, the waiting line, and times read off as states change."""

import pytest

from baton.kv.grant import Grant
from baton.lifecycle import LIVE, Event, IllegalTransition, State
from baton.params import GenerationParams
from baton.text import TextStream
from router.ledger import Entry, Ledger
from router.observers import Observers
from router.timings import timings
from router.tries import ISOLATION_S, QUARANTINE_AFTER
from tests.pure.town import GREEDY, PretendTokenizer

PATH = (Event.RESERVE, Event.GRANTED, Event.FILL, Event.START)


def add(
    ledger: Ledger, name: str, now: float = 0.0, client: str = "client", length: int = 5
) -> Entry:
    params = GenerationParams(length, GREEDY)
    text = TextStream(PretendTokenizer(), (1, 2, 3), params)
    entry = Entry(name, client, (1, 2, 3), params, text)
    ledger.add(entry, now)
    return entry


def add_of(ledger: Ledger, name: str, tenant: str, most: int) -> Entry:
    """A request of this tenant, which may have so many tokens."""
    params = GenerationParams(most, GREEDY)
    text = TextStream(PretendTokenizer(), (1, 2, 3), params)
    entry = Entry(name, "client", (1, 2, 3), params, text, tenant=tenant)
    ledger.add(entry, 0.0)
    return entry


def walk(ledger: Ledger, entry: Entry, events: tuple[Event, ...], now: float = 0.0) -> None:
    for event in events:
        step(ledger, entry, event, now)


def step(ledger: Ledger, entry: Entry, event: Event, now: float = 0.0) -> None:
    """Apply the event, on the workers that the scheduler would have chosen."""
    if event is Event.RESERVE:
        entry.decode, entry.reserved, entry.block_size = "decode", entry.length + 1, 2
    if event is Event.FILL:
        entry.prefill = "prefill"
    ledger.apply(entry, event, now)


def names(entries: list[Entry]) -> list[str]:
    return [entry.id for entry in entries]


def test_a_new_request_is_queued_and_found() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    assert entry.state is State.QUEUED
    assert ledger.get("a") is entry
    assert len(ledger) == 1
    assert ledger.count(*LIVE) == 1


def test_an_id_is_used_once_at_a_time() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    with pytest.raises(AssertionError):
        add(ledger, "a")
    ledger.apply(entry, Event.FINISH, 0.0)
    add(ledger, "a")


def test_what_the_table_does_not_allow_does_not_happen() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    with pytest.raises(IllegalTransition):
        ledger.apply(entry, Event.FILL, 0.0)
    assert entry.state is State.QUEUED


def test_an_engine_needs_no_blocks_and_its_first_token_ends_the_wait() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    entry.queue_timeout_s = 5.0
    ledger.waits(entry, 0.0)
    entry.decode = "engine-0"
    walk(ledger, entry, (Event.START,), 1.0)
    assert (entry.run, entry.state) == ("a#0", State.DECODING)
    assert ledger.deadlines.late_to_start(5.0) == "a"
    ledger.tokens(entry, [7], [2.0])
    assert ledger.deadlines.late_to_start(5.0) is None


def test_every_attempt_is_a_run_of_its_own_and_reports_on_old_ones_are_void() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    walk(ledger, entry, PATH)
    assert entry.run == "a#0"
    assert ledger.follow("a#0", State.DECODING) is entry
    walk(ledger, entry, (Event.LOST, *PATH))
    assert entry.run == "a#1"
    assert ledger.follow("a#0", *LIVE) is None
    assert ledger.follow("a#1", *LIVE) is entry
    assert ledger.late_reports == 1


def test_a_report_about_another_state_is_void_and_counted() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    walk(ledger, entry, PATH)
    assert ledger.follow("a#0", State.FILLING) is None
    assert ledger.follow("nonsense", *LIVE) is None
    assert ledger.late_reports == 2


def test_a_queued_request_has_no_run_and_no_worker() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a")
    walk(ledger, entry, PATH[:3])
    entry.grant = Grant("d", "d/0", entry.run, 1, (0,))
    ledger.apply(entry, Event.RETRY, 0.0)
    assert (entry.decode, entry.prefill, entry.grant, entry.receipt) == (None, None, None, None)
    assert ledger.follow("a#0", *LIVE) is None


def line_of(ledger: Ledger) -> list[str]:
    """The queue in the order in which it is placed. Nothing is left of it."""
    found = []
    while (entry := ledger.next_queued(0.0)) is not None:
        found.append(entry.id)
        ledger.apply(entry, Event.FINISH, 0.0)
    return found


def test_what_is_set_aside_returns_to_its_place_whether_it_was_placed_before_or_not() -> None:
    ledger = Ledger(Observers())
    entries = [add(ledger, name) for name in "abcde"]
    step(ledger, entries[0], Event.RESERVE, 0.0)
    ledger.apply(entries[0], Event.LOST, 0.0)
    for entry in entries[:4]:
        assert ledger.next_queued(0.0) is entry
        ledger.set_aside(entry)
    assert ledger.next_queued(0.0) is entries[4]
    ledger.apply(entries[2], Event.FINISH, 0.0)
    ledger.call_back(entries[0].reach - 1)
    assert ledger.next_queued(0.0) is entries[4]
    ledger.call_back(entries[0].reach)
    assert ledger.aside() is None
    assert line_of(ledger) == ["a", "b", "d", "e"]


def test_the_line_is_first_come_first_served_and_who_comes_back_has_his_place() -> None:
    ledger = Ledger(Observers())
    entries = [add(ledger, name) for name in "abcd"]
    assert ledger.next_queued(0.0) is entries[0]
    step(ledger, entries[0], Event.RESERVE, 0.0)
    assert ledger.next_queued(0.0) is entries[1]
    step(ledger, entries[1], Event.RESERVE, 0.0)
    assert ledger.next_queued(0.0) is entries[2]
    ledger.apply(entries[1], Event.LOST, 0.0)
    assert ledger.next_queued(0.0) is entries[1]
    ledger.apply(entries[0], Event.DEFERRED, 0.0)
    assert names(ledger.queued_again()) == ["b", "a"]
    assert line_of(ledger) == ["a", "b", "c", "d"]


def in_quarantine(ledger: Ledger, *which: str) -> list[Entry]:
    entries = [add(ledger, name) for name in which]
    for entry in entries:
        walk(ledger, entry, PATH)
        entry.tries.deaths = QUARANTINE_AFTER
        ledger.apply(entry, Event.LOST, 0.0)
    return entries


def test_a_quarantined_request_is_apart_until_it_has_made_progress() -> None:
    ledger = Ledger(Observers())
    first, second = in_quarantine(ledger, "a", "b")
    other = add(ledger, "c")
    assert ledger.next_queued(0.0) is first
    step(ledger, first, Event.RESERVE, 0.0)
    assert ledger.next_queued(0.0) is None
    walk(ledger, first, PATH[1:])
    ledger.tokens(first, [7], [0.0])
    assert ledger.next_queued(0.0) is second
    step(ledger, second, Event.RESERVE, 0.0)
    ledger.apply(second, Event.FINISH, 0.0)
    assert ledger.next_queued(0.0) is other


def test_it_waits_for_the_progress_of_those_on_workers_and_nobody_passes_it() -> None:
    ledger = Ledger(Observers())
    other = add(ledger, "a")
    walk(ledger, other, PATH[:-1])
    [suspect] = in_quarantine(ledger, "b")
    add(ledger, "c")
    assert ledger.next_queued(0.0) is None
    ledger.filled_to(other, 1, 0.0)
    assert ledger.next_queued(0.0) is suspect


def test_nobody_waits_for_the_progress_of_another_for_ever() -> None:
    ledger = Ledger(Observers())
    first, second = in_quarantine(ledger, "a", "b")
    other = add(ledger, "c")
    step(ledger, first, Event.RESERVE, 5.0)
    assert ledger.next_queued(5.0 + ISOLATION_S - 0.1) is None
    assert ledger.next_queued(5.0 + ISOLATION_S) is other
    ledger.apply(first, Event.FINISH, 5.0)
    step(ledger, other, Event.RESERVE, 5.0)
    assert ledger.next_queued(5.0 + ISOLATION_S) is second


def test_a_finished_request_is_nowhere() -> None:
    ledger = Ledger(Observers())
    for at in range(5):
        entry = add(ledger, "a")
        walk(ledger, entry, (*PATH[:at], Event.FINISH))
        assert len(ledger) == 0
        assert ledger.get("a") is None
        assert ledger.count(*LIVE) == 0
        assert not ledger._runs
        assert ledger.of_client("client") == []


def test_who_needs_a_worker_is_who_is_decoded_there_or_filled_there_now() -> None:
    ledger = Ledger(Observers())
    placed = {}
    for name, events in {"r": 1, "g": 2, "f": 3, "d": 4}.items():
        placed[name] = add(ledger, name)
        walk(ledger, placed[name], PATH[:events])
    assert sorted(names(ledger.on_worker("decode"))) == ["d", "f", "g", "r"]
    assert names(ledger.on_worker("prefill")) == ["f"]
    assert ledger.on_worker("other") == []


def test_requests_are_found_by_their_client() -> None:
    ledger = Ledger(Observers())
    add(ledger, "a", client="x")
    add(ledger, "b", client="y")
    assert names(ledger.of_client("x")) == ["a"]


def test_what_is_known_and_what_remains_follow_the_tokens() -> None:
    entry = add(Ledger(Observers()), "a")
    reach = entry.reach
    entry.emitted += [7, 8]
    assert entry.token_ids == (1, 2, 3, 7, 8)
    assert entry.params.max_new_tokens - len(entry.emitted) == 3
    assert entry.reach == reach == 8


def test_times_are_read_off_the_states_and_add_up() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a", 10.0)
    for event, now in zip(PATH, (11.0, 13.0, 16.0, 20.0), strict=True):
        step(ledger, entry, event, now)
    entry.handover_s, entry.moved_bytes = 1.5, 77
    entry.first_token = 25.0
    ledger.apply(entry, Event.TOKEN, 25.0)
    ledger.apply(entry, Event.FINISH, 30.0)
    times = timings(entry, 30.0, kv_bytes_per_token=100)
    assert (times.queue_s, times.reserve_s) == (1.0 + 3.0, 2.0)
    assert (times.prefill_s, times.handover_s, times.decode_s) == (2.5, 1.5, 10.0)
    assert (times.ttft_s, times.total_s) == (15.0, 20.0)
    parts = times.queue_s + times.reserve_s + times.prefill_s + times.handover_s + times.decode_s
    assert parts == times.total_s
    assert (times.kv_bytes, times.moved_bytes, times.retries) == (200, 77, 0)


def test_the_times_of_all_attempts_are_added() -> None:
    ledger = Ledger(Observers())
    entry = add(ledger, "a", 0.0)
    now = 0.0
    for event in (*PATH, Event.LOST, *PATH, Event.FINISH):
        now += 1.0
        step(ledger, entry, event, now)
    times = timings(entry, now, kv_bytes_per_token=0)
    assert times.retries == 1
    assert times.decode_s == 2.0
    assert times.queue_s == 4.0
    assert times.total_s == now
