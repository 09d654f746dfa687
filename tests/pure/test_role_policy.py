"""Who fills a prompt: the policy over its inputs, what it rests on, and where its decisions show."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.options import ROLE_POLICIES
from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.pace import Pace, Span
from baton.params import GenerationParams
from baton.server.totals import Totals
from baton.timeline import Timeline
from baton.trace import chrome_trace
from baton.wire import messages as msg
from baton.wire.paces import Paces
from baton.wire.records import Counts, Decided, Speed
from router import cores
from router.batching import Rules
from router.local_fills import LocalFills
from router.role_policy import (
    WORTH_IT,
    Cause,
    Decision,
    DecodeSide,
    PrefillSide,
    RolePolicy,
    Slo,
    ahead,
    behind,
    choose,
    local_outlook,
    remote_outlook,
)
from tests.pure.test_router_edges import Desk, sent

QUICK = Pace(0.01, 0.0001)
HALF = QUICK.on_cores(0.5)
SLO = Slo(1.0, 0.06)


def own_devices(streams: int = 0, filling: tuple[int, ...] = ()) -> DecodeSide:
    return DecodeSide(QUICK, QUICK, QUICK, streams, filling)


def shared_cores(streams: int = 0, filling: tuple[int, ...] = ()) -> DecodeSide:
    return DecodeSide(QUICK, QUICK, HALF, streams, filling)


# ---- the table: who fills 1,000 tokens (a tenth of a second of work)

TABLE: Sequence[tuple[str, DecodeSide, PrefillSide, Slo, bool, Cause]] = (
    ("nothing runs: no hand-over", own_devices(), PrefillSide(QUICK, handover_s=0.02), SLO, False,
     Cause.WAITING),
    ("streams run: they go on", own_devices(8), PrefillSide(QUICK), SLO, True, Cause.WAITING),
    ("a slow way: they wait a little", own_devices(8), PrefillSide(QUICK, handover_s=0.7), SLO, False,
     Cause.WAITING),
    ("prefill has too much to do", own_devices(8), PrefillSide(QUICK, (900,) * 20), SLO, False,
     Cause.TTFT),
    ("decode has too much to do", own_devices(0, (900,) * 20), PrefillSide(QUICK), SLO, True,
     Cause.TTFT),
    ("no step with a prompt is short enough", own_devices(8), PrefillSide(QUICK, (900,) * 3),
     Slo(9.0, 0.0115), True, Cause.ITL),
    ("without streams nobody minds", own_devices(), PrefillSide(QUICK, handover_s=0.1),
     Slo(9.0, 0.0115), False, Cause.WAITING),
    ("prefill would take half of the cores", shared_cores(8), PrefillSide(HALF), SLO, False,
     Cause.WAITING),
    ("and those who are being filled", shared_cores(0, (2000, 2000)), PrefillSide(HALF), Slo(60.0, 0.06),
     False, Cause.WAITING),
    ("of half of the cores short steps take longer", shared_cores(4), PrefillSide(HALF),
     Slo(9.0, 0.016), True, Cause.WAITING),
    ("it would take them in the middle of a full step", shared_cores(4, (2000,)), PrefillSide(HALF),
     Slo(9.0, 0.055), False, Cause.ITL),
    ("it has them already", shared_cores(4, (2000,)), PrefillSide(HALF, (9,)), Slo(9.0, 0.055), True,
     Cause.WAITING),
    ("of a slow prefill worker nothing is wanted", own_devices(2), PrefillSide(Pace(0.1, 0.01)), SLO,
     False, Cause.TTFT),
    ("of a slow decode worker neither", DecodeSide(*(Pace(0.1, 0.01),) * 3, 0), PrefillSide(QUICK), SLO,
     True, Cause.TTFT),
)  # fmt: skip


@pytest.mark.parametrize(("_name", "decode", "prefill", "slo", "remote", "cause"), TABLE)
def test_each_row(
    _name: str, decode: DecodeSide, prefill: PrefillSide, slo: Slo, remote: bool, cause: Cause
) -> None:
    found = choose(Span(0, 1000), decode, prefill, slo)
    assert (found.remote, found.cause) == (remote, cause), found.why
    assert found.itl_s == slo.itl_s
    assert found.why.startswith("prefill fills" if remote else "decode fills")


PACES = st.builds(Pace, st.floats(1e-9, 60.0), st.floats(1e-9, 60.0))  # all that there may be
FILLING = st.lists(st.integers(1, 5000), max_size=6).map(tuple)
DECODES = st.builds(DecodeSide, PACES, PACES, PACES, st.integers(0, 100), FILLING)
PREFILLS = st.builds(PrefillSide, PACES, FILLING, st.floats(0, 10))
SLOS = st.builds(Slo, st.none() | st.floats(1e-3, 100), st.none() | st.floats(1e-4, 10))
PROMPTS = st.builds(Span, st.integers(0, 10_000), st.integers(1, 10_000))


@given(PROMPTS, DECODES, PREFILLS, SLOS, st.floats(0, 1000))
def test_every_decision_has_a_cause_that_is_true(
    prompt: Span, decode: DecodeSide, prefill: PrefillSide, slo: Slo, waited_s: float
) -> None:
    found = choose(prompt, decode, prefill, slo, waited_s=waited_s)
    local = local_outlook(prompt, decode, prefill, found.itl_s)
    remote = remote_outlook(prompt, decode, prefill, found.itl_s)
    chosen, other = (remote, local) if found.remote else (local, remote)
    if found.cause is Cause.WAITING:
        assert (remote.cost_s < WORTH_IT * local.cost_s) == found.remote
    if found.cause is Cause.ITL:
        assert decode.streams
        assert other.gap_s > chosen.gap_s
    if slo.itl_s is not None:
        assert found.itl_s == slo.itl_s
    assert len(found.why) < 300


@given(PROMPTS, DECODES, PREFILLS, SLOS, st.floats(0, 1000))
def test_the_words_of_a_decision_have_its_figures(
    prompt: Span, decode: DecodeSide, prefill: PrefillSide, slo: Slo, waited_s: float
) -> None:
    found = choose(prompt, decode, prefill, slo, waited_s=waited_s)
    local = local_outlook(prompt, decode, prefill, found.itl_s)
    remote = remote_outlook(prompt, decode, prefill, found.itl_s)
    chosen, other = (remote, local) if found.remote else (local, remote)
    figures = [float(each.replace(",", "")) for each in re.findall(r"[\d,]*\d\.?\d*", found.why)]
    ttft_s = slo.ttft_s or 10 * decode.idle.fill_s(prompt)
    before = [waited_s] if "waited" in found.why else []
    streams = [decode.streams, 1000 * chosen.gap_s, 1000 * other.gap_s] if decode.streams else []
    assert figures[0] == prompt.tokens
    wanted = [1000 * s for s in (*before, chosen.ttft_s, other.ttft_s)] + streams
    wanted += [1000 * ttft_s, 1000 * found.itl_s]
    assert figures[1:-4] == pytest.approx(wanted, abs=0.5)
    broken, others = figures[-4:-2]
    assert (found.cause is Cause.WAITING) == (others - broken <= 0.5) or others - broken < 0.61
    assert figures[-2:] == pytest.approx([1000 * chosen.cost_s, 1000 * other.cost_s], abs=0.5)


@given(PROMPTS, DECODES, PREFILLS, SLOS, st.floats(0.01, 50))
def test_a_way_that_takes_longer_is_not_preferred_to_before(
    prompt: Span, decode: DecodeSide, prefill: PrefillSide, slo: Slo, more_s: float
) -> None:
    slower = PrefillSide(prefill.pace, prefill.filling, prefill.handover_s + more_s)
    if choose(prompt, decode, slower, slo).remote:
        assert choose(prompt, decode, prefill, slo).remote


@given(st.lists(st.integers(1, 500), max_size=6), st.integers(1, 500))
def test_what_is_ahead_and_who_is_behind(filling: list[int], tokens: int) -> None:
    assert ahead(filling, tokens) <= sum(filling)
    assert ahead(filling, 501) == sum(filling)
    assert behind(filling, tokens) + sum(each <= tokens for each in filling) == len(filling)
    assert behind(filling, 501) == 0


# ---- what it rests on


def test_a_worker_knows_the_time_of_a_token_on_each_number_of_cores() -> None:
    paces = Paces(Pace(0.01, 0.001))
    paces.use(1)
    assert paces.report() == (Speed(1, 0.01, 0.001),)
    paces.use(2)  # a guess
    assert paces.now == Pace(0.01 / 2**0.5, 0.0005)
    for _ in range(50):
        paces.after([Span(0, 100)], 0.007 + 0.0008 * 100 * (1 + 50 / 4000))
    learnt = paces.now.token_s
    assert learnt == pytest.approx(0.0008, rel=0.1)
    paces.use(1)
    assert paces.now.token_s == pytest.approx(2 * learnt)
    paces.after([Span(0, 100)], 0.2)
    assert [each.cores for each in paces.report()] == [1, 2]
    assert paces.report()[1].token_s == learnt
    paces.use(2)
    assert paces.now.token_s == learnt


def test_a_worker_on_a_gpu_has_one_pace() -> None:
    paces = Paces(Pace(0.01, 0.001))
    paces.after([Span(0, 100)], 0.2)
    assert [each.cores for each in paces.report()] == [0]


def test_what_was_measured_at_boot_holds_for_the_cores_of_the_boot() -> None:
    paces = Paces(Pace(0.01, 0.001), cores=2)
    assert paces.report() == (Speed(2, 0.01, 0.001),)
    paces.use(1)
    assert (paces.now.forward_s, paces.now.token_s) == pytest.approx((0.01 * 2**0.5, 0.002))
    assert paces.idle == (Speed(2, 0.01, 0.001),)


def test_an_idle_worker_s_speed_is_that_of_forwards_with_one_request() -> None:
    paces = Paces(Pace(0.04, 0.004), cores=2)  # at boot others booted, too
    paces.use(1)
    for _ in range(30):
        paces.after([Span(0, 100)], 0.02 + 0.002 * 100 * (1 + 50 / 4000))
        paces.after([], 0.02)
    (one,) = paces.idle
    assert one.cores == 1
    assert (one.forward_s, one.token_s) == pytest.approx((0.02, 0.002), rel=0.1)
    paces.use(2)
    for _ in range(30):
        paces.after([Span(0, 100)], 0.012 + 0.001 * 100 * (1 + 50 / 4000))
        paces.after([], 0.012)
    kept, two = paces.idle
    assert kept == one
    assert (two.cores, two.forward_s, two.token_s) == pytest.approx((2, 0.012, 0.001), rel=0.1)
    for _ in range(50):
        paces.after([], 0.5, requests=30)
    assert paces.now.forward_s > 3 * two.forward_s
    paces.use(1)
    assert paces.idle == (one, two)
    assert paces.requests == pytest.approx(30)


def test_what_is_left_of_a_local_fill_is_estimated_from_when_it_became_the_oldest() -> None:
    fills = LocalFills()
    for name, tokens in (("a", 100), ("b", 50), ("none", 0)):
        fills.moved(name, "d", tokens, 1.0)
    assert fills.left("d", 3.0, 10.0) == (80, 50)
    assert fills.left("d", 99.0, 10.0) == (1, 50)
    fills.ended("a", 4.0)
    assert fills.left("d", 5.0, 10.0) == (40,)
    fills.moved("b", None, 0, 6.0)
    assert (fills.left("d", 9.0, 10.0), fills.count("d")) == ((), 0)


# ---- the router


def fast(desk: Desk, *workers: str) -> None:
    for worker in workers:
        member = desk.router.workers.get(worker)
        assert member is not None
        speed = Speed(0, QUICK.forward_s, QUICK.token_s)
        desk.hear(worker, msg.Heartbeat(member.hello.epoch, 1, None, (speed,), (speed,)))


def adaptive(**more: object) -> Desk:
    rules = Rules(8, 0.0, 64, role_policy=RolePolicy.ADAPTIVE, **more)  # type: ignore[arg-type]
    return Desk("d1", "p1", rules=rules)


def granted(desk: Desk, name: str, prompt: int = 100) -> list[object]:
    """What follows the grant of its blocks."""
    desk.submit(name, tuple(range(1, prompt + 1)))
    assert sent(desk.step(), msg.Reserve)
    entry = desk.router.ledger.entry(name)
    blocks = tuple(range(-(-entry.reserved // desk.router.workers.block_size)))
    desk.hear("d1", msg.Reserved(Grant("d1", "d1/0", entry.run, 1, blocks)))
    return desk.step()  # type: ignore[return-value]


def test_until_the_workers_have_told_their_speed_prefill_fills() -> None:
    desk = adaptive()
    assert sent(granted(desk, "a"), msg.Fill)  # type: ignore[arg-type]
    assert desk.router.ledger.entry("a").decision.cause is Cause.UNMEASURED


def test_the_first_is_filled_where_nothing_runs_and_its_streams_have_a_limit() -> None:
    desk = adaptive(slo=Slo(1.0, 0.05))
    fast(desk, "d1", "p1")
    ((worker, order),) = sent(granted(desk, "a"), msg.Start)  # type: ignore[arg-type]
    assert worker == "d1"
    assert isinstance(order, msg.Start)
    assert (order.receipt, order.itl_s) == (None, 0.05)
    assert desk.router.ledger.loads.fills.count("d1") == 1


def test_limits_that_a_user_leaves_open_are_those_of_an_idle_worker_also_for_the_next_router() -> (
    None
):
    limits = set()
    for forward_s in (QUICK.forward_s, 9 * QUICK.forward_s):  # idle; under load as the router came
        desk = adaptive()
        for worker in ("d1", "p1"):
            now = Speed(0, forward_s, QUICK.token_s)
            idle = Speed(0, QUICK.forward_s, QUICK.token_s)
            desk.hear(worker, msg.Heartbeat(f"{worker}/0", 1, None, (now,), (idle,)))
        granted(desk, "a")
        limits.add(desk.router.ledger.entry("a").decision.itl_s)
    assert limits == {5 * QUICK.forward_s}


def test_a_forward_is_expected_to_take_as_long_as_its_streams_ask_not_those_of_a_second_ago() -> (
    None
):
    """A heartbeat tells of the forwards before it; the router knows the streams of now."""
    desk = adaptive()
    idle = Speed(0, 0.01, QUICK.token_s)
    beside_nine = Speed(0, 0.028, QUICK.token_s)
    desk.hear("d1", msg.Heartbeat("d1/0", 1, None, (beside_nine,), (idle,), 10.0))
    member = desk.router.workers.get("d1")
    assert member is not None
    assert [member.pace_of(n, 0).forward_s for n in (0, 1, 10)] == pytest.approx(
        [0.01, 0.01, 0.028]
    )
    assert member.pace(0).forward_s == 0.028
    desk.hear("d1", msg.Heartbeat("d1/0", 2, None, (idle,), (idle,), 1.0))
    assert member.pace_of(10, 0).forward_s == pytest.approx(0.028), "one says nothing about ten"
    idles = (Speed(2, 0.01, QUICK.token_s), Speed(1, 0.03, 2 * QUICK.token_s))
    eight = (Speed(2, 0.017, QUICK.token_s), Speed(1, 0.05, 2 * QUICK.token_s))
    desk.hear("d1", msg.Heartbeat("d1/0", 3, None, eight, idles, 8.0))
    assert member.pace_of(8, 1).forward_s == pytest.approx(0.03 * 1.7), "of its own cores"


def test_a_decision_looks_at_the_workers_that_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all that share the cores of the host, whose number would be its cost."""
    workers = [f"{role}{i}" for role in "dp" for i in range(20)]
    rules = Rules(64, 0.0, 64, role_policy=RolePolicy.ADAPTIVE)
    desk = Desk(*workers, rules=rules)
    desk.router._cores._cores = tuple(range(8))
    for worker in workers:
        member = desk.router.workers.get(worker)
        assert member is not None
        desk.hear(worker, replace(member.hello, epoch=f"{worker}/1", takes_cores=True))
    for prefill in workers[20:]:
        for decode in workers[:20]:
            desk.hear(prefill, msg.Attached(decode, f"{decode}/1", "shm", 0.0, ""))
    for worker in workers:
        speed = Speed(1, QUICK.forward_s, QUICK.token_s)
        desk.hear(worker, msg.Heartbeat(f"{worker}/1", 1, None, (speed,), (speed,)))
    desk.submit("a", tuple(range(1, 101)))
    desk.step()
    entry, looked = desk.router.ledger.entry("a"), list[str]()
    assert entry.decode is not None
    get = desk.router.workers.get
    monkeypatch.setattr(cores, "shares", None)
    monkeypatch.setattr(desk.router.workers, "get", lambda name: looked.append(name) or get(name))
    found = desk.router._scheduler.roles.decide(entry, 0.0, alone=False)
    assert found.cause is Cause.WAITING
    assert {name[0] for name in looked} == {"d", "p"}
    assert len(looked) <= 4


