"""Speculative decoding: whoever guesses, and however well, the answers are those of plain decoding."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.speculation import PromptLookup, Speculation, Wanted, accepted_prefix
from tests.pure.test_cluster_nodes import (
    CALM_MESSAGES,
    PROMPTS,
    assert_calm,
    interrupted,
    town_with_requests,
)
from tests.pure.town import VOCABULARY, Town, next_token


class Guesser:
    """Knows the pretend model's next tokens, and lies now and then."""

    def __init__(self, lies: float) -> None:
        self.dice = random.Random(1)
        self.lies = lies
        self.asked = 0

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._guess(each) for each in wanted]

    def forget(self, run: str) -> None:
        pass

    def _guess(self, wanted: Wanted) -> list[int]:
        known = list(wanted.token_ids)
        self.asked += wanted.most
        for _ in range(self.dice.randint(0, wanted.most)):
            lie = self.dice.random() < self.lies
            known.append(self.dice.randrange(VOCABULARY) if lie else next_token(known))
        return known[len(wanted.token_ids) :]


@pytest.mark.parametrize("options", [{}, {"blocks": 16}, {"prefill_budget": 3}])
@pytest.mark.parametrize("lies", [0.0, 0.3, 1.0])
def test_good_guesses_and_bad_ones_change_no_answer(lies: float, options: dict[str, int]) -> None:
    town = town_with_requests(proposer=lambda: Guesser(lies), **options)
    town.run_all(PROMPTS)
    assert_calm(town)


def test_good_guesses_save_steps() -> None:
    def messages(lies: float) -> int:
        town = town_with_requests(proposer=lambda: Guesser(lies))
        town.run_all(PROMPTS)
        return town.delivered

    assert messages(0.0) < messages(1.0)


@pytest.mark.parametrize("at", range(CALM_MESSAGES))
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_worker_that_dies_in_between_costs_no_token(victim: str, at: int) -> None:
    def kill(town: Town) -> None:
        town.kill(next(name for name in town.nodes if name.startswith(victim)))

    town = interrupted(at, kill, proposer=lambda: Guesser(0.3))
    assert_calm(town)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6))
def test_prompt_lookup_gives_what_followed_the_latest_same_words(
    known: list[int], most: int
) -> None:
    guesses = PromptLookup().propose([Wanted("r", known, most)])[0]
    for length in (4, 3, 2):
        words = known[-length:]
        places = [
            end
            for end in range(length, len(known))
            if known[end - length : end] == words and len(words) == length
        ]
        if places:
            assert guesses == known[places[-1] : places[-1] + most]
            return
    assert guesses == []


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40))
def test_prompt_lookup_remembers_what_it_has_read(known: list[int]) -> None:
    grown = PromptLookup()
    for end in range(1, len(known) + 1):
        found = grown.propose([Wanted("r", known[:end], 4)])
        assert found == PromptLookup().propose([Wanted("r", known[:end], 4)])
    grown.forget("r")
    assert grown.propose([Wanted("r", [1, 2, 3], 4)]) == [[]]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_guesses_stand_up_to_the_first_that_was_not_drawn(
    guessed: list[int], more: list[int]
) -> None:
    drawn = [*more, *[9] * (len(guessed) + 1 - len(more))][: len(guessed) + 1]
    stood = accepted_prefix(guessed, drawn)
    assert drawn[:stood] == guessed[:stood]
    assert stood == len(guessed) or drawn[stood] != guessed[stood]


def test_what_is_asked_for_follows_what_stood() -> None:
    class Says:
        def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
            return [[1] * each.most for each in wanted]

        def forget(self, run: str) -> None:
            pass

    def asked() -> int:
        return len(it.draft([Wanted("r", [1], 100)], 100).get("r", []))

    it = Speculation(Says(), most=8)
    assert asked() == 8
    it.update("r", drafted=8, accepted=0)
    assert asked() == 1
    for expected in (2, 4, 8, 8):
        it.update("r", drafted=asked(), accepted=asked())
        assert asked() == expected
    it.update("r", drafted=8, accepted=2)
    assert asked() == 3
    assert it.draft([Wanted("r", [1], 100)], 2) == {"r": [1, 1]}
    it.forget("r")
    assert asked() == 8
