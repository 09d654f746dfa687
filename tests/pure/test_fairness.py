"""Fair shares: every request is served, and no tenant or group gets more than its part."""

from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.lifecycle import LIVE, Event, State
from baton.params import GenerationParams
from baton.wire import messages as msg
from router.batching import Rules
from router.expected import REMEMBERED, UNKNOWN, Expected
from router.fairness import FairQueue
from router.ledger import Ledger
from router.line import Line
from router.observers import Observers
from router.priority import PriorityQueue
from tests.depth import deep
from tests.pure.desk import Desk, sent
from tests.pure.test_ledger import add_of
from tests.pure.test_ledger import step as move
from tests.pure.town import Town

MOST = 1000  # tokens of a request here
COSTS = st.integers(1, MOST)


def serve(queue: FairQueue) -> str:
    name = queue.first()
    assert name is not None
    queue.serve(name)
    return name


def test_one_tenant_and_group_is_first_come_first_served() -> None:
    queue = FairQueue()
    names = [f"r{i}" for i in range(50)]
    for index, name in enumerate(names):
        queue.add(name, "", "", index % 7 + 1)
    assert [serve(queue) for _ in names] == names
    assert queue.first() is None


def test_the_lowest_priority_number_of_a_tenant_goes_first_at_nobody_else_s_cost() -> None:
    queue = FairQueue()
    for index, priority in enumerate((0, 5, -1, 5, -1, 0)):
        queue.add(f"a{index}", "a", f"g{index % 2}", 10, priority)
        queue.add(f"b{index}", "b", "", 10)
    served = [serve(queue) for _ in range(12)]
    assert [name for name in served if name[0] == "a"] == ["a2", "a4", "a0", "a5", "a1", "a3"]
    assert [name[0] for name in served] == ["a", "b"] * 6
    assert (len(queue), queue.first()) == (0, None)


def test_what_a_group_took_counts_among_those_of_its_priority() -> None:
    queue = FairQueue()
    for index in range(4):
        for group in ("g", "h"):
            queue.add(f"{group}{index}", "a", group, 10, -3)
            queue.add(f"late {group}{index}", "a", group, 10, 3)
    first = serve(queue)
    queue.settle("a", first[0], 15, -3)
    other = "h" if first[0] == "g" else "g"
    assert [serve(queue)[0] for _ in range(3)] == [other, other, other]
    queue.remove("late g0")
    assert [serve(queue)[:4] for _ in range(4)][-1] != "late"


STEP = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(0, 2), COSTS),
    st.tuples(st.just("serve")),
    st.tuples(st.just("remove"), st.integers(0, 50)),
)


@settings(max_examples=deep(300, usual=100), deadline=None)
@given(st.lists(STEP, max_size=80))
def test_every_request_is_served_once_and_in_order_within_its_group(
    steps: list[tuple[object, ...]],
) -> None:
    queue, groups, places = FairQueue(), {}, {}
    serial = 0

    def take() -> None:
        name = queue.first()
        assert name is not None
        assert groups[places[name]].popleft() == name  # the first of its group
        queue.serve(name)

    for step in steps:
        match step:
            case ("add", tenant, group, cost):
                serial += 1
                name, where = f"r{serial}", (f"t{tenant}", f"g{group}")
                queue.add(name, *where, cost)  # type: ignore[arg-type]
                places[name] = where
                groups.setdefault(where, deque()).append(name)
            case ("serve",) if len(queue):
                take()
            case ("remove", which) if len(queue):
                waiting = sorted(name for names in groups.values() for name in names)
                name = waiting[which % len(waiting)]  # type: ignore[operator]
                queue.remove(name)
                groups[places[name]].remove(name)
        assert len(queue) == sum(map(len, groups.values()))
    while len(queue):
        take()
    assert not any(groups.values())
    assert queue.first() is None


