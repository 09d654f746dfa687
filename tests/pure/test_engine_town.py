"""Engine workers in a cluster: every request ends once, with the tokens of an undisturbed run, whatever
becomes of workers and upstreams; and no connection to an upstream is left open."""

import pytest

from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import ROUTER
from router.batching import Rules
from router.workers import MISSED_BEATS
from sampler.params import SamplingParams
from tests.pure.engine_town import EngineTown, drawn_answer
from tests.pure.test_embedding_town import embed
from tests.pure.town import GREEDY, calm_answer

PROMPTS = {"a": [5, 6, 7], "b": [9], "c": [1, 2, 3, 4, 5, 6, 7, 8, 9], "d": [30, 31]}
LENGTH = 6


def seeded(seed: int, **options: float) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, **options)  # type: ignore[arg-type]


def town_with_requests(town: EngineTown) -> EngineTown:
    """Two greedy and two seeded requests."""
    for number, (name, prompt) in enumerate(PROMPTS.items()):
        town.submit(name, prompt, LENGTH, sampling=seeded(number) if number % 2 else GREEDY)
    return town


def assert_calm(town: EngineTown) -> None:
    for number, (name, prompt) in enumerate(PROMPTS.items()):
        outcome = town.outcomes[name]
        if number % 2:
            assert outcome.tokens == drawn_answer(prompt, LENGTH, number), name
            assert outcome.ends == ["length"]
        else:
            tokens, reason = calm_answer(prompt, LENGTH)
            assert (outcome.tokens, outcome.ends) == (tokens, [reason]), name


def calm() -> int:
    town = town_with_requests(EngineTown())
    town.run_all(PROMPTS)
    assert_calm(town)
    assert town.infos == []
    return town.delivered


CALM_MESSAGES = calm()


def test_requests_are_spread_over_the_engines() -> None:
    town = town_with_requests(EngineTown())
    town.run_all(PROMPTS)
    assert [len(each.asked) for each in town.served()] == [2, 2]


def test_there_is_nothing_to_reserve_and_nothing_to_fill() -> None:
    town = town_with_requests(EngineTown())
    seen: set[type] = set()
    town.before = lambda sender, receiver, message: seen.add(type(message))
    town.run_all(PROMPTS)
    assert msg.Start in seen
    assert not seen & {msg.Reserve, msg.Fill, msg.Attach, msg.Renew}


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 2))
def test_a_worker_may_die_before_any_message(at: int) -> None:
    town = EngineTown()

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            town.kill(town.workers("engine-0")[0])

    town.before = before
    town_with_requests(town).run_all(PROMPTS)
    assert_calm(town)


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 2))
def test_upstreams_may_die_before_any_message(at: int) -> None:
    """And come back later: with both gone, requests wait for them."""
    town, count = EngineTown(), 1 + at // 2 % 2

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            for upstream in town.served()[:count]:
                upstream.die()
        if town.delivered == at + 25:
            for upstream in town.served():
                upstream.dead = False

    town.before = before
    town_with_requests(town).run_all(PROMPTS)
    assert_calm(town)


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 2))
def test_a_request_may_be_cancelled_before_any_message(at: int) -> None:
    town = town_with_requests(EngineTown())

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            town.client(msg.Abort("c"))

    town.before = before
    town.run_all(name for name in PROMPTS if name != "c")
    town.run(lambda: town.at_rest())
    assert len(town.outcomes["c"].ends) <= 1
    assert all(not each.open for each in town.upstreams.values())


def test_a_cancelled_run_closes_its_request_at_the_upstream() -> None:
    town = EngineTown(engines=1)
    town.submit("a", [5, 6, 7], 400, sampling=GREEDY, ignore_eos=True)
    town.run(lambda: len(town.outcomes["a"].tokens) > 2)
    (upstream,) = town.served()
    assert len(upstream.open) == 1
    town.client(msg.Abort("a"))
    town.run(lambda: bool(town.outcomes["a"].ends))
    town.run(lambda: not upstream.open, turns=20)


