"""complete(): every prompt ends once, whatever dies on the way."""

import pytest

from baton.client.batch import Completion, Failure, Streamed, complete
from baton.client.blocking import Notice
from baton.errors import ProtocolError
from baton.params import GenerationParams
from baton.wire.messages import Accepted, ClusterInfo, Emitted, Failed, Finished, Submit
from baton.wire.records import Timings
from tests.pure.pretend_router import PretendRouter, PretendSupervisor, info, words_of

PROMPTS = ["one", "two", "three", "four", "five"]
PARAMS = GenerationParams(max_new_tokens=3)
SUBMITS = {i: Submit(f"j-{i}", text, PARAMS) for i, text in enumerate(PROMPTS)}
ONE = {0: SUBMITS[0]}
CALM = {i: "".join(words_of(text, 3)) for i, text in enumerate(PROMPTS)}


def ready(router, supervisor=None):
    client = router.client(supervisor or PretendSupervisor())
    client.await_ready()
    return client


def run(client, submits=SUBMITS, *, limit=2):
    return complete(client, submits, limit=limit)


def texts(events):
    return {e.index: e.text for e in events if isinstance(e, Completion)}


def test_every_task_ends_with_its_completion():
    events = list(run(ready(PretendRouter())))
    assert texts(events) == CALM
    assert sum(isinstance(e, Completion) for e in events) == len(SUBMITS)


def test_no_more_requests_are_out_than_the_limit():
    router = PretendRouter()
    list(run(ready(router), limit=2))
    assert router.most_running == 2


def test_a_failure_ends_its_task_and_no_other():
    router = PretendRouter(fail={"two": Failed("", "worker_lost", "3 workers died")})
    events = list(run(ready(router)))
    assert [e for e in events if isinstance(e, Failure)] == [
        Failure(1, "worker_lost", "3 workers died")
    ]
    assert texts(events).keys() == {0, 2, 3, 4}


def test_an_abort_from_the_other_side_is_a_failure():
    router = PretendRouter()
    made = ready(router)

    def end(router):
        if router.submitted:
            router.queue.clear()
            router.queue.append(Finished(router.submitted[-1].request, "abort", Timings()))

    router.before_turn = end
    (failure,) = [e for e in run(made, ONE) if isinstance(e, Failure)]
    assert failure.code == "aborted"


@pytest.mark.parametrize("dies_at", range(1, 40))
def test_a_router_that_dies_before_any_message_costs_nothing_but_time(dies_at):
    router, turns = PretendRouter(), iter(range(1, 1000))

    def die(router):
        if next(turns) == dies_at:
            router.die()

    made = ready(router)
    router.before_turn = die
    events = list(run(made))
    done = [e for e in events if isinstance(e, Completion)]
    assert texts(events) == CALM
    assert len(done) == len(SUBMITS)
    assert all(e.token_ids == (0, 1, 2) and len(e.arrivals) == 3 for e in done)
    streamed = {i: "" for i in range(len(SUBMITS))}
    for each in events:
        if isinstance(each, Streamed):
            streamed[each.index] += each.text
    assert streamed == CALM
    resubmitted = [s.request for s in router.submitted if s.request.endswith(".1")]
    notices = [e.text for e in events if isinstance(e, Notice)]
    assert len(notices) == bool(resubmitted)
    for text in notices:
        assert text == (
            f"the router was lost and found again: {len(resubmitted)} requests begin again"
        )


def test_submissions_wait_until_a_new_router_answers():
    router, supervisor = PretendRouter(), PretendSupervisor()
    events = run(ready(router, supervisor), ONE)
    next(events)
    router.die()
    supervisor.notices = ["router died"]
    router.answers = False
    assert next(events) == Notice("router died")
    asked = router.now
    supervisor.notices = ["still waiting"]
    assert next(events) == Notice("still waiting")
    assert router.now > asked
    assert len(router.submitted) == 1
    router.answers = True
    assert texts(events) == {0: CALM[0]}
    assert [s.request for s in router.submitted] == ["j-0", "j-0.1"]


def test_a_late_report_on_an_old_attempt_is_void_and_the_attempt_aborted():
    router = PretendRouter()
    made = ready(router)
    router.queue.extend(
        [Accepted("j-0.7", 5, 0.0), Emitted("j-0.7", (9,), "ghost"), Failed("j-0.7", "x", "y")]
    )
    assert texts(run(made)) == CALM
    assert router.aborted == ["j-0.7"]


def test_news_of_the_cluster_reach_the_supervisor_once_each():
    router, supervisor = PretendRouter(), PretendSupervisor()
    made = ready(router, supervisor)
    router.queue.append(info(ready=False))
    events = list(run(made))
    assert [e.ready for e in events if isinstance(e, ClusterInfo)] == [False]
    assert [each.ready for each in supervisor.checked] == [True, False]


@pytest.mark.parametrize("cut", [False, True])
def test_a_router_that_nothing_restarts_is_asked_and_missed(cut):
    router = PretendRouter()
    made = router.client()
    made.await_ready()
    events = run(made)
    next(events)
    router.answers = False
    if cut:
        router.die()
    router.before_turn = lambda router: None if cut else router.queue.clear()
    with pytest.raises(ProtocolError, match="no router answers"):
        list(events)
    assert router.now < 60


def test_aborting_leaves_no_request_with_the_router():
    router = PretendRouter()
    made = ready(router)
    events = run(made)
    next(events)
    events.close()
    assert router.aborted == ["j-0", "j-1"]


def test_waiting_for_readiness_has_an_end_and_says_what_was_missing():
    router = PretendRouter()

    def slow(router):
        router.now += 60
        router.queue.clear()
        router.queue.append(info(ready=False))

    router.before_turn = slow
    client = router.client(PretendSupervisor())
    with pytest.raises(ProtocolError, match="no decode worker has joined"):
        client.await_ready()