def test_a_busy_prefill_worker_gets_no_more_than_can_be_in_time() -> None:
    desk = adaptive(slo=Slo(0.05, None))
    fast(desk, "d1", "p1")
    ways = [bool(sent(granted(desk, f"r{i}", 120), msg.Fill)) for i in range(6)]  # type: ignore[arg-type]
    assert set(ways) == {True, False}


@pytest.mark.parametrize(
    ("policy", "remote", "cause"),
    [(RolePolicy.SPLIT, True, Cause.ROLE_POLICY), (RolePolicy.COLOCATED, False, Cause.ROLE_POLICY)],
)
def test_a_user_may_pin_it(policy: RolePolicy, remote: bool, cause: Cause) -> None:
    desk = Desk("d1", "p1", rules=Rules(8, 0.0, 64, role_policy=policy, slo=Slo(None, 0.07)))
    fast(desk, "d1", "p1")
    effects = granted(desk, "a")
    decision = desk.router.ledger.entry("a").decision
    assert (decision.remote, decision.cause, decision.itl_s) == (remote, cause, 0.07)
    assert bool(sent(effects, msg.Fill)) == remote  # type: ignore[arg-type]


def test_what_leaves_no_choice_is_said() -> None:
    desk = adaptive(local_tokens=5)
    fast(desk, "d1", "p1")
    assert sent(granted(desk, "short", 4), msg.Start)  # type: ignore[arg-type]
    assert desk.router.ledger.entry("short").decision.cause is Cause.SHORT
    desk.hear("client", msg.Submit("scored", (1, 2, 3) * 9, GenerationParams(4, prompt_logprobs=0)))
    desk.step()
    entry = desk.router.ledger.entry("scored")
    assert (
        desk.router._scheduler.roles.decide(entry, 0.0, alone=False).cause is Cause.PROMPT_LOGPROBS
    )
    entry.params = GenerationParams(4)
    assert desk.router._scheduler.roles.decide(entry, 0.0, alone=True).cause is Cause.NO_PREFILL
    entry.tries.refills = 2
    assert desk.router._scheduler.roles.decide(entry, 0.0, alone=False).cause is Cause.FAILED_FILLS
    entry.pooling = "mean"
    assert desk.router._scheduler.roles.decide(entry, 0.0, alone=False).cause is Cause.EMBEDDING


