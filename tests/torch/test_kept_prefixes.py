"""What a prefill worker keeps changes no answer: chats over ways that copy, with windows, in chunks, in
batches, and when a worker dies between two turns."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton.engine.pool import Pool
from prefill_worker import resend
from prefill_worker.own_pool import keep_finite
from prefill_worker.scratch import Scratch
from tests.cluster.real_town import WHOLE, RealTown
from tests.cluster.reference import Model, load
from tests.torch.families import save_checkpoint

LENGTH = 10
TURNS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """gemma2 has layers with a window, which is shorter than the prompts."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    return load(str(save_checkpoint(request.param, folder / "model")), block_size=4)


def talk(town: RealTown, turn: int, chats: list[list[int]]) -> list[list[int]]:
    """One turn of all chats at once."""
    names = [f"{turn}/{i}" for i in range(len(chats))]
    for name, prompt in zip(names, chats, strict=True):
        town.submit(name, prompt, LENGTH)
    town.run_all(names)
    town.check_clean(nothing_dropped=False)
    return [town.outcomes[name].tokens for name in names]


def turns(model: Model) -> list[tuple[list[list[int]], list[list[int]]]]:
    """The prompts of each turn, and the right answers: those of workers that keep and share nothing."""
    first, other = model.clear_prompts((23, 17), LENGTH)
    chats, found = [first, [*first[:14], *other]], []
    for turn in range(TURNS):
        with RealTown(model, prefills=0, batch_size=1) as town:
            answers = [talk(town, i, [chat])[0] for i, chat in enumerate(chats)]
        found.append((chats, answers))
        chats = [[*c, *a, *range(3 + turn, 15 + turn)] for c, a in zip(chats, answers, strict=True)]
    return found


CASES = [
    ("frames", WHOLE, ""), ("frames", 7, "decode"), ("frames", WHOLE, "prefill"),
    ("pinned", 7, ""), ("pinned", WHOLE, "decode"), ("shm", 7, "decode"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "chunk", "killed"), CASES)
def test_a_chat_says_the_same(
    model: Model, way: str, chunk: int, killed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resend, "PORTION_BYTES", 2 * model.engine.layout.block_bytes)
    with RealTown(model, transport=way, chunk=chunk, blocks=128) as town:
        for turn, (chats, answers) in enumerate(turns(model)):
            assert talk(town, turn, chats) == answers, turn
            first = town.finished[f"{turn}/0"].timings
            gone = killed if turn == 2 else ""
            lost = gone == "prefill" or (gone and way == "shm")
            if turn and not lost:
                assert first.prefill_reused_tokens >= 20, "what the turn before has filled"
            if lost:
                assert first.prefill_reused_tokens == 0
            if gone == "decode":
                assert first.cached_tokens == 0
                assert way == "shm" or first.moved_bytes > 0
            if turn == 1 and killed:
                town.kill(next(name for name in town.workers(killed)))
                town.run(lambda: len(town.router.workers.infos(town.now)) == 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_kept(model: Model, bad: float) -> None:
    layout = model.engine.layout
    pool, scratch = Pool.private(layout, 8, torch.device("cpu")), Scratch(8, 8)
    for each in (*pool.keys, *pool.values):
        each.zero_()
    for run, value in (("good", 1.0), ("bad", bad)):
        assert scratch.take(run, 3, [f"{run}{i}".encode() for i in range(2)], 2)
        pool.values[-1][scratch.held[run][1], 0, 0, 0] = value
        pool.keys[0][scratch.held[run][2]] = bad  # the last block is not full: nobody keeps it
        keep_finite(pool, scratch, run)
        scratch.give_back(run)
    for run, kept in (("good", 2), ("bad", 0)):
        assert scratch.take(run, 3, [f"{run}{i}".encode() for i in range(2)], 2)
        assert scratch.known(run) == kept
        scratch.give_back(run)
