"""What those who watch are told: every chunk of a prompt, and when a run's own filling ends."""

from baton.lifecycle import State
from baton.server.totals import Totals
from baton.timeline import Life, Moment, Timeline
from baton.wire import messages as msg
from baton.wire.node import ROUTER
from baton.wire.records import Counts, Work
from decode_worker.speculation import PromptLookup
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.batching import Rules
from router.observers import EVENTS_S
from tests.pure.town import Town

BUDGET = 8


def watched(town: Town, prompt: range, length: int, **options: object) -> list[Moment]:
    """All that is told of one request."""
    moments: list[Moment] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Observed):
            moments.extend(message.moments)

    town.before = before
    town.client(msg.Observe(), name="client.watch")
    town.submit("a", prompt, length, **options)
    town.run_all(["a"])
    town.run(lambda: any(each.state == "finished" for each in moments))
    return moments


def life_of(moments: list[Moment]) -> Life:
    timeline = Timeline()
    timeline.add(moments)
    (life,) = timeline
    assert all(
        before.end == after.start
        for before, after in zip(life.stages, life.stages[1:], strict=False)
    )
    return life


def test_a_prompt_that_is_filled_in_chunks_is_seen_chunk_by_chunk() -> None:
    moments = watched(Town(prefill_budget=BUDGET), range(1, 31), 3)
    filled = [each.tokens for each in moments if each.state == "filling"]
    assert filled == [30, 8, 16, 24]  # what it has, then how far it is
    stages = [(stage.name, stage.worker.partition(".")[0]) for stage in life_of(moments).stages]
    assert stages.count(("prefill", "prefill-0")) == 4
    assert stages[-1] == ("decode", "decode-0")


def test_a_prompt_of_one_chunk_costs_no_message_more() -> None:
    seen: list[msg.Message] = []
    town = Town(prefill_budget=BUDGET)
    town.before = lambda sender, receiver, message: seen.append(message)
    town.submit("a", range(1, 9), 3)
    town.run_all(["a"])
    assert not any(isinstance(each, msg.ChunkFilled) for each in seen)


def test_a_run_that_decode_fills_by_itself_is_in_prefill_until_it_speaks() -> None:
    rules = Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True)
    town = Town(prefills=0, rules=rules)
    life = life_of(watched(town, range(1, 60), 4, stream_interval_s=1.0))
    names = [stage.name for stage in life.stages]
    assert names[-2:] == ["prefill", "decode"]
    assert {stage.worker.partition(".")[0] for stage in life.stages[-2:]} == {"decode-0"}
    assert (life.prompt_tokens, life.tokens) == (59, 4)


def test_a_stall_is_a_gap_between_tokens_and_not_between_reports() -> None:
    """Tokens of an answer that is not streamed are reported by the second."""
    moments = watched(Town(), range(1, 9), 200, stream_interval_s=1.0)
    assert "stall" not in {stage.name for stage in life_of(moments).stages}


def test_a_worker_that_stands_still_is_a_stall() -> None:
    town = Town()
    found = observed(town)
    town.submit("a", range(1, 9), 100)
    town.run(lambda: len(town.outcomes["a"].tokens) > 3)
    town.now += 2.0
    town.run_all(["a"])
    town.now += EVENTS_S
    town.run(lambda: any(message.ended for message in found))
    moments = [each for message in found for each in message.moments]
    stalls = [stage for stage in life_of(moments).stages if stage.name == "stall"]
    assert [round((stall.end or 0) - stall.start) for stall in stalls] == [2]


def test_a_late_word_of_a_chunk_changes_nothing() -> None:
    town = Town(prefill_budget=BUDGET)
    late: list[msg.ChunkFilled] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.ChunkFilled):
            late.append(message)

    town.before = before
    town.submit("a", range(1, 31), 3)
    town.run_all(["a"])
    (prefill,) = town.workers("prefill")
    count = town.router.ledger.late_reports
    town.send(prefill, [])
    assert town.router.handle(prefill, late[-1], town.now) == []
    assert town.router.ledger.late_reports == count + 1