def test_a_router_that_dies_leaves_nothing_open() -> None:
    town = EngineTown(engines=1)
    town.submit("a", [5, 6, 7], 400, sampling=GREEDY, ignore_eos=True)
    town.run(lambda: len(town.outcomes["a"].tokens) > 2)
    town.kill(ROUTER)
    town.run(lambda: not town.served()[0].open, turns=200)
    town.run(lambda: len(town.router.workers.infos(town.now)) == 1, turns=200)


def test_an_upstream_never_gets_more_than_the_worker_takes() -> None:
    town, most = EngineTown(slots=2), 0

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal most
        most = max(most, *(len(each.open) for each in town.served()))

    town.before = before
    names = [f"r{i}" for i in range(12)]
    for i, name in enumerate(names):
        town.submit(name, [i + 1, 7], LENGTH, sampling=seeded(i))
    town.run_all(names)
    assert most == 2
    for i, name in enumerate(names):
        assert town.outcomes[name].tokens == drawn_answer([i + 1, 7], LENGTH, i)


def test_a_busy_upstream_makes_requests_wait_and_fails_none() -> None:
    """429 is no fault of a request: more of them than a death may have."""
    town = EngineTown(engines=1)
    (upstream,) = town.served()
    upstream.most = 0
    town_with_requests(town)
    town.run(lambda: len(upstream.asked) >= 6)
    assert not any(town.outcomes[name].ends for name in PROMPTS)
    assert town.router.info(town.now).ready  # requests wait here: the cluster refuses none
    upstream.most = 1
    town.run_all(PROMPTS)
    assert_calm(town)


def test_a_dead_upstream_is_named_while_requests_wait_and_found_without_any() -> None:
    town = EngineTown(engines=1)
    town.run(lambda: town.router.info(town.now).ready)
    (upstream,) = town.served()
    upstream.dead = True
    town.run(lambda: not town.router.info(town.now).ready)
    info = town.router.info(town.now)
    assert "http://up-0: connection refused" in info.waiting_for
    assert [each.state for each in info.workers] == ["paused"]
    town_with_requests(town)
    for _ in range(50):
        town.turn()
    assert upstream.asked == []
    upstream.dead = False
    town.run_all(PROMPTS)
    assert_calm(town)


def test_one_dead_upstream_among_several_degrades_the_cluster() -> None:
    town = EngineTown()
    town.run(lambda: len(town.router.info(town.now).workers) == 2)
    town.served()[0].dead = True
    town.run(lambda: bool(town.router.info(town.now).degraded))
    info = town.router.info(town.now)
    assert info.ready
    assert "http://up-0" in info.degraded


def test_a_silent_upstream_is_given_up_and_its_requests_move() -> None:
    """A host that is gone closes no connection."""
    town = EngineTown()
    town_with_requests(town)
    town.run(lambda: any(outcome.tokens for outcome in town.outcomes.values()))
    for upstream in town.served()[:1]:
        upstream.mute = True
    town.run(lambda: all(town.outcomes[name].ends for name in PROMPTS))
    assert_calm(town)
    assert not town.served()[0].open


def test_an_upstream_with_another_model_gives_no_token() -> None:
    """Started again between two looks: the first event of an answer shows it."""
    town = EngineTown()
    town_with_requests(town)
    town.run(lambda: any(outcome.tokens for outcome in town.outcomes.values()))
    town.served()[0].model = "n"
    town.run_all(PROMPTS)
    assert_calm(town)
    town.run(lambda: bool(town.router.info(town.now).degraded))
    assert "http://up-0: another model" in town.router.info(town.now).degraded


def test_what_an_upstream_garbles_is_generated_elsewhere() -> None:
    town = EngineTown()
    town_with_requests(town)
    town.run(lambda: any(outcome.tokens for outcome in town.outcomes.values()))
    town.served()[0].garbled = True
    town.run_all(PROMPTS)
    assert_calm(town)
    town.run(lambda: bool(town.router.info(town.now).degraded))
    town.served()[0].garbled = False
    town.run(lambda: not town.router.info(town.now).degraded)


