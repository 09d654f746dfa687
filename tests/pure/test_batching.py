"""Who is filled next, and who runs in the next decode step."""

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.grant import Grant
from baton.pace import FORWARD_S, LEAST_TOKENS, Pace, Span
from decode_worker.batching import Progress, Share, plan_step
from prefill_worker.jobs import Job, plan_chunks
from router.batching import Rules, Waiting, fill_due, plan_fill


def line(*tokens: int, since: float = 0.0) -> list[Waiting]:
    return [Waiting(f"r{i}#0", count, since) for i, count in enumerate(tokens)]


def runs(batch: list[Waiting]) -> list[str]:
    return [each.run for each in batch]


LINES = st.lists(st.integers(1, 50), max_size=12).map(lambda tokens: line(*tokens))
RULES = st.builds(Rules, st.integers(1, 8), st.sampled_from([0.0, 0.01, 1.0]), st.integers(1, 80))


FAST = Pace(forward_s=0.0, token_s=1e-6)
"""A pace at which the time of a forward is no limit here."""


# ---- plan_fill


def test_nobody_waits_nobody_goes() -> None:
    assert plan_fill([], Rules(4, 0.0, 100), more_may_come=False, now=9.0) == []


def test_a_batch_that_can_grow_waits_until_the_window_of_the_oldest_closes() -> None:
    rule = Rules(4, 1.0, 100)
    waiting = [Waiting("a#0", 5, 10.0), Waiting("b#0", 5, 10.9)]
    assert plan_fill(waiting, rule, more_may_come=True, now=10.999) == []
    assert runs(plan_fill(waiting, rule, more_may_come=True, now=11.0)) == ["a#0", "b#0"]


def test_a_full_batch_goes_at_once() -> None:
    rule = Rules(2, 1.0, 100)
    assert runs(plan_fill(line(5, 5, 5), rule, more_may_come=True, now=0.0)) == ["r0#0", "r1#0"]
    by_tokens = Rules(9, 1.0, 10)
    assert runs(plan_fill(line(5, 5, 5), by_tokens, more_may_come=True, now=0.0)) == [
        "r0#0",
        "r1#0",
    ]


def test_a_batch_that_cannot_grow_goes_at_once() -> None:
    rule = Rules(4, 1.0, 100)
    assert runs(plan_fill(line(5), rule, more_may_come=False, now=0.0)) == ["r0#0"]


def test_a_prompt_beyond_the_budget_goes_alone() -> None:
    rule = Rules(4, 1.0, 10)
    assert runs(plan_fill(line(99, 1), rule, more_may_come=True, now=0.0)) == ["r0#0"]


def test_a_long_prompt_is_not_overtaken() -> None:
    rule = Rules(4, 0.0, 10)
    assert runs(plan_fill(line(5, 8, 1), rule, more_may_come=True, now=0.0)) == ["r0#0"]


@given(LINES, RULES, st.booleans(), st.sampled_from([0.0, 0.005, 0.01, 2.0]))
def test_a_batch_is_a_prefix_of_the_line_within_every_limit(
    waiting: list[Waiting], rule: Rules, more: bool, now: float
) -> None:
    batch = plan_fill(waiting, rule, more_may_come=more, now=now)
    assert batch == waiting[: len(batch)]
    assert len(batch) <= rule.batch_size
    assert len(batch) <= 1 or sum(each.tokens for each in batch) <= rule.token_budget
    if waiting and (not more or now >= rule.window_s):
        assert batch, "nothing to wait for"


@given(LINES, RULES, st.sampled_from([0.0, 0.005, 0.01, 2.0]))
def test_what_does_not_go_now_goes_when_fill_due_says(
    waiting: list[Waiting], rule: Rules, now: float
) -> None:
    due = fill_due(waiting, rule, now)
    if not waiting:
        assert due is None
        return
    assert due is not None
    assert due >= 0
    assert plan_fill(waiting, rule, more_may_come=True, now=now + due)


@given(LINES, RULES)
def test_the_whole_line_is_filled_in_order_and_once(waiting: list[Waiting], rule: Rules) -> None:
    went: list[Waiting] = []
    while batch := plan_fill(waiting[len(went) :], rule, more_may_come=False, now=0.0):
        went += batch
    assert went == waiting


# ---- plan_step


PROGRESS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 39)).filter(lambda pair: pair[0] > pair[1]),
    max_size=10,
).map(lambda pairs: [Progress(f"r{i}", known, done) for i, (known, done) in enumerate(pairs)])


