"""Well-formed lies: any member may send any message about any run, worker or epoch.

The router never ends, nobody else's request changes, and what cannot be is counted.
"""

import dataclasses
import random
from typing import Any, get_args

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.lifecycle import State
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import To, Watch
from baton.wire.records import Logprob
from tests.depth import deep
from tests.pure.desk import RECEIPT, Desk, sent
from tests.pure.test_codec import values
from tests.pure.test_workers import hello
from tests.pure.town import VOCABULARY

SENT = sorted({*get_args(msg.Message)} - {*msg.LOCAL}, key=lambda kind: kind.__name__)


def desk_in(state: str, name: str = "a") -> Desk:
    """Workers d1, d2, p1, p2, and a request of three tokens in this state on d1 and p1."""
    desk = Desk("d1", "d2", "p1", "p2")
    desk.submit(name)
    if state == "queued":
        return desk
    desk.step()
    if state == "reserving":
        return desk
    desk.hear("d1", msg.Reserved(desk.grant(f"{name}#0")))
    if state == "reserved":
        return desk
    desk.step()
    if state == "decoding":
        desk.hear("p1", msg.Filled(f"{name}#0", RECEIPT, 0.0))
    return desk


def reported(run: str) -> list[msg.Message]:
    """A report of every kind about this run."""
    return [
        msg.Reserved(Grant("d1", "d1/0", run, 9, (5,))), msg.Deferred(run), msg.Preempted(run),
        msg.Outgrown(run),
        msg.Expired(run), msg.ChunkFilled(run, 1), msg.Filled(run, RECEIPT, 0.0),
        msg.FillFailed(run, "why"), msg.Released(run), msg.FillRefused(run, "why"),
        msg.Decoded((msg.RunTokens(run, 3, (5,)),)), msg.PromptLogprobs(run, (Logprob(-1.0),) * 2),
        msg.RunFailed(run, "code", "why"),
    ]  # fmt: skip


@pytest.mark.parametrize("state", ["queued", "reserving", "reserved", "filling", "decoding"])
@pytest.mark.parametrize("liar", ["d2", "p2"])
@pytest.mark.parametrize("lie", reported("a#0"), ids=lambda lie: type(lie).__name__)
def test_a_report_about_anothers_run_changes_nothing(
    state: str, liar: str, lie: msg.Message
) -> None:
    desk = desk_in(state)
    assert desk.state("a") is State(state)
    effects = desk.hear(liar, lie)
    assert desk.state("a") is State(state)
    assert all(isinstance(e, To) and e.peer == liar for e in effects)  # at most: free your blocks


@pytest.mark.parametrize(
    "lie",
    [msg.Filled("a#0", RECEIPT, 0.0), msg.FillFailed("a#0", "why"), msg.ChunkFilled("a#0", 2)],
    ids=lambda lie: type(lie).__name__,
)
def test_the_decode_worker_does_not_speak_for_the_writer(lie: msg.Message) -> None:
    desk = desk_in("filling")
    assert desk.hear("d1", lie) == []
    assert desk.state("a") is State.FILLING
    assert desk.router.reports.forged == 1