def test_a_request_that_kills_its_upstreams_takes_no_other_with_it() -> None:
    town = EngineTown()
    for upstream in town.served():
        upstream.deadly = lambda known: known[:2] == [30, 31] and len(known) == 4
    town_with_requests(town)
    town.run_all(PROMPTS)
    bad = town.outcomes["d"]
    assert bad.ends == ["worker_lost"]
    assert "it crashed" in bad.why
    assert bad.tokens == drawn_answer(PROMPTS["d"], LENGTH, 3)[:2]
    for name in ("a", "b", "c"):
        assert len(town.outcomes[name].tokens) == LENGTH or "stop" in town.outcomes[name].ends


def test_a_request_fails_when_no_upstream_takes_it_in_its_time() -> None:
    """The wait ends with the first token, not with the attempt: an upstream may have a queue, too."""
    town = EngineTown(engines=1)
    town.served()[0].most = 0
    params = GenerationParams(LENGTH, GREEDY)
    town.client(msg.Submit("a", (5, 6, 7), params, queue_timeout_s=5.0))
    town.run(lambda: bool(town.outcomes["a"].ends))
    assert town.outcomes["a"].ends == ["queue_timeout"]
    assert "all are busy" in town.outcomes["a"].why


def test_what_this_kind_of_server_cannot_do_fails_one_request() -> None:
    town = EngineTown(engines=1)
    town.submit("a", [5, 6, 7], LENGTH, sampling=GREEDY, logprobs=2)
    town.submit("b", [5, 6, 7], LENGTH, sampling=GREEDY)
    town.run_all(["a", "b"])
    assert town.outcomes["a"].ends == ["invalid_request"]
    assert "logprobs" in town.outcomes["a"].why
    assert "vLLM" in town.outcomes["a"].why
    assert town.outcomes["b"].tokens == calm_answer([5, 6, 7], LENGTH)[0]


@pytest.mark.parametrize("first", ["engine", "decode", "prefill"])
def test_engines_do_not_mix_with_workers_of_our_own(first: str) -> None:
    town = EngineTown(engines=0)
    names = [town.start_worker(first, 0)]
    town.run(lambda: len(town.router.workers.infos(town.now)) == 1)
    other = "decode" if first == "engine" else "engine"
    names.append(town.start_worker(other, 1))
    with pytest.raises(AssertionError, match="router of their own"):
        town.run(lambda: False, turns=20)


def test_engines_of_two_kinds_do_not_mix() -> None:
    town = EngineTown(engines=1)
    town.run(lambda: town.router.info(town.now).ready)
    hello = town.nodes[town.workers("engine")[0]].hello  # type: ignore[attr-defined]
    other = msg.Hello(**{name: getattr(hello, name) for name in hello.__slots__})
    object.__setattr__(other, "worker", "engine-9.9")
    object.__setattr__(other, "layout", "engine/sglang")
    why = town.router.workers.rejection("engine-9.9", other)
    assert why is not None
    assert "each kind of server" in why


def test_a_worker_that_leaves_finishes_what_runs_there() -> None:
    town = town_with_requests(EngineTown(rules=Rules(16, 0.01, 64)))
    town.run(lambda: any(outcome.tokens for outcome in town.outcomes.values()))
    leaver = town.workers("engine-0")[0]
    before = len(town.upstreams[town.workers("engine-1")[0]].asked)
    town.terminate(leaver)
    town.run_all(PROMPTS)
    assert_calm(town)
    town.run(lambda: leaver not in town.workers(), turns=int(MISSED_BEATS) * 100)
    assert len(town.served()[0].asked) == before


def test_embeddings_that_came_before_the_engines_are_refused_and_stop_nobody() -> None:
    town = EngineTown(engines=0)
    for number in range(2):
        embed(town, f"embed {number}", [3, 4])
        town.submit(f"talk {number}", [5, 6, 7], 3)
    for _ in range(5):
        town.turn()
    town.start_worker("engine", 0)
    town.run_all([f"{kind} {number}" for kind in ("embed", "talk") for number in range(2)])
    for number in range(2):
        assert town.outcomes[f"embed {number}"].ends == ["unsupported"]
        assert "prefill workers" in town.outcomes[f"embed {number}"].why
        assert town.outcomes[f"talk {number}"].tokens == calm_answer([5, 6, 7], 3)[0]
