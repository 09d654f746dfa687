"""What waits for each role: requests, tokens, age of the oldest. Compared with the ledger itself."""

from hypothesis import given
from hypothesis import strategies as st

from baton.lifecycle import TRANSITIONS, Event, State
from baton.wire import messages as msg
from baton.wire.records import RoleBacklog
from router.backlog import WAITS_FOR, Backlog
from router.ledger import Entry, Ledger
from router.observers import Observers
from router.workers import DECODE, PREFILL
from tests.pure.test_ledger import add, walk
from tests.pure.town import Town


class Recorder(Observers):
    """A listener with its Backlog in reach."""

    @property
    def backlog(self) -> Backlog:
        return self._backlog


def by_role(listener: Recorder, now: float) -> dict[str, RoleBacklog]:
    return {each.role: each for each in listener.backlog.report(now)}


def counted(ledger: Ledger, role: str) -> tuple[int, int]:
    """Requests and tokens that wait for this role, by looking at each."""
    waiting = ledger.in_state(*(state for state, waits in WAITS_FOR.items() if waits == role))
    return len(waiting), sum(e.unfilled if role == PREFILL else e.length for e in waiting)


def test_the_age_is_that_of_the_first_in_its_role_and_begins_anew_in_the_next() -> None:
    listener = Recorder()
    ledger = Ledger(listener)
    first, _ = add(ledger, "a", 1.0), add(ledger, "b", 3.0)
    assert by_role(listener, 5.0)[DECODE] == RoleBacklog(DECODE, 2, 6, 4.0)
    walk(ledger, first, (Event.RESERVE,), 6.0)
    assert by_role(listener, 7.0)[DECODE].oldest_s == 6.0  # it still waits for blocks
    walk(ledger, first, (Event.GRANTED,), 8.0)
    assert by_role(listener, 9.0)[DECODE] == RoleBacklog(DECODE, 1, 3, 6.0)
    assert by_role(listener, 9.0)[PREFILL] == RoleBacklog(PREFILL, 1, 2, 1.0)
    walk(ledger, first, (Event.FILL,), 10.0)
    assert by_role(listener, 12.0)[PREFILL].oldest_s == 4.0
    walk(ledger, first, (Event.START,), 13.0)
    assert by_role(listener, 14.0)[PREFILL] == RoleBacklog(PREFILL, 0, 0, 0.0)


def test_chunks_that_are_filled_are_not_counted_any_more() -> None:
    listener = Recorder()
    ledger = Ledger(listener)
    entry = add(ledger, "a")
    walk(ledger, entry, (Event.RESERVE, Event.GRANTED, Event.FILL))
    ledger.filled_to(entry, 1, 0.0)
    assert by_role(listener, 0.0)[PREFILL].tokens == 1
    ledger.filled_to(entry, 9, 0.0)  # more than there is: a worker's word
    assert by_role(listener, 0.0)[PREFILL].tokens == 0
    walk(ledger, entry, (Event.LOST,))
    assert by_role(listener, 0.0) == {
        DECODE: RoleBacklog(DECODE, 1, 3, 0.0), PREFILL: RoleBacklog(PREFILL, 0, 0, 0.0),
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(Event))), max_size=60))
def test_whatever_happens_it_counts_what_is_there(happenings: list[tuple[int, Event]]) -> None:
    listener = Recorder()
    ledger = Ledger(listener)
    entries: dict[int, Entry] = {}
    for now, (number, event) in enumerate(happenings):
        if number not in entries:
            entries[number] = add(ledger, f"r{number}", float(now))
        entry = entries[number]
        if (entry.state, event) not in TRANSITIONS:
            continue
        if event in (Event.RESERVE, Event.START) and entry.state is State.QUEUED:
            entry.decode = "d1"
        elif event is Event.FILL:
            entry.prefill = "p1"
        ledger.apply(entry, event, float(now))
        if entry.state is State.FINISHED:
            del entries[number]
        for role, told in by_role(listener, float(now)).items():
            assert (told.requests, told.tokens) == counted(ledger, role)


def test_a_cluster_at_rest_has_no_backlog_and_a_full_one_tells_it_to_those_who_watch() -> None:
    town = Town(prefill_budget=8)
    seen: list[tuple[RoleBacklog, ...]] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Observed) and message.counts is not None:
            seen.append(message.counts.backlogs)

    town.before = before
    town.client(msg.Observe(), name="client.watch")
    for number in range(40):
        town.submit(f"r{number}", range(1, 31), 8)
    town.run_all([f"r{number}" for number in range(40)])
    town.run(lambda: all(not each.requests for each in seen[-1]))
    assert max(each.tokens for told in seen for each in told if each.role == DECODE) > 0
    assert all(each.tokens == 0 for each in seen[-1])
