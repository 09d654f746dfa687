"""Tokens that may wait to be told: fewer messages, the same answers, whatever dies in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.grant import Grant
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import ROUTER
from baton.wire.records import Logprob
from decode_worker.model import Drawn
from decode_worker.runs import Run
from decode_worker.token_buffer import TokenBuffer, flush_interval
from sampler.params import SamplingParams
from tests.pure.test_cluster_nodes import (
    PROMPTS,
    assert_calm,
    interrupted,
    messages_of_a_calm_run,
    town_with_requests,
)
from tests.pure.town import Town, calm_answer

PATIENCE_S = 0.005  # a few turns of the town


def run(patience_s: float) -> Run:
    grant = Grant("d", "d/0", "r#0", 1, (0,))
    params = GenerationParams(99, SamplingParams(temperature=0.0), stream_interval_s=patience_s)
    return Run(grant, [7], 0, 1, params)


def said(buffer: TokenBuffer, now: float) -> list[msg.RunTokens]:
    return [each for to in buffer.flush(now) for each in to.message.runs]


def speak(
    buffer: TokenBuffer, name: str, it: Run, token: int, now: float, end: bool = False
) -> None:
    finish = "length" if end else None
    it.append(token)
    buffer.put(name, it, Drawn(token), finish, now)


def test_the_first_token_goes_at_once_and_the_next_ones_wait() -> None:
    buffer, it = TokenBuffer(), run(1.0)
    speak(buffer, "r", it, 5, now=10.0)
    assert buffer.due(10.0) == 0.0
    assert said(buffer, 10.0) == [msg.RunTokens("r", 1, (5,))]
    speak(buffer, "r", it, 6, now=11.0)
    speak(buffer, "r", it, 7, now=11.5)
    assert buffer.due(11.5) == 0.5
    assert said(buffer, 12.0) == [msg.RunTokens("r", 2, (6, 7), ages=(1.0, 0.5))]


def test_a_last_token_takes_along_what_the_others_have_to_say() -> None:
    buffer, a, b = TokenBuffer(), run(1.0), run(1.0)
    for name, it in (("a", a), ("b", b)):
        speak(buffer, name, it, 5, now=0.0)
    buffer.flush(0.0)
    speak(buffer, "a", a, 6, now=1.0)
    speak(buffer, "b", b, 7, now=1.0, end=True)
    assert buffer.due(1.0) == 0.0
    assert said(buffer, 1.0) == [msg.RunTokens("a", 2, (6,)), msg.RunTokens("b", 2, (7,), "length")]
    assert said(buffer, 1.0) == []


def test_who_has_waited_less_than_half_its_time_does_not_go_along() -> None:
    """Else every first and last token of one stream would be a piece of text for all the others."""
    buffer, a, b, c = TokenBuffer(), run(1.0), run(1.0), run(1.0)
    for name, it in (("a", a), ("b", b), ("c", c)):
        speak(buffer, name, it, 5, now=0.0)
    buffer.flush(0.0)
    speak(buffer, "a", a, 6, now=1.0)
    speak(buffer, "b", b, 7, now=1.25)
    speak(buffer, "c", c, 8, now=1.5, end=True)
    (told,) = buffer.take_due(1.5, 1.5)
    assert [each.run for each in told.message.runs] == ["a", "c"]
    assert buffer.due(1.5) == 0.75
    assert buffer.take_due(2.0, 2.0) == []
    (told,) = buffer.take_due(2.25, 2.25)
    assert told.message.runs == (msg.RunTokens("b", 2, (7,), ages=(1.0,)),)
    assert buffer.due(2.25) == float("inf")


@pytest.mark.parametrize(
    ("asked", "runs", "waits"),
    [(0.02, 1, 0.02), (0.02, 10, 0.02), (0.02, 30, 0.06), (0.02, 50, 0.1), (0.02, 1000, 0.1),
     (0.0, 1000, 0.0), (0.1, 64, 0.1), (1.0, 64, 1.0)],
)  # fmt: skip
def test_of_many_each_waits_longer_but_never_long(asked: float, runs: int, waits: float) -> None:
    assert flush_interval(asked, runs) == pytest.approx(waits)


def test_the_least_patient_run_decides() -> None:
    buffer, slow, quick = TokenBuffer(), run(1.0), run(0.0)
    for name, it in (("slow", slow), ("quick", quick)):
        speak(buffer, name, it, 5, now=0.0)
    buffer.flush(0.0)
    speak(buffer, "slow", slow, 6, now=0.5)
    assert buffer.due(0.5) == 1.0
    speak(buffer, "quick", quick, 6, now=0.5)
    assert buffer.due(0.5) == 0.0


def test_what_nobody_wants_is_dropped_and_nothing_is_left_to_be_told() -> None:
    buffer, a, b = TokenBuffer(), run(1.0), run(1.0)
    speak(buffer, "a", a, 5, now=0.0)
    speak(buffer, "b", b, 5, now=0.0)
    buffer.drop("a")
    assert [each.run for each in said(buffer, 0.0)] == ["b"]
    speak(buffer, "b", b, 6, now=1.0)
    buffer.drop("b")
    assert buffer.due(100.0) == float("inf")


def test_logprobs_travel_with_their_tokens() -> None:
    buffer, it = TokenBuffer(), run(1.0)
    for token in (5, 6):
        it.append(token)
        buffer.put("r", it, Drawn(token, Logprob(-float(token))), None, 0.0)
    assert said(buffer, 0.0)[0].logprobs == (Logprob(-5.0), Logprob(-6.0))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 2)), max_size=40))
def test_every_token_is_told_once_in_order_and_none_waits_too_long(
    steps: list[tuple[str, bool, float]],
) -> None:
    buffer, now = TokenBuffer(), 0.0
    runs = {name: run(1.0) for name in "abc"}
    put: dict[str, list[int]] = {name: [] for name in runs}
    told: dict[str, list[int]] = {name: [] for name in runs}
    for count, (name, look, pause) in enumerate(steps):
        now += pause
        speak(buffer, name, runs[name], count, now)
        put[name].append(count)
        if look and buffer.due(now) <= 0:
            for each in said(buffer, now):
                assert each.position == 1 + len(told[each.run])
                assert list(each.ages) == sorted(each.ages, reverse=True)
                told[each.run] += each.token_ids
        waiting = any(len(put[each]) > len(told[each]) for each in put)
        assert (buffer.due(now) < float("inf")) == waiting
    for each in said(buffer, now):
        told[each.run] += each.token_ids
    assert told == put


# ---- in the town


def reports(town: Town) -> int:
    """Messages with tokens until all have ended."""
    seen: list[msg.Message] = []
    town.before = lambda sender, receiver, message: seen.append(message)
    town.run_all(PROMPTS)
    return sum(isinstance(message, msg.Decoded) for message in seen)


def test_it_saves_messages_and_changes_nothing_else() -> None:
    eager, patient = (town_with_requests(stream_interval_s=each) for each in (0.0, PATIENCE_S))
    assert reports(patient) < reports(eager)
    for town in (eager, patient):
        assert_calm(town)


MESSAGES = messages_of_a_calm_run(stream_interval_s=PATIENCE_S)


@pytest.mark.parametrize("at", range(1, MESSAGES + 1))
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "decode-1"])
def test_a_worker_that_dies_takes_no_token_with_it(victim: str, at: int) -> None:
    def kill(town: Town) -> None:
        for name in town.workers(victim):
            town.kill(name)

    assert_calm(interrupted(at, kill, stream_interval_s=PATIENCE_S))


@pytest.mark.parametrize("at", range(1, MESSAGES + 1, 2))
@pytest.mark.parametrize("request_id", ["a", "c"])
def test_a_request_may_be_cancelled_while_its_tokens_wait(request_id: str, at: int) -> None:
    town = interrupted(
        at, lambda town: town.client(msg.Abort(request_id)), stream_interval_s=PATIENCE_S
    )
    assert_calm(town, but=request_id)
    seen = town.outcomes[request_id].tokens
    assert seen == calm_answer(*PROMPTS[request_id])[0][: len(seen)]


def test_a_worker_whose_last_run_was_cancelled_has_nothing_to_do() -> None:
    town = Town()
    town.submit("a", range(1, 12), 50, stream_interval_s=1.0)
    town.run(lambda: len(town.outcomes["a"].tokens) >= 1)
    town.turn()
    town.client(msg.Abort("a"))
    town.run_all(["a"])
    (name,) = town.workers("decode")
    assert town.nodes[name]._buffer.due(town.now + 10.0) == float("inf")


@pytest.mark.parametrize(
    ("patience", "group"), [(0.0, 1), (0.001, 1), (0.0099, 1), (0.015, 2), (0.025, 3), (0.095, 10)]
)
def test_no_token_waits_longer_than_its_patience(patience: float, group: int) -> None:
    """Steps of 10 ms: what is not told at the end of one waits for the end of the next."""
    town = Town()
    town.submit("a", range(1, 12), 200, stream_interval_s=patience)
    town.run(lambda: len(town.outcomes["a"].tokens) >= 1)
    (name,) = town.workers("decode")
    told: list[msg.RunTokens] = []
    for _ in range(60):
        town.now += 0.010
        for effect in town.nodes[name].step(town.now):
            if isinstance(effect.message, msg.Decoded):
                told += effect.message.runs
    counts = {len(each.token_ids) for each in told[1:]}  # the first may follow a turn of no time
    assert counts == {group}
    assert max((each.ages or (0.0,))[0] for each in told[1:]) <= patience + 1e-9


def test_an_id_that_comes_back_is_told_its_first_token_at_once() -> None:
    town = Town()
    for _ in range(2):
        seen: list[int] = []

        def before(
            sender: str, receiver: str, message: msg.Message, seen: list[int] = seen
        ) -> None:
            if isinstance(message, msg.Emitted):
                seen.append(len(message.token_ids))

        town.before = before
        town.outcomes.clear()
        town.submit("a", range(1, 12), 8, stream_interval_s=1.0)
        town.run_all(["a"])
        assert seen == [1, 7]


def test_in_a_full_pool_who_gives_way_has_told_its_tokens_first() -> None:
    town = Town(blocks=14)
    wanted = {name: (range(k, k + 9), 24) for name, k in (("x", 3), ("y", 43), ("z", 83))}
    for name, (prompt, length) in wanted.items():
        town.submit(name, prompt, length, stream_interval_s=1.0)
    town.run_all(wanted)
    assert sum(town.outcomes[name].preemptions for name in wanted) > 0
    for name, (prompt, length) in wanted.items():
        assert town.outcomes[name].tokens == calm_answer(prompt, length)[0]


def test_a_run_whose_logits_go_wrong_has_told_its_tokens_first() -> None:
    town = Town()
    prompt = range(1, 12)
    town.submit("a", prompt, 20, stream_interval_s=1.0)
    town.run(lambda: len(town.outcomes["a"].tokens) >= 1)
    for _ in range(3):
        town.turn()
    town.poisoned.add(1)
    town.run_all(["a"])
    tokens = town.outcomes["a"].tokens
    assert town.outcomes["a"].ends == ["numerical_error"]
    assert len(tokens) > 1
    assert tokens == calm_answer(prompt, 20)[0][: len(tokens)]


def test_a_stop_string_is_watched_at_every_step() -> None:
    town = Town()
    prompt = range(1, 12)
    tokens, _ = calm_answer(prompt, 30)
    orders: list[msg.Start] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Start):
            orders.append(message)

    town.before = before
    town.submit("a", prompt, 30, stop=(f"{tokens[4]} ",), stream_interval_s=1.0)
    town.run_all(["a"])
    assert [order.params.stream_interval_s for order in orders] == [0.0]
    assert town.outcomes["a"].ends == ["stop"]


def test_ages_are_taken_off_the_times_between_tokens() -> None:
    town = Town()
    town.submit("a", range(1, 12), 12, stream_interval_s=1.0)
    town.client(msg.Observe(), name="client.watch")
    seen: list[msg.Emitted] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if sender == ROUTER and isinstance(message, msg.Emitted):
            seen.append(message)

    town.before = before
    town.run_all(["a"])
    assert [len(each.token_ids) for each in seen] == [1, 11]
    assert seen[1].ages[0] > seen[1].ages[-1] == 0.0
