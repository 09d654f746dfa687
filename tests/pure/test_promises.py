"""What prefill workers are promised counts in the next decision, from each decision until its request is
sent, or leaves its place in any other way."""

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kv.grant import Grant
from baton.lifecycle import TRANSITIONS, Event, State
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.records import Speed
from router.batching import Rules
from router.ledger import Entry, Ledger
from router.observers import Observers
from router.role_policy import Cause, RolePolicy, Slo
from tests.pure.desk import Desk, sent
from tests.pure.slow_loads import wrong_counts
from tests.pure.test_ledger import add

PREFILLS = ("p1", "p2")
WALKS = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from(list(Event)), st.sampled_from([*PREFILLS, None]), st.booleans()
    ),
    max_size=60,
)  # fmt: skip


def reserved(ledger: Ledger, remote: set[str]) -> dict[str, int]:
    """Tokens of those that wait to be sent, of these."""
    return {e.id: e.unfilled for e in ledger.in_state(State.RESERVED) if e.id in remote}


def leave(ledger: Ledger, entry: Entry, event: Event, prefill: str | None) -> None:
    """Apply the event, on workers that the scheduler might have chosen."""
    if event is Event.RESERVE or (event is Event.START and entry.state is State.QUEUED):
        entry.decode, entry.reserved, entry.block_size = "d1", entry.length + 1, 2
    if event is Event.FILL:
        entry.prefill = prefill or "p1"
    ledger.apply(entry, event, 0.0)


@given(WALKS)
def test_through_every_state_the_promised_tokens_are_those_of_requests_that_wait_to_be_sent(
    walk: list[tuple[int, Event, str | None, bool]],
) -> None:
    ledger, remote = Ledger(Observers()), set[str]()
    loads = ledger.loads
    loads.joined("d1", 99)
    for prefill in PREFILLS:
        loads.joined(prefill, None)
    for number, event, prefill, again in walk:
        name = f"r{number}"
        entry = ledger.get(name) or add(ledger, name)
        if entry.state is State.RESERVED and again:
            remote.add(name)
            loads.promised(name, prefill, entry.unfilled)
        elif (entry.state, event) in TRANSITIONS and event is not Event.TOKEN:
            leave(ledger, entry, event, prefill)
            if entry.state is not State.RESERVED:
                remote.discard(name)
        waiting = reserved(ledger, remote)
        assert {request: tokens for request, _, tokens in loads.promises} == waiting
        totals = {each: loads.promises.total(each) for each in (*PREFILLS, None)}
        assert sum(totals.values()) == sum(waiting.values())
        assert {worker: total for total, _, worker in loads.expected} == {
            p: sum(loads.amounts(p)) + totals[p] for p in PREFILLS
        }
        assert set(loads.soon) == loads.busy | {p for p in PREFILLS if totals[p]}


# ---- the router


def told(desk: Desk, *workers: str, token_s: float = 0.0001) -> None:
    """These have told their speed."""
    for worker in workers:
        member = desk.router.workers.get(worker)
        assert member is not None
        speed = Speed(0, 0.01, token_s)
        desk.hear(worker, msg.Heartbeat(member.hello.epoch, 1, None, (speed,), (speed,)))


def adaptive(*workers: str, slo: Slo) -> Desk:
    rules = Rules(64, 0.0, 1 << 16, role_policy=RolePolicy.ADAPTIVE, slo=slo)
    desk = Desk(*workers, rules=rules, pool=4096)
    told(desk, *workers)
    return desk


def grant(desk: Desk, name: str, first: int) -> None:
    """Its blocks, from this one on."""
    entry = desk.router.ledger.entry(name)
    assert entry.decode is not None
    count = -(-entry.reserved // desk.router.workers.block_size)
    decode = entry.decode
    blocks = tuple(range(first, first + count))
    desk.hear(decode, msg.Reserved(Grant(decode, f"{decode}/0", entry.run, 1, blocks)))


LENGTHS = st.lists(st.integers(20, 400), min_size=1, max_size=12)
SLOS = st.builds(Slo, st.sampled_from([0.03, 0.06, 0.2, 5.0]), st.sampled_from([0.02, None]))
CLUSTERS = st.sampled_from([("d1", "p1"), ("d1", "p1", "p2"), ("d1", "d2", "p1", "p2", "p3")])


@settings(max_examples=40)
@given(CLUSTERS, LENGTHS, SLOS)
def test_a_burst_is_decided_as_if_each_had_been_sent_before_the_next(
    cluster: tuple[str, ...], lengths: list[int], slo: Slo
) -> None:
    found: list[list[tuple[bool, str]]] = []
    for at_once in (True, False):
        desk = adaptive(*cluster, slo=slo)
        for number, length in enumerate(lengths):
            desk.submit(f"r{number}", tuple(range(1, length + 1)))
        desk.step()
        for number in range(len(lengths)):
            grant(desk, f"r{number}", 130 * number)
            if not at_once:
                desk.step()
        desk.step()
        assert not list(wrong_counts(desk.router))
        entries = [desk.router.ledger.entry(f"r{number}") for number in range(len(lengths))]
        found.append([(each.decision.remote, each.decision.why) for each in entries])
    assert found[0] == found[1]


def test_a_burst_does_not_see_an_idle_prefill_worker_each_time() -> None:
    desk = adaptive("d1", "p1", slo=Slo(0.06, None))
    names = [f"r{number}" for number in range(8)]
    for number, name in enumerate(names):
        desk.submit(name, tuple(range(1, 302)))
        desk.step()
        grant(desk, name, 100 * number)
    desk.step()
    remote = [desk.router.ledger.entry(name).decision.remote for name in names]
    assert remote.count(True) in range(2, 7), "both workers take part"


def waits(desk: Desk, name: str = "a") -> Entry:
    """It is decided that a prefill worker fills it, and nothing is sent: another one is expected."""
    for each in (name, "other"):
        desk.hear("client", msg.Submit(each, tuple(range(1, 40)), GenerationParams(4)))
    desk.step()
    grant(desk, name, 0)
    assert not sent(desk.step(), msg.Fill)
    return desk.router.ledger.entry(name)


def windowed(*workers: str) -> Desk:
    """What is decided waits for others whose blocks are being reserved."""
    desk = Desk(*workers, rules=Rules(8, 10.0, 1 << 16), pool=4096)
    told(desk, *workers)
    return desk


def test_what_was_promised_to_a_worker_that_dies_is_decided_anew() -> None:
    desk = windowed("d1", "p1", "p2")
    entry = waits(desk)
    promises = desk.router.ledger.loads.promises
    ((request, first, tokens),) = promises
    assert (request, tokens) == ("a", entry.unfilled)
    assert first is not None
    desk.hear("", msg.Exited(first))
    assert not list(promises)
    assert not list(wrong_counts(desk.router))
    desk.step()
    assert [(name, worker) for name, worker, _ in promises] == [
        ("a", ({"p1", "p2"} - {first}).pop())
    ]
    assert not list(wrong_counts(desk.router))


def test_what_was_promised_on_a_way_that_fails_is_filled_by_decode() -> None:
    desk = windowed("d1", "p1")
    entry = waits(desk)
    assert entry.decision.remote
    desk.hear("p1", msg.WayLost("d1", "d1/0", "unplugged", ()))
    assert [order.run for _, order in sent(desk.step(), msg.Start)] == [entry.run]  # type: ignore[attr-defined]
    assert entry.decision.cause is Cause.NO_PREFILL
    assert not list(desk.router.ledger.loads.promises)