@settings(max_examples=deep(200, usual=60), deadline=None)
@given(
    st.lists(st.lists(COSTS, min_size=1, max_size=40), min_size=2, max_size=5),
    st.booleans(),
)
def test_between_two_that_both_wait_the_served_cost_differs_by_at_most_one_request(
    costs: list[list[int]], of_groups: bool
) -> None:
    queue, left, served = FairQueue(), Counter[str](), Counter[str]()
    price: dict[str, int] = {}
    for index, each in enumerate(costs):
        for number, cost in enumerate(each):
            name = f"{index}.{number}"
            place = ("same", str(index)) if of_groups else (str(index), "")
            queue.add(name, *place, cost)
            price[name] = cost
        left[str(index)] = len(each)
    while min(left.values()):
        name = serve(queue)
        who = name.partition(".")[0]
        served[who] += price[name]
        left[who] -= 1
        dearest = max(price.values())
        assert max(served.values()) - min(served[str(i)] for i in range(len(costs))) <= dearest


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4000), st.lists(COSTS, min_size=1, max_size=20))
def test_behind_a_hog_of_4096_a_newcomer_waits_for_nobody(before: int, costs: list[int]) -> None:
    """Requests that run are not in the queue: of those that wait at most one goes before."""
    queue = FairQueue()
    for number in range(4096):
        queue.add(f"hog{number}", "hog", f"g{number % 4}", costs[number % len(costs)])
    for _ in range(before):
        serve(queue)
    queue.add("new", "newcomer", "", MOST)
    assert "new" in (serve(queue), serve(queue))


def test_who_was_away_has_no_credit_and_who_leaves_and_comes_back_no_advantage() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.add(f"a{number}", "a", "", 10)
    for _ in range(50):
        serve(queue)
    for number in range(20):
        queue.add(f"b{number}", "b", "", 10)
    late = [serve(queue)[0] for _ in range(20)]
    assert late.count("a") == 10  # not twenty of b, for the fifty it missed
    queue.add("c0", "c", "", 500)
    while serve(queue) != "c0":
        pass
    queue.add("c1", "c", "", 500)  # c was away for a moment, with nothing in line
    following = [serve(queue)[0] for _ in range(20)]
    assert "c" not in following


def test_a_tenants_groups_share_its_part_only() -> None:
    queue = FairQueue()
    for group in range(9):
        for number in range(10):
            queue.add(f"many{group}.{number}", "many", f"g{group}", 10)
    for number in range(30):
        queue.add(f"one{number}", "one", "g", 10)
    served = [serve(queue) for _ in range(36)]
    assert sum(name.startswith("one") for name in served) == 18
    groups = Counter(name.partition(".")[0] for name in served if name.startswith("many"))
    assert set(groups.values()) == {2}


def test_in_the_long_run_tokens_count_and_not_what_was_asked_for() -> None:
    """One tenant's answers are as long as announced, the other's end early, or go beyond the estimate."""
    for actual in (10, 900):
        queue, taken = FairQueue(), Counter[str]()
        for number in range(2000):
            queue.add(f"a{number}", "a", "", 300)
            queue.add(f"b{number}", "b", "", 300)
        for _ in range(1000):
            who = serve(queue)[0]
            took = actual if who == "b" else 300
            taken[who] += took
            queue.settle(who, "", took - 300)
        assert abs(taken["a"] - taken["b"]) <= 900


def test_what_a_tenant_took_while_it_did_not_wait_counts_when_it_comes_back() -> None:
    queue = FairQueue()
    for number in range(50):
        queue.add(f"a{number}", "a", "", 10)
    queue.settle("b", "", 100)
    queue.settle("c", "", -100)
    queue.add("b", "b", "", 10)
    queue.add("c", "c", "", 10)
    order = [serve(queue) for _ in range(14)]
    assert order.index("c") == 1
    assert 9 <= order.index("b") <= 12


def test_nothing_is_remembered_when_nobody_waits() -> None:
    queue = FairQueue()
    for number in range(5000):
        queue.add("r", f"t{number}", "g", MOST)
        queue.add("s", "other", "g", 1)
        queue.serve("r")
        queue.serve("s")
    assert not queue._tenants
    assert not queue._turns._away


def test_visitors_are_forgotten_as_time_passes() -> None:
    queue = FairQueue()
    for number in range(10_000):
        queue.add(f"hog{number}", "hog", "", 50)
    for number in range(5000):
        queue.add(f"v{number}", f"visitor{number}", "", 50)
        serve(queue)
        serve(queue)
    assert len(queue._turns._away) < 200
    assert len(queue._turns._tags._heap) < 200