@pytest.mark.parametrize(
    "grant",
    [
        Grant("nobody", "d1/0", "a#0", 1, (0,)), Grant("d2", "d2/0", "a#0", 1, (0,)),
        Grant("d1", "d1/9", "a#0", 1, (0,)), Grant("d1", "d1/0", "a#0", 1, (64,)),
        Grant("d1", "d1/0", "a#0", 1, (2**31 - 1,)), Grant("d1", "d1/0", "a#0", 1, (0, 1)),
        Grant("d1", "d1/0", "a#0", 1, ()), Grant("d1", "d1/0", "a#0", 1, (), (0,)),
    ],
    ids=["another name", "another worker", "another epoch", "past the pool", "far past it",
         "too many", "none", "a prefix longer than the prompt"],
)  # fmt: skip
def test_a_grant_that_is_not_what_was_asked_for_is_dropped(grant: Grant) -> None:
    desk = desk_in("reserving")
    assert desk.hear("d1", msg.Reserved(grant)) == []
    assert desk.state("a") is State.RESERVING
    assert desk.router.reports.forged == 1
    desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    assert desk.state("a") is State.RESERVED


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (msg.RunTokens("a#0", 3, (VOCABULARY,)), "id 997, and the vocabulary has 997"),
        (msg.RunTokens("a#0", 3, (1, 2, 3, 4)), "7 tokens, and it ends with 7"),
        (msg.RunTokens("a#0", 3, (1,) * 9, "length"), "12 tokens, and it ends with 7"),
        (msg.RunTokens("a#0", 3, (1,), "tired"), "it ends with 'tired'"),
        (msg.RunTokens("a#0", 3, (1, 2), None, (Logprob(-1.0),)), "1 logprobs for 2 tokens"),
        (msg.RunTokens("a#0", 3, (1, 2), None, (), (0.1, 0.2, 0.3)), "3 ages for 2 tokens"),
    ],
)
def test_tokens_that_cannot_be_end_their_request_with_an_error(
    tokens: msg.RunTokens, why: str
) -> None:
    desk = desk_in("decoding")
    effects = desk.hear("d1", msg.Decoded((tokens,)))
    ((_, failed),) = sent(effects, msg.Failed)
    assert isinstance(failed, msg.Failed)
    assert failed.code == "worker_error"
    assert failed.message.endswith(why)
    assert not sent(effects, msg.Emitted)
    assert sent(effects, msg.Cancel) == [("d1", msg.Cancel("a#0"))]


def test_sound_tokens_beside_forged_ones_are_passed_on() -> None:
    desk = desk_in("decoding")
    runs = (msg.RunTokens("zz#0", 0, (1,)), msg.RunTokens("a#0", 3, (5,)))
    (effect,) = desk.hear("d1", msg.Decoded(runs))
    assert isinstance(effect, To)
    assert effect.message == msg.Emitted("a", (5,), "5 ")


def test_prompt_logprobs_nobody_asked_for_are_dropped() -> None:
    desk = desk_in("decoding")
    assert desk.hear("d1", msg.PromptLogprobs("a#0", (Logprob(-1.0),) * 2)) == []
    assert desk.router.reports.forged == 1


def test_a_pool_is_not_larger_than_it_said() -> None:
    desk = Desk()
    desk.hear("d1", msg.PoolStats(65, 0, 0))
    desk.hear("p1", msg.PoolStats(0, 0, 0))
    assert desk.router.reports.forged == 2
    desk.hear("d1", msg.PoolStats(64, 3, 0))
    member = desk.router.workers.get("d1")
    assert member is not None
    assert member.pool == msg.PoolStats(64, 3, 0)


def test_a_decode_worker_attaches_to_nobody() -> None:
    desk = Desk("d1", "d2")
    assert desk.hear("d1", msg.Attached("d2", "d2/0", "shm", 0.0, "")) == []
    assert desk.router.reports.forged == 1


def test_forged_reports_are_seen_among_the_late_ones() -> None:
    desk = desk_in("filling")
    desk.hear("d1", msg.Filled("a#0", RECEIPT, 0.0))
    counts = desk.router._observers.counts(desk.router.ledger, desk.router.workers, 0.0)
    assert counts.late_reports == 1


def test_a_worker_that_was_given_up_and_goes_on_is_late_and_told_so() -> None:
    desk = desk_in("filling")
    (to,) = desk.hear("p9", msg.Filled("a#0", RECEIPT, 0.0))
    assert isinstance(to.message, msg.Reset)
    desk.hear("p9", msg.Heartbeat("p9/0", 1))
    counts = desk.router._observers.counts(desk.router.ledger, desk.router.workers, 0.0)
    assert (counts.late_reports, desk.router.reports.forged) == (1, 0)