@given(PROGRESS, st.integers(1, 64))
def test_every_decoding_run_goes_in_every_step(progress: list[Progress], budget: int) -> None:
    shares = {share.run: share for share in plan_step(progress, token_budget=budget)}
    for run in progress:
        if run.known - run.computed == 1:
            assert shares[run.run].tokens == 1
            assert shares[run.run].samples


@given(PROGRESS, st.integers(1, 64))
def test_a_share_is_what_is_left_or_less_and_samples_when_it_is_all(
    progress: list[Progress], budget: int
) -> None:
    left = {run.run: run.known - run.computed for run in progress}
    shares = plan_step(progress, token_budget=budget)
    assert len({share.run for share in shares}) == len(shares)
    for share in shares:
        assert 1 <= share.tokens <= left[share.run]
        assert share.samples == (share.tokens == left[share.run])


@given(PROGRESS, st.integers(1, 64))
def test_the_budget_is_kept_but_for_one_token_a_run(progress: list[Progress], budget: int) -> None:
    shares = plan_step(progress, token_budget=budget)
    decoding = sum(1 for run in progress if run.known - run.computed == 1)
    filling = len(progress) - decoding
    assert sum(share.tokens for share in shares) <= max(budget, decoding + (1 if filling else 0))


@given(PROGRESS, st.integers(1, 64))
def test_the_oldest_prompt_always_advances_and_a_shorter_one_is_done_before_a_longer(
    progress: list[Progress], budget: int
) -> None:
    filling = [run for run in progress if run.known - run.computed > 1]
    shares = {s.run: s.tokens for s in plan_step(progress, token_budget=budget, pace=FAST)}
    if not filling:
        return
    oldest, *others = filling
    room = max(1, budget - (len(progress) - len(filling)))
    assert shares[oldest.run] >= min(oldest.known - oldest.computed, max(1, room // 2))
    lefts = {run.run: run.known - run.computed for run in others}
    done = [left for run, left in lefts.items() if shares.get(run) == left]
    rest = [left for run, left in lefts.items() if shares.get(run) != left]
    assert max(done, default=0) <= min(rest, default=1000)


@given(PROGRESS, st.integers(1, 64))
def test_no_token_of_the_budget_is_wasted(progress: list[Progress], budget: int) -> None:
    left = sum(run.known - run.computed for run in progress if run.known - run.computed > 1)
    decoding = sum(1 for run in progress if run.known - run.computed == 1)
    shares = plan_step(progress, token_budget=budget, pace=FAST)
    filled = sum(share.tokens for share in shares) - decoding
    assert filled == min(left, max(1, budget - decoding))


def test_a_step_with_a_prompt_is_short_at_the_pace_of_the_machine() -> None:
    streams = [Progress(f"d{i}", 100, 99) for i in range(8)]
    pace = Pace(forward_s=0.003, token_s=0.0001)
    *_, chunk = plan_step([*streams, Progress("p", 2290, 0)], token_budget=2048, pace=pace)
    assert 0.9 * FORWARD_S < 0.003 + pace.chunk_s(Span(0, chunk.tokens)) <= FORWARD_S
    slow = Pace(forward_s=0.1, token_s=0.001)  # streams wait at most three times a step of theirs
    *_, chunk = plan_step([*streams, Progress("p", 2290, 0)], token_budget=2048, pace=slow)
    assert 0.29 < 0.1 + slow.chunk_s(Span(0, chunk.tokens)) <= 0.3


def test_a_prompt_gets_one_token_even_if_decoding_takes_the_whole_budget() -> None:
    progress = [*[Progress(f"d{i}", 5, 4) for i in range(4)], Progress("p", 9, 0)]
    assert plan_step(progress, token_budget=4)[-1] == Share("p", 1, samples=False)
    assert plan_step(progress, token_budget=2)[-1] == Share("p", 1, samples=False)
    assert plan_step(progress, token_budget=20)[-1] == Share("p", 9, samples=True)


@given(PROGRESS, st.integers(1, 64))
def test_every_run_comes_to_sample(progress: list[Progress], budget: int) -> None:
    done = {run.run: run.computed for run in progress}
    known = {run.run: run.known for run in progress}
    for _ in range(sum(known.values()) + 1):
        now = [Progress(run, known[run], done[run]) for run in known if done[run] < known[run]]
        for share in plan_step(now, token_budget=budget):
            done[share.run] += share.tokens
    assert done == known


# ---- plan_chunks, the prefill worker's


def job(run: str, left: int, worker: str = "d") -> Job:
    return Job(Grant(worker, "e", run, 1, (1,)), (0,) * left, admitted=True)


def shares_of(jobs: list[Job], budget: int, last: str | None = None) -> dict[str, int]:
    return {job.grant.run: count for job, count in plan_chunks(jobs, budget, FAST, last)}


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one() -> None:
    assert shares_of([job("long", 5000), job("short", 30)], 100) == {"long": 70, "short": 30}
    assert shares_of([job("long", 5000), job("less", 90), job("short", 20)], 100) == {
        "long": 50, "less": 30, "short": 20,
    }  # fmt: skip


def test_of_equal_prompts_the_first_is_done_first() -> None:
    assert shares_of([job("a", 100), job("b", 100)], 100) == {"a": 100}
    assert shares_of([job("a", 40), job("b", 40), job("c", 40)], 100) == {"a": 40, "b": 40, "c": 20}


def test_a_long_prompt_is_cut_by_the_time_it_takes() -> None:
    pace = Pace(forward_s=0.001, token_s=0.0001)
    (first,) = [count for _, count in plan_chunks([job("long", 2290)], 2048, pace)]
    assert 0.9 * FORWARD_S < 0.001 + pace.chunk_s(Span(0, first)) <= FORWARD_S
    many = [job("long", 2290), *(job(f"s{i}", 12) for i in range(9))]
    plan = plan_chunks(many, 2048, pace)
    assert [count for _, count in plan[1:]] == [12] * 9
    chunks = [Span(0, count) for _, count in plan]
    assert sum(map(pace.chunk_s, chunks)) <= FORWARD_S


def test_a_long_prompt_for_one_decode_worker_does_not_delay_those_for_another() -> None:
    jobs = [job("long", 5000, "d"), job("short", 12, "e")]
    assert shares_of(jobs, 100) == {"long": 100}
    assert shares_of(jobs, 100, last="d") == {"short": 12}
    assert shares_of(jobs, 100, last="e") == {"long": 100}
    assert shares_of(jobs, 100, last="gone") == {"long": 100}


PACES = st.builds(Pace, st.floats(1e-9, 0.5), st.floats(1e-9, 0.1))


SEEN = 40


@given(
    length=st.integers(1, 1000),
    stream=st.lists(st.tuples(st.integers(1, 40), st.sampled_from("de")), min_size=1, max_size=6),
    pace=PACES,
    budget=st.integers(1, 2048),
)
def test_a_long_prompt_ends_within_a_known_number_of_forwards_in_any_stream_of_short_ones(
    length: int, stream: list[tuple[int, str]], pace: Pace, budget: int
) -> None:
    """At least half of LEAST_TOKENS, or of a smaller budget, in every second forward."""
    bound = 2 * -(-length // max(1, min(LEAST_TOKENS, budget) // 2))
    jobs, last, arrived = [job("long", length, "d")], None, 0
    for _ in range(bound):
        for left, worker in stream:  # as many again after every forward
            if len(jobs) < SEEN:  # those behind are not looked at
                jobs.append(job(f"s{arrived}", left, worker))
                arrived += 1
        plan = plan_chunks(jobs[:SEEN], budget, pace, last)
        last = plan[0][0].grant.worker
        for each, count in plan:
            each.done += count
        jobs = [each for each in jobs if each.left]
        if all(each.grant.run != "long" for each in jobs):
            return
    raise AssertionError(f"{jobs[0].left} tokens are left after {bound} forwards")


@given(
    lefts=st.lists(st.tuples(st.integers(1, 300), st.sampled_from("de")), max_size=8),
    budget=st.integers(1, 200),
    last=st.sampled_from(["d", "e", None]),
)
def test_a_forward_is_full_and_the_oldest_goes_on(
    lefts: list[tuple[int, str]], budget: int, last: str | None
) -> None:
    jobs = [job(f"r{i}", left, worker) for i, (left, worker) in enumerate(lefts)]
    shares = shares_of(jobs, budget, last)
    if not jobs:
        assert shares == {}
        return
    pools = {each.grant.run: each.grant.worker for each in jobs}
    (pool,) = {pools[run] for run in shares}
    assert pool != last or set(pools.values()) == {last}
    here = [each for each in jobs if each.grant.worker == pool]
    assert sum(shares.values()) == min(budget, sum(each.left for each in here))
    assert shares[here[0].grant.run] >= min(here[0].left, max(1, budget // 2))
    for each in here:
        assert 0 <= shares.get(each.grant.run, 0) <= each.left
    assert 0 not in shares.values()