def test_requests_that_come_back_go_first_in_order_of_submission() -> None:
    line = Line()
    for name in "abcd":
        line.add(name, name, "", 1)
    for name in "abc":
        line.place(name)
    line.put_back("c", 3, quarantined=False)
    line.put_back("a", 1, quarantined=False)
    line.put_back("b", 2, quarantined=True)
    assert line.first(quarantined=True) == "a"
    line.place("a")
    assert line.first(quarantined=True) == "b"
    assert line.first(quarantined=False) == "c"
    line.remove("c")
    assert line.first(quarantined=False) == "d"
    assert list(line.returned()) == ["b"]
    line.remove("b")
    assert line.first(quarantined=True) == "d"


def test_what_is_set_aside_lets_others_pass_and_returns_to_its_place() -> None:
    line = Line()
    for name in "abcd":
        line.add(name, "tenant", "group", 1)
    line.set_aside("a", 7)
    line.set_aside("b", 9)
    assert line.first(quarantined=True) == "c"
    assert (line.aside, sorted(line.returned())) == ("a", ["a", "b"])
    assert line.call_back(6) == []
    assert line.call_back(8) == ["a"]
    line.add("a", "tenant", "group", 1, back=True)
    order = []
    while (name := line.first(quarantined=True)) is not None:
        order.append(name)
        line.place(name)
    assert order == ["a", "c", "d"]
    line.remove("b")
    assert (line.aside, line.call_back(99)) == (None, [])


@settings(max_examples=deep(200, usual=60), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(-5, 5) | st.none()), max_size=300))
def test_a_priority_queue_gives_the_smallest_of_what_is_there(
    steps: list[tuple[int, int | None]],
) -> None:
    queue, there = PriorityQueue(), {}
    for which, priority in steps:
        name = str(which)
        there.pop(name, None)
        queue.remove(name)
        if priority is not None:
            queue.put(name, priority)
            there[name] = priority
        assert len(queue) == len(there)
        first = queue.first()
        smallest = min(there.items(), key=lambda item: item[1], default=None)
        assert (first and first[1]) == (smallest and smallest[1])
        if first:  # of equals the one that was put first
            assert first[0] == next(n for n, p in there.items() if p == first[1])
        assert len(queue._heap) <= 2 * len(there) + 65


def test_looking_at_a_long_line_costs_no_more_than_at_a_short_one() -> None:
    """Counted, not timed: comparisons made by the queue for one request more, placed and gone."""

    class Cost(float):
        count = 0

        def __lt__(self, other: float) -> bool:
            Cost.count += 1
            return float(self) < float(other)

    def comparisons(size: int) -> int:
        queue = PriorityQueue()
        for number in range(size):
            queue.put(f"r{number}", Cost(number))
        Cost.count = 0
        for number in range(100):
            queue.put("new", Cost(-1))
            assert queue.first() == ("new", -1)
            queue.remove("new")
            queue.remove(f"r{number}")
        return Cost.count

    assert comparisons(10_000) < 3 * comparisons(100)


def test_in_the_router_a_newcomer_is_next_whatever_waits() -> None:
    desk = Desk(rules=Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True))
    tokens = GenerationParams(4)
    for number in range(200):
        group = f"g{number % 5}"
        desk.hear("client", msg.Submit(f"hog{number}", (1, 2, 3), tokens, "hog", group))
    placed = [order.run for _, order in sent(desk.step(), msg.Reserve)]  # type: ignore[attr-defined]
    assert placed == ["hog0#0", "hog1#1", "hog2#2", "hog3#3"]
    for run in placed:
        desk.hear("d1", msg.Reserved(desk.grant(run)))
    desk.step()
    desk.hear("other", msg.Submit("new", (1, 2, 3), tokens, "newcomer", ""))
    assert not sent(desk.step(), msg.Reserve)  # what runs goes on
    desk.hear("d1", msg.Decoded((msg.RunTokens("hog0#0", 3, (5,), "length"),)))
    [(_, order)] = sent(desk.step(), msg.Reserve)
    assert isinstance(order, msg.Reserve)
    assert order.run == "new#4"


