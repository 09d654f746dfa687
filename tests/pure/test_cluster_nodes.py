"""The whole cluster with a pretend model: killed, cancelled and stalled before every message.

Each request ends once, with the tokens of a calm run, and the pool is full again.
"""

from collections.abc import Callable, Iterable

import pytest

from baton.wire import messages as msg
from baton.wire.node import ROUTER, To
from router.batching import Rules
from tests.pure.town import Town, calm_answer

PROMPTS = {
    "a": (range(1, 12), 6),
    "b": (range(20, 23), 3),
    "c": (range(30, 70), 2),  # longer than the prefill budget: filled in chunks
    "d": (range(80, 81), 5),  # one token: nothing to fill
    "e": (range(90, 101), 1),
}


def town_with_requests(*, stream_interval_s: float = 0.0, **options: object) -> Town:
    town = Town(prefills=2, decodes=2, **options)
    for name, (prompt, length) in PROMPTS.items():
        town.submit(name, prompt, length, stream_interval_s=stream_interval_s)
    return town


def assert_calm(town: Town, *, but: str = "") -> None:
    for name, (prompt, length) in PROMPTS.items():
        outcome = town.outcomes[name]
        assert len(outcome.ends) == 1, f"{name} ended {outcome.ends}"
        if name != but:
            tokens, reason = calm_answer(prompt, length)
            assert (outcome.tokens, outcome.ends) == (tokens, [reason]), name


def messages_of_a_calm_run(**options: object) -> int:
    town = town_with_requests(**options)
    town.run_all(PROMPTS)
    return town.delivered


CALM_MESSAGES = messages_of_a_calm_run()


def interrupted(at: int, action: Callable[[Town], None], **options: object) -> Town:
    """A run in which `action` happens before the delivery of message number `at`."""
    town = town_with_requests(**options)

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            action(town)

    town.before = before
    town.run_all(PROMPTS)
    return town


def test_a_calm_run_gives_every_request_its_tokens_and_the_blocks_back() -> None:
    town = town_with_requests()
    town.run_all(PROMPTS)
    assert_calm(town)
    assert town.router.ledger.late_reports == 0


def test_prefill_and_decode_both_took_part() -> None:
    town = town_with_requests()
    seen = set()
    town.before = lambda sender, receiver, message: seen.add((type(message), receiver))
    town.run_all(PROMPTS)
    workers = town.workers()
    assert {w for kind, w in seen if kind is msg.Fill} == {w for w in workers if "prefill" in w}
    assert {w for kind, w in seen if kind is msg.Start} == {w for w in workers if "decode" in w}


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1))
@pytest.mark.parametrize("victim", ["prefill-0", "prefill-1", "decode-0", "decode-1"])
def test_any_worker_may_be_killed_before_any_message(victim: str, at: int) -> None:
    def kill(town: Town) -> None:
        for name in town.workers(victim):
            town.kill(name)

    assert_calm(interrupted(at, kill))


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1))
def test_all_workers_may_be_killed_at_once(at: int) -> None:
    def kill(town: Town) -> None:
        for name in town.workers():
            town.kill(name)

    assert_calm(interrupted(at, kill))


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1))
@pytest.mark.parametrize("request_id", list(PROMPTS))
def test_any_request_may_be_cancelled_before_any_message(request_id: str, at: int) -> None:
    town = interrupted(at, lambda town: town.client(msg.Abort(request_id)))
    assert_calm(town, but=request_id)
    tokens, _ = calm_answer(*PROMPTS[request_id])
    seen = town.outcomes[request_id].tokens
    assert seen == tokens[: len(seen)]


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 3))
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_stalled_worker_wakes_up_and_harms_nobody(victim: str, at: int) -> None:
    town = town_with_requests()

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            town.stalled.update(town.workers(victim))

    town.before = before
    town.run(lambda: all(town.outcomes[name].ends for name in PROMPTS))
    town.settle()  # which wakes it
    assert_calm(town)
    town.run(lambda: len(town.router.workers.infos(town.now)) == 4)  # it has joined again
    town.settle()


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 2))
def test_a_router_that_dies_takes_its_requests_but_leaks_nothing(at: int) -> None:
    town = town_with_requests()

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            town.kill(ROUTER)

    town.before = before
    town.run(lambda: town.delivered >= at + 1)
    for name, (prompt, length) in PROMPTS.items():
        town.outcomes.pop(name, None)
        town.submit(f"again-{name}", prompt, length)
    town.run_all([f"again-{name}" for name in PROMPTS])
    for name, (prompt, length) in PROMPTS.items():
        assert town.outcomes[f"again-{name}"].tokens == calm_answer(prompt, length)[0]


def test_deaths_elsewhere_do_not_count_against_a_request() -> None:
    town = Town(decodes=2, rules=Rules(batch_size=1, window_s=0.0, token_budget=64))
    town.submit("a", range(1, 9), 5)
    town.submit("waiting", range(40, 49), 5)
    deaths = 0

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal deaths
        if isinstance(message, msg.Start) and message.run.startswith("a#") and deaths < 2:
            deaths += 1
            town.kill(receiver)

    town.before = before
    town.run_all(["a", "waiting"])
    assert town.outcomes["a"].tokens == calm_answer(range(1, 9), 5)[0]
    assert town.outcomes["waiting"].tokens == calm_answer(range(40, 49), 5)[0]


def test_damaged_kv_is_filled_again_and_never_decoded() -> None:
    town = town_with_requests()
    hits = []
    town.damage = lambda grant: len(hits) < 2 and not hits.append(grant.run)
    town.run_all(PROMPTS)
    assert_calm(town)
    assert len(hits) == 2