@settings(max_examples=deep(150, usual=50), deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_no_message_of_a_member_ends_the_router(data: st.DataObject) -> None:
    """Any sound message, with the names and runs of this cluster in it, from anybody, in any state."""
    desk = desk_in(data.draw(st.sampled_from(["queued", "reserving", "filling", "decoding"])))
    names = ["a", "a#0", "a#1", "d1", "d2", "p1", "d1/0", "p1/0", "prefill", "decode"]
    dice = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(6):
        kind = data.draw(st.sampled_from(SENT))
        message = named(data.draw(values(kind)), names, dice)
        if isinstance(message, msg.Submit):  # the pretend tokenizer knows numbers only
            message = dataclasses.replace(message, prompt=(1, 2, 3))
        sender = data.draw(st.sampled_from(["d1", "d2", "p1", "p2", "client", "stranger"]))
        desk.now += data.draw(st.sampled_from([0.0, 0.1, 2.0]))
        desk.hear(sender, message)
        for effect in desk.step():
            assert not isinstance(effect, Watch) or 0 < effect.pid < 2**31
    assert len(desk.router.ledger) <= 8


def named(value: Any, names: list[str], dice: random.Random) -> Any:
    """The same message with names of this cluster in place of most of its own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type | GenerationParams):
        changes = {
            field.name: dice.choice(names)
            for field in dataclasses.fields(value)
            if isinstance(getattr(value, field.name), str) and dice.random() < 0.8
        }
        inner = {
            field.name: named(getattr(value, field.name), names, dice)
            for field in dataclasses.fields(value)
            if isinstance(getattr(value, field.name), Grant | tuple)
        }
        return dataclasses.replace(value, **changes, **inner)
    if isinstance(value, tuple):
        return tuple(named(each, names, dice) for each in value)
    return value


# ---- takeover of a name


@pytest.mark.parametrize("worker", ["p1", "d1"])
@pytest.mark.parametrize("other", [{"pid": 99}, {"host": "there"}])
def test_another_process_does_not_take_the_name_of_one_that_may_still_run(
    worker: str, other: dict[str, object]
) -> None:
    desk = desk_in("filling")
    (effect,) = desk.join(worker, epoch=f"{worker}/x", **other)
    assert isinstance(effect, To)
    assert isinstance(effect.message, msg.Refused)
    assert "belongs to process 11 on host here" in effect.message.why
    assert desk.state("a") is State.FILLING
    known = desk.router.workers.get(worker)
    assert known is not None
    assert known.hello.epoch == f"{worker}/0"


def test_a_silent_writer_keeps_its_name_and_its_blocks_until_it_is_proven_dead() -> None:
    desk = desk_in("filling")
    desk.hear("p1", msg.Unreachable("p1"))
    assert sent(desk.join("p1", epoch="p1/x", pid=99), msg.Refused)
    effects = desk.hear("p1", msg.Exited("p1"))
    assert ("d1", msg.WriterClear("p1")) in [
        (e.peer, e.message) for e in effects if isinstance(e, To)
    ]
    assert sent(desk.join("p1", epoch="p1/x", pid=99), msg.Welcome)


def test_the_same_process_starts_anew_under_its_name() -> None:
    desk = desk_in("filling")
    effects = desk.join("p1", epoch="p1/1")
    assert sent(effects, msg.Welcome)
    assert ("d1", msg.WriterClear("p1")) in [
        (e.peer, e.message) for e in effects if isinstance(e, To)
    ]


def test_a_cluster_has_a_limit_of_workers() -> None:
    desk = Desk()
    for index in range(1500):
        effects = desk.hear(f"p{index}", hello(f"p{index}"))
    assert "1,024 workers, which is the limit" in sent(effects, msg.Refused)[0][1].why  # type: ignore[attr-defined]


def test_a_receipt_cannot_make_the_answer_unreadable() -> None:
    """What is added up from reports stays within the bounds of the answer."""
    from baton.wire.codec import decode, encode

    desk = desk_in("filling")
    desk.hear("p1", msg.Filled("a#0", Receipt(2**53, b"", 1e7, "shm"), 1e7))
    effects = desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 3, (5,), "stop", (), (1e7,)),)))
    for effect in effects:
        assert isinstance(effect, To)
        assert decode(encode(effect.message)) == effect.message