def test_a_request_that_needs_many_blocks_is_not_starved_by_small_ones_of_others() -> None:
    """It stops the line until it fits, however many others come."""
    rules = Rules(batch_size=8, window_s=0.0, token_budget=64, colocated=True)
    town = Town(prefills=0, blocks=8, rules=rules)
    params = GenerationParams(2)
    town.submit("running", range(1, 9), 12)
    town.turn()
    town.client(msg.Submit("big", tuple(range(100, 124)), params, "b", ""))
    started: list[str] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Start):
            started.append(message.run.partition("#")[0])

    town.before = before
    names = []
    for number in range(40):
        names.append(f"small{number}")
        town.client(msg.Submit(names[-1], (number + 1, 2), params, f"t{number % 3}", ""))
    town.run_all([*names, "big", "running"])
    assert started.index("big") <= 4


ROUND = 25  # tokens that every running request gets
SLOTS = 4
PROMPT = 3


def served(lengths: dict[str, int], most: int, rounds: int) -> list[Counter[str]]:
    """Tokens of each tenant after each round. Their requests always wait, allow `most` tokens, and end
    when they have those of their tenant."""
    ledger, tokens, numbers = Ledger(Observers()), Counter[str](), Counter[str]()
    history = []

    def submit(tenant: str) -> None:
        add_of(ledger, f"{tenant} {numbers[tenant]}", tenant, most)
        numbers[tenant] += 1

    for tenant in lengths:
        for _ in range(2 * SLOTS):
            submit(tenant)
    for _ in range(rounds):
        while ledger.count(*LIVE) - ledger.count(State.QUEUED) < SLOTS:
            entry = ledger.next_queued(0.0)
            assert entry is not None
            for event in (Event.RESERVE, Event.GRANTED, Event.FILL, Event.START):
                move(ledger, entry, event)
            tokens[entry.tenant] += PROMPT
            submit(entry.tenant)
        for entry in ledger.in_state(State.DECODING):
            new = min(ROUND, lengths[entry.tenant] - len(entry.emitted))
            ledger.tokens(entry, [7] * new, [0.0] * new)
            tokens[entry.tenant] += new
            if len(entry.emitted) == lengths[entry.tenant]:
                move(ledger, entry, Event.FINISH)
        history.append(Counter(tokens))
    return history


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 120), st.integers(1, 12), st.sampled_from([2000, 100_000]))
def test_who_sends_longer_answers_takes_no_more_than_its_share(
    short: int, times: int, most: int
) -> None:
    """However long: what the two differ by does not grow. It is at most what the requests take that run
    at one time, as these are not interrupted, and what is charged before the first of them has ended."""
    lengths = {"long": short * times, "short": short}
    history = served(lengths, most, 40 * times * short // ROUND // SLOTS + 40)
    bound = SLOTS * (max(lengths.values()) + PROMPT + UNKNOWN)
    assert max(abs(each["long"] - each["short"]) for each in history) <= bound


def test_answers_are_expected_to_be_as_long_as_the_last_ones() -> None:
    expected = Expected()
    assert (expected.tokens("a", 9000), expected.tokens("a", 9)) == (UNKNOWN, 9)
    for _ in range(40):
        expected.ended("a", 4000)
        expected.ended("b", 2)
    assert abs(expected.tokens("a", 9000) - 4000) < 10
    assert expected.tokens("b", 9000) == 2
    for number in range(REMEMBERED):
        expected.ended(f"visitor {number}", 5)
    assert expected.tokens("a", 9000) == UNKNOWN


def test_a_long_answer_counts_while_it_is_generated() -> None:
    history = served({"long": 5000, "short": 50}, 5000, 19)
    assert history[-1]["short"] > 0
    ledger = Ledger(Observers())
    entry = add_of(ledger, "a", "hog", 9000)
    for event in (Event.RESERVE, Event.GRANTED, Event.FILL, Event.START):
        move(ledger, entry, event)
    add_of(ledger, "b", "hog", 10)
    ledger.tokens(entry, [7] * 3000, [0.0] * 3000)
    for number in range(50):
        add_of(ledger, f"c{number}", "other", 100)
    others = 0
    while (first := ledger.next_queued(0.0)) is not None and first.tenant == "other":
        move(ledger, first, Event.RESERVE)
        others += 1
    assert 25 <= others <= 35
