"""What those who watch are told: every chunk of a prompt, and when a run's own filling ends."""

from baton.timeline import Life, Moment, Timeline
from baton.wire import messages as msg
from router.batching import Rules
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
