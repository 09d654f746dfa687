"""Requests that kill the worker they come to, among innocent ones; and innocent ones under many kills."""

import random
from collections.abc import Callable

import pytest

from baton.lifecycle import State
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.codec import decode, encode
from router.batching import Rules
from tests.pure.desk import RECEIPT, Desk, sent
from tests.pure.town import Town, calm_answer

INNOCENT = {f"r{i}": (range(100 + 20 * i, 106 + 20 * i + i), 4 + i) for i in range(8)}
POISON = range(7, 16)  # nine tokens
DEATHS = 4

Deadly = Callable[[str, int | None, int], bool]


def dies(role: str, end: int, first: int = POISON[0]) -> Deadly:
    """Whoever computes the poison's sequence up to position `end`, or beyond, dies."""
    return lambda at, token, to: at == role and token == first and to >= end


WHERE = {
    "in its first chunk": (dies("prefill", 1), 0, "while its prompt was filled"),
    "in a later chunk": (dies("prefill", 8), 0, "while its prompt was filled"),
    "at the first token": (dies("decode", 9), 0, "before its first token"),
    "at the second token": (dies("decode", 10), 1, "after 1 token"),
    "at the sixth token": (dies("decode", 14), 5, "after 5 tokens"),
}


def town_of(batch_size: int, **options: object) -> Town:
    rules = Rules(batch_size=batch_size, window_s=0.01, token_budget=64)
    return Town(rules=rules, prefill_budget=4, blocks=128, **options)  # type: ignore[arg-type]


def assert_innocent(town: Town) -> None:
    for name, (prompt, length) in INNOCENT.items():
        tokens, reason = calm_answer(prompt, length)
        outcome = town.outcomes[name]
        assert (outcome.tokens, outcome.ends) == (tokens, [reason]), (name, outcome.why)


@pytest.mark.parametrize("place", list(WHERE))
@pytest.mark.parametrize("position", [0, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 9])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("interval", [0.0, 0.5])
def test_a_poison_request_is_found_by_the_place_and_takes_nobody_with_it(
    place: str, position: int, batch_size: int, workers: int, interval: float
) -> None:
    town = town_of(batch_size, prefills=workers, decodes=workers)
    town.deadly, sent_tokens, words = WHERE[place]
    names = list(INNOCENT)
    for name in [*names[:position], "poison", *names[position:]]:
        prompt, length = INNOCENT.get(name, (POISON, 9))
        town.submit(name, prompt, length, stream_interval_s=interval)
    town.run_all([*INNOCENT, "poison"])
    assert_innocent(town)
    poison = town.outcomes["poison"]
    assert poison.ends == ["worker_lost"]
    assert poison.tokens == calm_answer(POISON, 9)[0][:sent_tokens]
    assert words in poison.why
    assert f"{sent_tokens} token" in poison.why
    # The first death may come before buffered tokens were sent, or at a chunk that began elsewhere.
    moves = place == "in a later chunk" or (interval > 0 and sent_tokens > 1)
    assert DEATHS <= len(town.deaths) <= DEATHS + moves


@pytest.mark.parametrize("place", list(WHERE))
def test_where_decode_fills_by_itself_a_poison_is_found_too(place: str) -> None:
    town = Town(
        prefills=0,
        blocks=128,
        rules=Rules(batch_size=9, window_s=0.0, token_budget=64, colocated=True),
    )
    deadly, sent_tokens, _ = WHERE[place]
    town.deadly = lambda role, first, end: deadly("prefill", first, end) or deadly(role, first, end)
    for name, (prompt, length) in {**INNOCENT, "poison": (POISON, 9)}.items():
        town.submit(name, prompt, length)
    town.run_all([*INNOCENT, "poison"])
    assert_innocent(town)
    assert town.outcomes["poison"].ends == ["worker_lost"]
    assert len(town.outcomes["poison"].tokens) <= sent_tokens
    assert len(town.deaths) == DEATHS