def observed(town: Town) -> list[msg.Observed]:
    """All that one observer is told from now on."""
    found: list[msg.Observed] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Observed):
            found.append(message)

    town.before = before
    town.client(msg.Observe(), name="client.watch")
    return found


def last_counts(found: list[msg.Observed]) -> Counts | None:
    return next((each.counts for each in reversed(found) if each.counts is not None), None)


def test_the_first_token_is_told_before_the_end_with_what_it_took() -> None:
    town = Town()
    found = observed(town)
    town.submit("a", range(1, 31), 200)
    town.run(lambda: len(town.router.ledger) == 1)
    town.now += 0.5  # it waits
    town.run(lambda: bool(town.outcomes["a"].tokens))
    town.now += EVENTS_S
    town.run(lambda: any(each.first for each in found))
    assert not town.outcomes["a"].ends
    (first,) = (each for message in found for each in message.first)
    assert (first.request, first.prompt_tokens, first.transport) == ("a", 30, "shm")
    assert 0.5 <= first.timings.ttft_s <= town.now
    town.kill(town.workers("decode")[0])  # it has a token: the next run's first is not its first
    town.run_all(["a"])
    town.run(lambda: any(message.ended for message in found))
    assert sum(len(message.first) for message in found) == 1
    (ended,) = (each for message in found for each in message.ended)
    assert ended.timings.ttft_s == first.timings.ttft_s
    assert ended.timings.total_s > first.timings.ttft_s


def test_a_prompt_that_decode_fills_by_itself_took_prefill_time() -> None:
    rules = Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True)
    town = Town(prefills=0, rules=rules)
    found = observed(town)
    town.submit("a", range(1, 60), 4)
    town.run(lambda: town.router.ledger.count(State.DECODING) == 1)
    town.now += 0.5  # it is being filled
    town.run(lambda: any(each.first for each in found))
    (first,) = (each for message in found for each in message.first)
    assert 0.5 <= first.timings.prefill_s <= first.timings.ttft_s


def test_requests_on_a_worker_without_a_token_are_counted() -> None:
    town = Town()
    found = observed(town)
    town.turn()
    (prefill,) = town.workers("prefill")
    town.stalled.add(prefill)  # so the prompt stays unfilled
    town.submit("a", range(1, 31), 3)
    town.run(lambda: bool((counts := last_counts(found)) and counts.tokenless == 1))
    town.stalled.clear()
    town.run_all(["a"])
    town.run(lambda: bool((counts := last_counts(found)) and counts.tokenless == 0))


def test_what_workers_compute_is_counted_and_outlives_them_and_the_router() -> None:
    town = Town(proposer=PromptLookup)
    found = observed(town)
    town.submit("a", [1, 2, 3, 4, 5] * 4, 60)
    town.run_all(["a"])
    totals, heard = Totals(), 0

    def work(role: str) -> Work:
        nonlocal heard
        for each in found[heard:]:
            if each.counts is not None:
                totals.add(each.counts)
        heard = len(found)
        return totals.work(role)

    decode, prefill = (town.nodes[town.workers(role)[0]] for role in ("decode", "prefill"))
    assert isinstance(decode, DecodeWorker)
    assert isinstance(prefill, PrefillWorker)
    done, filled = decode.speculation.tally.report(), prefill._membership.tally.report()
    assert done is not None
    assert filled is not None
    town.run(lambda: (work("decode"), work("prefill")) == (done, filled))
    assert filled.tokens == 19  # all of the prompt but its last
    assert sum(done.forwards) > 0
    assert done.tokens == 60 + done.draft_tokens - sum(done.accepted)
    town.kill(town.workers("decode")[0])
    town.kill(ROUTER)
    town.client(msg.Observe(), name="client.watch")
    town.submit("b", range(1, 9), 3)
    town.run_all(["b"])
    town.run(lambda: work("decode").tokens >= done.tokens + 3)
    assert work("decode").tokens == done.tokens + 3
    assert work("prefill").tokens == filled.tokens + 7
