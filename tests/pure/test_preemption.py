"""Requests that grow until the pool is full: the youngest gives way, nothing is lost, all get done."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.blocks import BlockTable
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.records import Timings
from decode_worker.runs import Run, make_room
from decode_worker.worker import DecodeWorker
from router.batching import Rules
from sampler.params import SamplingParams
from tests.pure.test_cluster_random import WildTown, assert_ended, run_under_fire
from tests.pure.town import BLOCK, Town, calm_answer


def crowded(blocks: int, *, colocated: bool = False, batch: int = 8) -> Town:
    rules = Rules(batch_size=batch, window_s=0.0, token_budget=64, colocated=colocated)
    return Town(blocks=blocks, rules=rules, prefills=0 if colocated else 1)


@pytest.mark.parametrize("colocated", [False, True])
def test_a_pool_too_small_for_all_their_answers_serves_them_all_the_same(colocated: bool) -> None:
    town = crowded(12, colocated=colocated)
    prompts = {f"r{i}": (list(range(i * 50 + 1, i * 50 + 6)), 40) for i in range(5)}
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)
    town.run_all(prompts)
    assert_ended(town, prompts)
    assert sum(town.outcomes[name].preemptions for name in prompts) > 0
    assert town.outcomes["r0"].preemptions == 0, "the oldest gave way"


def test_more_requests_run_at_once_than_their_longest_answers_would_fit() -> None:
    town = crowded(16)
    (decode,) = [node for node in town.nodes.values() if isinstance(node, DecodeWorker)]
    for i in range(4):  # 8 + 50 tokens are 15 blocks each: of the longest answers only one fits
        town.submit(f"r{i}", range(i * 50 + 1, i * 50 + 9), 50)
    together = 0

    def look(*_: object) -> None:
        nonlocal together
        together = max(together, len(decode.runs))

    town.before = look
    town.run_all([f"r{i}" for i in range(4)])
    assert together >= 3


def test_a_preemption_is_no_loss_and_no_failed_fill() -> None:
    town = crowded(12)
    prompts = {f"r{i}": (list(range(i * 50 + 1, i * 50 + 6)), 40) for i in range(8)}
    told: list[Timings] = []

    def look(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Finished):
            told.append(message.timings)

    town.before = look
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)
    town.run_all(prompts)
    assert_ended(town, prompts)  # nobody ran out of tries
    assert any(each.preemptions for each in told)
    assert all(each.retries == 0 for each in told)


def test_nobody_is_preempted_more_often_than_his_room_can_grow() -> None:
    """Each time it asks for four times more: 4 blocks, 16, 64, and then there is no more to ask."""
    town = crowded(14, batch=16)
    prompts = {f"r{i}": (list(range(i * 50 + 1, i * 50 + 4)), 48) for i in range(12)}
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)
    town.run_all(prompts)
    assert_ended(town, prompts)
    assert max(town.outcomes[name].preemptions for name in prompts) <= 3


def test_what_a_preempted_request_had_computed_is_found_again_if_nobody_took_its_place() -> None:
    town = crowded(12)
    town.submit("old", range(1, 6), 30)
    town.submit("young", range(101, 106), 30)
    found: list[int] = []  # cached blocks, by run

    def look(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Reserved) and message.grant.run.startswith("young#"):
            found.append(len(message.grant.prefix))

    town.before = look
    town.run_all(["old", "young"])
    assert town.outcomes["young"].preemptions >= 1
    assert len(found) > 1
    assert found[1] > 0
    for name, first in (("old", 1), ("young", 101)):
        tokens, reason = calm_answer(range(first, first + 5), 30)
        assert (town.outcomes[name].tokens, town.outcomes[name].ends) == (tokens, [reason])


@pytest.mark.parametrize("seed", range(60))
def test_under_fire_in_a_pool_that_is_always_full(seed: int) -> None:
    dice = random.Random(5000 + seed)
    rules = Rules(
        batch_size=dice.choice([3, 8, 16]),
        window_s=dice.choice([0.0, 0.01]),
        token_budget=64,
        colocated=(colocated := dice.random() < 0.3),
        local_tokens=dice.choice([0, 4]),
    )
    town = WildTown(
        dice,
        prefills=0 if colocated else dice.randint(1, 2),
        decodes=dice.randint(1, 2),
        blocks=dice.choice([12, 16]),
        rules=rules,
    )
    prompts = {
        f"r{i}": ([dice.randrange(1, 900) for _ in range(dice.randint(1, 12))], dice.randint(1, 34))
        for i in range(dice.randint(4, 12))
    }
    run_under_fire(town, dice, prompts, faults=dice.choice([0, 0, 4]))


# ---- make_room alone


@given(
    pool=st.integers(1, 20),
    wants=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=8),
    reserved=st.integers(0, 6),
    ahead=st.integers(0, 9),
)
def test_the_oldest_get_room_and_the_youngest_give_it(
    pool: int, wants: list[tuple[int, int]], reserved: int, ahead: int
) -> None:
    table = BlockTable("d", "d/0", pool, 60.0)
    runs: dict[str, Run] = {}
    for index, (held, more) in enumerate(wants):
        grant = table.reserve(f"r{index}", held, 0.0) if held <= pool else None
        if grant is None:
            continue
        table.start(grant.run)
        known = [1] * (held * BLOCK + more)
        runs[grant.run] = Run(
            grant, known, len(known) - 1, 1, GenerationParams(98, SamplingParams())
        )
    if reserved and reserved <= table.free_blocks:
        table.reserve("to come", reserved, 0.0)
    before, gone = list(runs), []

    def preempt(name: str) -> None:
        del runs[name]
        table.release(name, None)
        gone.append(name)

    waiting = make_room(runs, table, BLOCK, preempt, ahead)
    table.check()
    assert gone == before[::-1][: len(gone)], "somebody older gave way before somebody younger"
    assert gone != before or not before, "the oldest gave way"
    assert waiting in ([], before[:1])
    for name, run in runs.items():
        assert run.table == list(table._held[name].table)
        assert (len(run.table) * BLOCK >= len(run.token_ids)) != (name in waiting)
    if waiting:
        assert list(runs) == waiting
        assert table.free_blocks == 0
