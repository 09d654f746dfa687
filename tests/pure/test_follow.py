"""Follower: every prompt ends once, whatever dies on the way."""

import pytest

from baton.client.batch import Completion, Failure, Follower, Note, Task
from baton.errors import ProtocolError
from baton.offline.link import Elsewhere
from baton.params import GenerationParams
from baton.wire.messages import Accepted, ClusterInfo, Emitted, Failed, Finished
from tests.pure.pretend_router import PretendLine, PretendSupervisor, info, words_of

PROMPTS = ["one", "two", "three", "four", "five"]
TASKS = [Task(i, text) for i, text in enumerate(PROMPTS)]
ASK = GenerationParams(max_new_tokens=3)


def follower(line, supervisor=None, *, limit=2):
    made = Follower(line, supervisor or PretendSupervisor(), job="j", limit=limit, clock=line.clock)
    for _ in made.await_ready(ours=True):
        pass
    return made


def texts(happenings):
    return {h.task.index: h.text for h in happenings if isinstance(h, Completion)}


CALM = {i: "".join(words_of(text, 3)) for i, text in enumerate(PROMPTS)}


def test_every_task_ends_with_its_completion():
    happenings = list(follower(PretendLine()).run(TASKS, ASK))
    assert texts(happenings) == CALM
    assert sum(isinstance(h, Completion) for h in happenings) == len(TASKS)


def test_no_more_requests_are_out_than_the_limit():
    line = PretendLine()
    list(follower(line, limit=2).run(TASKS, ASK))
    assert line.most_running == 2


def test_a_failure_ends_its_task_and_no_other():
    line = PretendLine(fail={"two": Failed("", "worker_lost", "3 workers died")})
    happenings = list(follower(line).run(TASKS, ASK))
    assert [h for h in happenings if isinstance(h, Failure)] == [
        Failure(TASKS[1], "worker_lost", "3 workers died")
    ]
    assert texts(happenings).keys() == {0, 2, 3, 4}


def test_an_abort_from_the_other_side_is_a_failure():
    line = PretendLine()
    made = follower(line)
    line.before_poll = lambda line: (
        line.queue.clear()
        or line.queue.append(Finished(line.submitted[-1].request, "abort", info_timings()))
    )
    (failure,) = [h for h in made.run(TASKS[:1], ASK) if isinstance(h, Failure)]
    assert failure.code == "aborted"


def info_timings():
    from baton.wire.records import Timings

    return Timings()


@pytest.mark.parametrize("dies_at", range(1, 27))
def test_a_router_that_dies_before_any_message_costs_nothing_but_time(dies_at):
    line, supervisor, polls = PretendLine(), PretendSupervisor(), iter(range(1, 1000))

    def die(line):
        if next(polls) == dies_at:
            line.queue.clear()
            line.running = 0
            supervisor.router_restarts += 1

    made = follower(line, supervisor)
    line.before_poll = die
    happenings = list(made.run(TASKS, ASK))
    assert texts(happenings) == CALM
    assert sum(isinstance(h, Completion) for h in happenings) == len(TASKS)
    assert any(isinstance(h, Note) and "found again" in h.text for h in happenings) or dies_at > 24


def test_submissions_wait_until_a_new_router_answers():
    line, supervisor = PretendLine(), PretendSupervisor()
    made = follower(line, supervisor)
    run = made.run(TASKS[:1], ASK)
    next(run)
    line.queue.clear()
    supervisor.router_restarts += 1
    supervisor.notes = ["router died"]
    line.answers = False
    assert next(run) == Note("router died")
    asked = line.now
    supervisor.notes = ["still waiting"]
    assert next(run) == Note("still waiting")
    assert line.now > asked
    assert len(line.submitted) == 1
    line.answers = True
    assert texts(run) == {0: CALM[0]}
    assert [s.request for s in line.submitted] == ["j-0.0", "j-0.1"]


def test_a_late_report_on_an_old_attempt_is_void_and_the_attempt_aborted():
    line = PretendLine()
    made = follower(line)
    line.queue.extend(
        [Accepted("j-0.7", 5, 0.0), Emitted("j-0.7", (9,), "ghost"), Failed("j-0.7", "x", "y")]
    )
    assert texts(made.run(TASKS, ASK)) == CALM
    assert line.aborted == ["j-0.7"]


def test_news_of_the_cluster_reach_the_supervisor_once_each():
    line, supervisor = PretendLine(), PretendSupervisor()
    made = follower(line, supervisor)
    line.queue.append(info(ready=False))
    happenings = list(made.run(TASKS, ASK))
    assert [h.ready for h in happenings if isinstance(h, ClusterInfo)] == [False]
    assert [each.ready for each in supervisor.told] == [True, False]


def test_a_router_of_somebody_else_that_falls_silent_is_asked_and_missed():
    line = PretendLine()
    made = follower(line, Elsewhere(lambda: 0))
    line.before_poll = lambda line: line.queue.clear()
    line.answers = False
    with pytest.raises(ProtocolError, match="no router answers"):
        list(made.run(TASKS, ASK))
    assert line.now < 60


def test_waiting_for_readiness_has_an_end_and_says_what_was_missing():
    line = PretendLine()
    line.info = lambda *, timeout_s: info(ready=False)
    line.before_poll = lambda line: setattr(line, "now", line.now + 60)
    made = Follower(line, PretendSupervisor(), job="j", limit=1, clock=line.clock)
    with pytest.raises(ProtocolError, match="no decode worker has joined"):
        list(made.await_ready(ours=True))