@pytest.mark.parametrize("seed", range(30))
def test_several_poison_requests_take_nobody_with_them(seed: int) -> None:
    """They come at any time, and kill at any place; each is given up."""
    dice = random.Random(seed)
    town = town_of(dice.choice([2, 4, 12]), prefills=dice.randint(1, 2), decodes=dice.randint(1, 3))
    poisons = {f"poison{i}": range(10 * i + 1, 10 * i + 9) for i in range(3)}
    rules = [
        dies(role, dice.randint(1, 7) if role == "prefill" else dice.randint(8, 14), prompt[0])
        for prompt in poisons.values()
        for role in [dice.choice(["prefill", "decode"])]
    ]
    town.deadly = lambda *what: any(rule(*what) for rule in rules)
    names = [*INNOCENT, *poisons]
    dice.shuffle(names)
    for name in names:
        prompt, length = INNOCENT.get(name) or (poisons[name], 9)
        town.submit(name, prompt, length)
        for _ in range(dice.choice([0, 0, 3, 30])):
            town.turn()
    town.run_all(names)
    assert_innocent(town)
    for name in poisons:
        assert town.outcomes[name].ends == ["worker_lost"], town.outcomes[name]


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_hundred_kills_in_a_row_with_progress_between_them_lose_nothing(victim: str) -> None:
    """Each time as soon as somebody has moved on: a token, or a chunk of a prompt."""
    prompts = {"a": (range(1, 450), 60), "b": (range(600, 700), 60), "c": (range(9), 60)}
    town = Town(
        blocks=256, prefill_budget=4, rules=Rules(batch_size=3, window_s=0.0, token_budget=64)
    )
    kills, furthest = 0, 0

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal kills, furthest
        match message:
            case msg.ChunkFilled(_, tokens) if victim == "prefill" and tokens > furthest:
                furthest = tokens
            case msg.Decoded() if victim == "decode":
                pass
            case _:
                return
        if kills < 100:
            kills += 1
            town.kill(sender)

    town.before = before
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)
    town.run(lambda: all(town.outcomes[name].ends for name in prompts), turns=40_000)
    for name, (prompt, length) in prompts.items():
        assert town.outcomes[name].tokens == calm_answer(prompt, length)[0], town.outcomes[name].why
    assert kills == 100


def test_a_quarantined_request_is_placed_alone_until_its_first_progress() -> None:
    desk = Desk()
    for name in ("a", "b"):
        desk.submit(name)
    for number in (1, 2):
        desk.step()
        desk.hear(f"d{number}", msg.Exited(f"d{number}"))
        desk.join(f"d{number + 1}")
        desk.hear("p1", msg.Attached(f"d{number + 1}", f"d{number + 1}/0", "shm", 0.0, ""))
    desk.submit("new")
    placed = [order.run for _, order in sent(desk.step(), msg.Reserve)]  # type: ignore[attr-defined]
    assert placed == [desk.run("a")]
    desk.hear("d3", msg.Reserved(desk.grant(desk.run("a"), "d3")))
    desk.step()
    desk.hear("p1", msg.Filled(desk.run("a"), RECEIPT, 0.0))  # its first progress
    placed = [order.run for _, order in sent(desk.step(), msg.Reserve)]  # type: ignore[attr-defined]
    assert placed == [desk.run("b")]


def test_a_worker_that_leaves_of_its_own_accord_never_counts() -> None:
    desk = Desk()
    desk.submit("a")
    for _ in range(9):
        desk.step()
        entry = desk.router.ledger.get("a")
        assert entry is not None
        assert entry.decode == "d1"
        desk.router._requests.worker_gone("d1", [], desk.now, expected=True)
        assert entry.tries.deaths == 0


def test_a_long_reason_of_a_worker_still_reaches_the_client() -> None:
    """A Failed past its bounds would be dropped there, and the client would wait for ever."""
    desk = Desk()
    desk.submit("a")
    failed: list[tuple[str, object]] = []
    for _ in range(4):
        desk.step()
        desk.hear("d1", msg.Reserved(desk.grant(desk.run("a"))))
        desk.step()
        if desk.state("a") is State.FILLING:
            failed = sent(desk.hear("p1", msg.FillFailed(desk.run("a"), "y" * 2**16)), msg.Failed)
        else:
            failed = sent(desk.hear("d1", msg.FillRefused(desk.run("a"), "y" * 2**16)), msg.Failed)
    ((client, message),) = failed
    assert client == "client"
    assert isinstance(message, msg.Failed)
    assert message.code == "fill_failed"
    assert decode(encode(message)) == message


def test_tokens_that_never_arrive_end_the_request_in_words_after_bounded_tries() -> None:
    desk = Desk(rules=Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True))
    desk.submit("a", length=9)
    for number in range(4):
        desk.step()
        desk.hear("d1", msg.Reserved(desk.grant(f"a#{number}")))
        desk.step()
        effects = desk.hear("d1", msg.Decoded((msg.RunTokens(f"a#{number}", 4, (5,)),)))
    [(_, failed)] = sent(effects, msg.Failed)
    assert isinstance(failed, msg.Failed)
    assert failed.code == "tokens_lost"
    assert "4 times in a row; 0 tokens were sent" in failed.message


def test_after_a_death_tokens_are_sent_as_they_come() -> None:
    desk = Desk(rules=Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True))
    params = GenerationParams(4, stream_interval_s=0.5)
    desk.hear("client", msg.Submit("a", (1, 2, 3), params))
    intervals = []
    for number in (1, 2):
        desk.step()
        worker = f"d{number}"
        desk.hear(worker, msg.Reserved(desk.grant(f"a#{number - 1}", worker)))
        for _, start in sent(desk.step(), msg.Start):
            assert isinstance(start, msg.Start)
            intervals.append(start.params.stream_interval_s)
        desk.hear(worker, msg.Exited(worker))
        desk.join(f"d{number + 1}")
    assert intervals == [0.5, 0.0]