def test_kv_that_is_damaged_every_time_fails_no_request() -> None:
    town = town_with_requests()
    damaged: list[str] = []
    town.damage = lambda grant: not damaged.append(grant.run)
    town.run_all(PROMPTS)
    assert_calm(town)
    assert sorted(run.partition("#")[0] for run in damaged) == sorted("abce" * 2)
    assert len({*damaged}) == 8


def test_colocated_serving_needs_no_prefill_worker() -> None:
    rules = Rules(batch_size=4, window_s=0.01, token_budget=64, colocated=True)
    town = town_with_requests(rules=rules)
    for name in town.workers("prefill"):
        town.kill(name, restart=False)
    town.run_all(PROMPTS)
    assert_calm(town)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("budget", [1, 7, 100])
def test_batch_size_and_chunk_size_change_nothing_in_the_answers(
    batch_size: int, budget: int
) -> None:
    rules = Rules(batch_size=batch_size, window_s=0.0, token_budget=64)
    town = town_with_requests(rules=rules, prefill_budget=budget)
    town.run_all(PROMPTS)
    assert_calm(town)


def test_a_full_pool_makes_requests_wait_not_fail() -> None:
    town = Town(blocks=6, rules=Rules(batch_size=8, window_s=0.0, token_budget=64))
    for index in range(12):
        town.submit(f"r{index}", range(index + 1, index + 12), 6)
    town.run_all([f"r{index}" for index in range(12)])
    for index in range(12):
        tokens = calm_answer(range(index + 1, index + 12), 6)[0]
        assert town.outcomes[f"r{index}"].tokens == tokens


def test_a_request_that_no_pool_can_hold_is_refused_in_words() -> None:
    town = Town(blocks=6)
    town.submit("big", range(1, 60), 6)
    town.submit("small", range(1, 9), 2)
    town.run_all(["big", "small"])
    assert town.outcomes["big"].ends == ["context_length_exceeded"]
    assert town.outcomes["small"].ends == ["length"]


def test_a_client_that_leaves_takes_its_requests_along() -> None:
    town = Town()
    town.submit("a", range(1, 9), 50)
    town.run(lambda: len(town.outcomes["a"].tokens) > 3)
    town.mail["kernel", ROUTER].append(b"")
    town.mail["kernel", ROUTER].pop()
    town.send("client", town.router.handle("client", msg.Exited("client"), town.now))
    town.settle()
    assert town.outcomes["a"].ends == []


def test_a_stop_string_ends_the_request_and_frees_its_blocks() -> None:
    prompt = range(1, 9)
    tokens = calm_answer(prompt, 6)[0]
    town = Town()
    town.submit("a", prompt, 50, stop=(f"{tokens[2]} ",))
    town.run_all(["a"])
    assert town.outcomes["a"].ends == ["stop"]
    assert town.outcomes["a"].text == f"{tokens[0]} {tokens[1]} "


def test_the_number_of_running_requests_stays_within_the_batch_size() -> None:
    town = Town(rules=Rules(batch_size=3, window_s=0.01, token_budget=64))
    for index in range(9):
        town.submit(f"r{index}", range(index + 1, index + 8), 4)
    most = 0

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal most
        holding = [n.table for name, n in town.nodes.items() if "decode" in name]
        most = max(most, sum(len(table._held) for table in holding))

    town.before = before
    town.run_all([f"r{index}" for index in range(9)])
    assert most == 3


def test_logits_that_are_no_numbers_end_one_request_and_no_other() -> None:
    town = town_with_requests()
    town.poisoned = {PROMPTS["b"][0][0]}
    town.run_all(PROMPTS)
    assert town.outcomes["b"].ends == ["numerical_error"]
    assert_calm(town, but="b")


def fills(window_s: float, *, between_s: float = 0.0) -> list[int]:
    """How many prompts go in each batch, when six come at once, or one every so many seconds. The
    decode worker takes 4 ms for each answer."""
    rules = Rules(batch_size=16, window_s=window_s, token_budget=512)
    town = Town(rules=rules)
    seen: list[int] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Reserved):
            town.now += 0.004
            town.send(ROUTER, town.nodes[ROUTER].step(town.now))

    def send(sender: str, effects: Iterable[object]) -> None:
        sent = list(effects)
        filled = sum(isinstance(e, To) and isinstance(e.message, msg.Fill) for e in sent)
        seen.extend([filled] if filled else [])
        deliver(sender, sent)

    deliver, town.send, town.before = town.send, send, before  # type: ignore[method-assign]
    for i in range(6):
        town.submit(f"r{i}", range(10 * i + 1, 10 * i + 9), 2)
        if between_s:
            town.run_all([f"r{i}"])
            town.now += between_s
    town.run_all([f"r{i}" for i in range(6)])
    return seen


def test_a_batch_waits_for_those_whose_blocks_are_on_their_way() -> None:
    assert fills(window_s=0.1) == [6]


def test_it_waits_for_them_no_longer_than_the_window() -> None:
    first, *others = fills(window_s=0.01)
    assert 1 < first < 6
    assert sum(others) == 6 - first


def test_where_nothing_waits_each_goes_as_it_comes() -> None:
    assert len(fills(window_s=0.0)) > 2


def test_who_comes_alone_waits_for_nobody() -> None:
    assert fills(window_s=5.0, between_s=1.0) == [1] * 6


def test_a_prompt_on_an_idle_cluster_is_filled_as_soon_as_it_has_its_blocks() -> None:
    town = Town(rules=Rules(batch_size=4, window_s=5.0, token_budget=64))
    times: dict[type, float] = {}
    town.before = lambda sender, receiver, message: times.setdefault(type(message), town.now)
    town.submit("r", range(1, 9), 2)
    town.run_all(["r"])
    assert times[msg.Fill] - times[msg.Reserved] <= 0.002  # the town's turns, not the window
