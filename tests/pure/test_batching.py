"""Who is filled next, and who runs in the next decode step."""

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.grant import Grant
from decode_worker.batching import Progress, Share, plan_step
from prefill_worker.worker import Job, plan_chunks
from router.batching import Rules, Waiting, fill_due, plan_fill


def line(*tokens: int, since: float = 0.0) -> list[Waiting]:
    return [Waiting(f"r{i}#0", count, since) for i, count in enumerate(tokens)]


def runs(batch: list[Waiting]) -> list[str]:
    return [each.run for each in batch]


LINES = st.lists(st.integers(1, 50), max_size=12).map(lambda tokens: line(*tokens))
RULES = st.builds(Rules, st.integers(1, 8), st.sampled_from([0.0, 0.01, 1.0]), st.integers(1, 80))


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
def test_prompts_are_filled_first_come_first_served_and_never_starved(
    progress: list[Progress], budget: int
) -> None:
    filling = [run for run in progress if run.known - run.computed > 1]
    served = [
        s for s in plan_step(progress, token_budget=budget) if any(s.run == f.run for f in filling)
    ]
    assert [share.run for share in served] == [run.run for run in filling[: len(served)]]
    assert bool(served) == bool(filling)
    for share, run in zip(served[:-1], filling, strict=False):
        assert share.tokens == run.known - run.computed


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


def shares_of(jobs: list[Job], budget: int) -> dict[str, int]:
    return {job.grant.run: count for job, count in plan_chunks(jobs, budget)}


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one() -> None:
    assert shares_of([job("long", 5000), job("short", 30)], 100) == {"long": 70, "short": 30}
    assert shares_of([job("long", 5000), job("less", 90), job("short", 20)], 100) == {
        "long": 50, "less": 30, "short": 20,
    }  # fmt: skip


def test_of_equal_prompts_the_first_is_done_first() -> None:
    assert shares_of([job("a", 100), job("b", 100)], 100) == {"a": 100}
    assert shares_of([job("a", 40), job("b", 40), job("c", 40)], 100) == {"a": 40, "b": 40, "c": 20}


@given(
    lefts=st.lists(st.tuples(st.integers(1, 300), st.sampled_from("de")), max_size=8),
    budget=st.integers(1, 200),
)
def test_a_forward_is_full_and_the_oldest_goes_on(
    lefts: list[tuple[int, str]], budget: int
) -> None:
    jobs = [job(f"r{i}", left, worker) for i, (left, worker) in enumerate(lefts)]
    shares = shares_of(jobs, budget)
    if not jobs:
        assert shares == {}
        return
    here = [each for each in jobs if each.grant.worker == jobs[0].grant.worker]
    assert sum(shares.values()) == min(budget, sum(each.left for each in here))
    assert shares["r0"] >= min(jobs[0].left, max(1, budget // 2))
    for each in here:
        assert 0 <= shares.get(each.grant.run, 0) <= each.left
    assert shares.keys() <= {each.grant.run for each in here}
    assert 0 not in shares.values()
