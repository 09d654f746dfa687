"""Memory that runs out in a forward is an answer: fewer tokens, fewer runs, at last the failure of one
request; never the end of a worker."""

from collections.abc import Sequence

import pytest

from baton.errors import OutOfMemory
from baton.kv.row import Row
from baton.pace import TokenBudget
from decode_worker.model import Draw, Drawn
from prefill_worker.model import Chunk
from router.batching import Rules
from tests.pure.town import PretendDecode, PretendPrefill, Town, calm_answer

PROMPTS = {f"r{i}": list(range(i * 50 + 1, i * 50 + 31)) for i in range(4)}
LENGTH = 12


class SmallDecode(PretendDecode):
    """Has memory for so many tokens in a forward."""

    fits = 6

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        if sum(len(row.token_ids) for row in rows) > self.fits:
            raise OutOfMemory("pretend has no memory left for a decode step")
        return super().step(rows, draws)


class SmallPrefill(PretendPrefill):
    fits = 5

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        if sum(len(chunk.token_ids) for chunk in chunks) > self.fits:
            raise OutOfMemory("pretend has no memory left for a chunk of a prompt")
        super().fill(worker, chunks)


class SmallTown(Town):
    decode_model = SmallDecode
    prefill_model = SmallPrefill


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    def make(decode: int, prefill: int = 10**6, *, colocated: bool = False) -> SmallTown:
        monkeypatch.setattr(SmallDecode, "fits", decode)
        monkeypatch.setattr(SmallPrefill, "fits", prefill)
        rules = Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=colocated)
        return SmallTown(rules=rules, prefills=0 if colocated else 1, blocks=128)

    return make


def ask(town: Town) -> None:
    for name, prompt in PROMPTS.items():
        town.submit(name, prompt, LENGTH)
    town.run_all(PROMPTS)


@pytest.mark.parametrize(
    ("decode", "prefill", "colocated"),
    [(10**6, 5, False), (10**6, 1, False), (3, 10**6, False), (1, 7, False), (6, 0, True),
     (2, 0, True), (1, 0, True)],
)  # fmt: skip
def test_all_are_answered_however_little_fits(
    room, decode: int, prefill: int, colocated: bool
) -> None:
    town = room(decode, prefill, colocated=colocated)
    ask(town)
    for name, prompt in PROMPTS.items():
        expected, reason = calm_answer(prompt, LENGTH)
        assert town.outcomes[name].tokens == expected
        assert town.outcomes[name].ends == [reason]
    assert not town.deaths


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_the_youngest_wait_and_nobody_begins_again(room, fits: int) -> None:
    town = room(fits)
    ask(town)
    assert not any(each.preemptions for each in town.outcomes.values())


@pytest.mark.parametrize("colocated", [False, True])
def test_what_does_not_fit_alone_fails_and_the_worker_goes_on(room, colocated: bool) -> None:
    town = room(0, colocated=colocated)
    ask(town)
    for name in PROMPTS:
        assert "no memory left" in town.outcomes[name].why
    SmallDecode.fits = 10**6
    town.submit("later", [7, 8, 9], LENGTH)
    town.run_all(["later"])
    assert town.outcomes["later"].tokens == calm_answer([7, 8, 9], LENGTH)[0]
    assert not town.deaths


def test_a_fill_that_fits_in_no_chunk_is_filled_by_decode(room) -> None:
    town = room(10**6, 0)
    ask(town)
    for name, prompt in PROMPTS.items():
        assert town.outcomes[name].tokens == calm_answer(prompt, LENGTH)[0]


def test_the_budget_halves_at_once_and_grows_slowly() -> None:
    budget = TokenBudget(2048)
    assert budget.ran_out(1000)
    assert budget.now == 500
    assert budget.runs == 500
    assert budget.ran_out(9)
    assert budget.now == 4
    assert budget.ran_out(1)  # once more
    assert not budget.ran_out(1)
    assert budget.ran_out(1)  # of another request
    budget.went_well()
    assert budget.ran_out(1)
    assert not budget.ran_out(1)
    steps = 0
    while budget.now < 2048:
        budget.went_well()
        steps += 1
    assert 50 < steps < 120
    budget.went_well()
    assert budget.now == 2048
    assert budget.runs is None
