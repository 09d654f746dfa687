"""A worker gets any order of its router in any state: it neither ends nor corrupts its tables."""

import logging
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from baton.kv.grant import Grant
from baton.kv.region import Region
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import ROUTER, Effect, Stop, To
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from tests.depth import deep
from tests.pure.test_codec import values
from tests.pure.test_workers import hello
from tests.pure.town import (
    BLOCK,
    GREEDY,
    VOCABULARY,
    Memory,
    PretendDecode,
    PretendPrefill,
    Town,
)

WELCOME = msg.Welcome("router/1", "here", 1)
PARAMS = GenerationParams(4, GREEDY)
ORDERS = [
    kind for kind in sorted({*get_args(msg.Message)} - {*msg.LOCAL}, key=lambda k: k.__name__)
    if kind is not msg.Refused  # which ends a worker, by design
]  # fmt: skip


def decode_worker() -> DecodeWorker:
    town = Town(prefills=0, decodes=0)
    said = replace(hello("d1"), blocks=8, block_size=BLOCK)
    worker = DecodeWorker(said, PretendDecode(town, Memory()), 16, vocabulary=VOCABULARY)
    worker.handle(ROUTER, WELCOME, 0.0)
    return worker


def prefill_worker() -> tuple[PrefillWorker, Memory]:
    town = Town(prefills=0, decodes=0)
    memory = town.memories["d1"] = Memory()
    said = replace(hello("p1"), block_size=BLOCK)
    worker = PrefillWorker(said, PretendPrefill(town), token_budget=16, vocabulary=VOCABULARY)
    worker.handle(ROUTER, WELCOME, 0.0)
    worker.handle(ROUTER, msg.Attach("d1", "d1/0", (Region("shm", "l", 8, {}),)), 0.0)
    return worker, memory


def told(effects: list[Effect]) -> list[Any]:
    return [effect.message for effect in effects if isinstance(effect, To)]


def test_a_second_reserve_of_a_run_is_ignored_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = decode_worker()
    (reserved,) = told(worker.handle(ROUTER, msg.Reserve("a#0", 5), 0.0))
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            assert worker.handle(ROUTER, msg.Reserve("a#0", 9), 0.1) == []
    assert len(caplog.records) == 1
    worker.table.check()
    worker.handle(ROUTER, msg.Start("a#0", (1, 2, 3), 3, PARAMS), 0.2)
    assert worker.runs["a#0"].grant == reserved.grant
    assert worker.handle(ROUTER, msg.Reserve("a#0", 9), 0.3) == []  # while it runs


def test_a_second_start_of_a_run_does_not_begin_it_again() -> None:
    worker = decode_worker()
    worker.handle(ROUTER, msg.Reserve("a#0", 5), 0.0)
    start = msg.Start("a#0", (1, 2, 3), 3, PARAMS)
    worker.handle(ROUTER, start, 0.0)
    worker.step(0.1)
    before = list(worker.runs["a#0"].token_ids)
    assert worker.handle(ROUTER, start, 0.2) == []
    assert worker.runs["a#0"].token_ids == before


@pytest.mark.parametrize(
    "start",
    [
        msg.Start("a#0", (), 0, PARAMS), msg.Start("a#0", (1, 2), 0, PARAMS),
        msg.Start("a#0", (1, 2), 3, PARAMS), msg.Start("a#0", (1, VOCABULARY), 2, PARAMS),
        msg.Start("a#0", (1,) * 33, 33, PARAMS),
    ],
    ids=["no tokens", "no prompt", "prompt beyond", "outside the vocabulary", "beyond the pool"],
)  # fmt: skip
def test_a_start_that_cannot_be_fails_and_frees_its_blocks(start: msg.Start) -> None:
    """Nobody would ever hear of the request again if it were ignored."""
    worker = decode_worker()
    worker.handle(ROUTER, msg.Reserve("a#0", 5), 0.0)
    (failed,) = told(worker.handle(ROUTER, start, 0.0))
    assert isinstance(failed, msg.RunFailed)
    assert (failed.run, failed.code) == ("a#0", "worker_error")
    assert not worker.runs
    assert worker.table.idle
    worker.step(0.1)
    assert worker.handle(ROUTER, msg.Cancel("a#0"), 0.2) == []
    assert worker.table.idle


def test_a_reserve_for_nothing_is_ignored() -> None:
    assert decode_worker().handle(ROUTER, msg.Reserve("a#0", 0), 0.0) == []


def test_a_second_fill_of_a_run_is_ignored_and_the_first_is_filled() -> None:
    worker, memory = prefill_worker()
    grant = Grant("d1", "d1/0", "a#0", 1, (0,))
    worker.handle(ROUTER, msg.Fill(grant, (5, 6)), 0.0)
    assert worker.handle(ROUTER, msg.Fill(replace(grant, blocks=(7,)), (8, 9)), 0.0) == []
    assert [type(m) for m in told(worker.step(2.0))] == [msg.Heartbeat, msg.Filled]
    assert {block for block, _ in memory.cells} == {0}


@pytest.mark.parametrize(
    ("grant", "ids"),
    [
        (Grant("d9", "d9/0", "a#0", 1, (0,)), (5,)),
        (Grant("d1", "d1/9", "a#0", 1, (0,)), (5,)),
        (Grant("d1", "d1/0", "a#0", 1, (8,)), (5,)),
        (Grant("d1", "d1/0", "a#0", 1, (2**31 - 1,)), (5,)),
        (Grant("d1", "d1/0", "a#0", 1, (0,)), ()),
        (Grant("d1", "d1/0", "a#0", 1, (0,)), (5,) * 5),
        (Grant("d1", "d1/0", "a#0", 1, ()), (5,)),
        (Grant("d1", "d1/0", "a#0", 1, (1,), (0,)), (5,) * 4),
        (Grant("d1", "d1/0", "a#0", 1, (0,)), (5, VOCABULARY)),
    ],
    ids=["no link", "another epoch", "past the pool", "far past it", "no tokens", "too many tokens",
         "no blocks", "nothing after the prefix", "outside the vocabulary"],
)  # fmt: skip
def test_a_fill_that_cannot_be_fails_and_writes_nothing(grant: Grant, ids: tuple[int, ...]) -> None:
    worker, memory = prefill_worker()
    effects = worker.handle(ROUTER, msg.Fill(grant, ids), 0.0) + worker.step(0.1)
    (failed,) = [message for message in told(effects) if isinstance(message, msg.FillFailed)]
    assert failed.run == "a#0"
    assert not memory.cells
    assert not worker._jobs


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_no_order_ends_a_worker_or_corrupts_its_table(role: str) -> None:
    @settings(
        max_examples=deep(150, usual=50), deadline=None, phases=[Phase.explicit, Phase.generate]
    )
    @given(st.lists(st.sampled_from(ORDERS).flatmap(values), min_size=1, max_size=12))
    def obey(orders: list[Any]) -> None:
        node = decode_worker() if role == "decode" else prefill_worker()[0]
        now = 0.0
        for order in orders:
            now += 0.01
            if hasattr(order, "run"):  # most are about one of two runs
                order = replace(order, run=f"{'ab'[len(order.run) % 2]}#0")
            if isinstance(order, msg.Fill):
                mine = replace(order.grant, worker="d1", epoch="d1/0")
                order = replace(order, grant=mine)
            effects = node.handle(ROUTER, order, now) + node.step(now)
            assert not any(isinstance(effect, Stop) for effect in effects)
            if isinstance(node, DecodeWorker):
                node.table.check()

    obey()