def test_the_options_name_the_policies() -> None:
    assert tuple(RolePolicy) == ROLE_POLICIES


def test_a_hand_over_is_expected_to_take_as_long_as_the_last_ones() -> None:
    desk = Desk("d1", "p1")
    prefill = desk.router.workers.get("p1")
    assert prefill is not None
    for seconds, expected in ((0.2, 0.1), (0.6, 0.15)):
        desk.to_filling("a")
        desk.hear("p1", msg.Filled(desk.run("a"), Receipt(0, b"", seconds, "shm"), 0.0))
        assert prefill.handovers == {"d1": pytest.approx(expected)}
        desk.hear("client", msg.Abort("a"))


# ---- where it shows


def test_a_decision_shows_in_the_timeline_the_trace_and_the_counts() -> None:
    desk = adaptive()
    desk.hear("viewer", msg.Observe())
    fast(desk, "d1", "p1")
    granted(desk, "a")
    desk.now = 1.0
    moments, counts = [], None
    for _, observed in sent(desk.step(), msg.Observed):
        assert isinstance(observed, msg.Observed)
        moments += observed.moments
        counts = observed.counts or counts
    why = desk.router.ledger.entry("a").decision.why
    timeline = Timeline()
    timeline.add(moments)
    (stage,) = [each for life in timeline for each in life.stages if each.name == "prefill"]
    assert (stage.worker, stage.why) == ("d1", why)
    assert "first token in" in why
    assert why in {
        e["args"].get("why") for e in chrome_trace(timeline)["traceEvents"] if "args" in e
    }
    assert counts is not None
    assert counts.decided == (Decided("decode", "waiting", 1),)


