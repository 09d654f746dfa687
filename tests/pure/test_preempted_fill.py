"""A run that gives way while decode still fills its prompt: what was not computed is in no cache."""

import pytest

from baton.wire import messages as msg
from router.batching import Rules
from tests.pure.town import Town, calm_answer

OLD = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("budget", [2, 3])
@pytest.mark.parametrize("blocks", [12, 13, 14])
@pytest.mark.parametrize("length", [20, 24, 28])
def test_a_prompt_that_gave_way_half_filled_is_answered_right(
    length: int, blocks: int, budget: int
) -> None:
    rules = Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True)
    town = Town(rules=rules, prefills=0, blocks=blocks, decode_budget=budget)
    young, seen = list(range(100, 100 + length)), 0

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal seen
        seen += isinstance(message, msg.Decoded)
        if seen == 10 and isinstance(message, msg.Decoded):
            town.submit("young", young, 6)

    town.before = before
    town.submit("old", OLD, 40)
    town.run(lambda: bool(town.outcomes["old"].ends) and bool(town.outcomes["young"].ends))
    town.submit("again", [*young, 7], 6)
    town.run_all(["again"])
    for name, prompt, most in (("old", OLD, 40), ("young", young, 6), ("again", [*young, 7], 6)):
        assert town.outcomes[name].tokens == calm_answer(prompt, most)[0], name