def test_the_counts_of_a_router_that_is_gone_are_added() -> None:
    def counts(router: str, *decided: Decided) -> Counts:
        return Counts(*(0,) * 8, (), 0.0, (), router=router, decided=decided)

    totals = Totals()
    totals.add(counts("one", Decided("decode", "waiting", 2), Decided("prefill", "ttft", 1)))
    found = totals.add(counts("two", Decided("decode", "waiting", 3)))
    assert set(found.decided) == {Decided("decode", "waiting", 5), Decided("prefill", "ttft", 1)}


def test_a_decision_is_made_anew_for_each_run() -> None:
    desk = adaptive()
    fast(desk, "d1", "p1")
    granted(desk, "a")
    first = desk.router.ledger.entry("a").decision
    assert isinstance(first, Decision)
    desk.hear("d1", msg.Preempted(desk.run("a")))
    assert desk.router.ledger.loads.fills.count("d1") == 0
    desk.router.workers.get("d1").speeds = (Speed(0, 0.01, 0.1),)  # type: ignore[union-attr]
    entry = desk.router.ledger.entry("a")
    assert sent(desk.step(), msg.Reserve)
    blocks = tuple(range(-(-entry.reserved // desk.router.workers.block_size)))
    desk.hear("d1", msg.Reserved(Grant("d1", "d1/0", entry.run, 2, blocks)))
    assert sent(desk.step(), msg.Fill)
    assert entry.decision.remote
