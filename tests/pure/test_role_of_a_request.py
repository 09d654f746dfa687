"""A client may say who fills its prompt, for one request; the others keep to the router's policy."""

import pytest

from baton.params import GenerationParams
from baton.wire import messages as msg
from router.batching import Rules
from router.role_policy import RolePolicy
from tests.pure.town import Town, calm_answer

PROMPT = list(range(5, 45))


def filled_by_prefill(town: Town, policy: str) -> bool:
    """Whether a Fill was sent for this request, whose answer is right either way."""
    fills: list[object] = []
    town.before = lambda sender, receiver, message: (
        fills.append(message) if isinstance(message, msg.Fill) else None
    )
    name = f"r-{policy or 'as-it-is'}"
    town.client(msg.Submit(name, tuple(PROMPT), GenerationParams(8), role_policy=policy))
    town.run_all([name])
    assert town.outcomes[name].tokens == calm_answer(PROMPT, 8)[0]
    return bool(fills)


@pytest.mark.parametrize("started", ["split", "colocated"])
@pytest.mark.parametrize("policy", ["", "split", "colocated"])
def test_one_request_has_its_own_policy(started: str, policy: str) -> None:
    town = Town(
        rules=Rules(batch_size=4, window_s=0.0, token_budget=64, role_policy=RolePolicy(started))
    )
    assert filled_by_prefill(town, policy) is ((policy or started) == "split")


def test_an_unknown_policy_is_refused_by_name() -> None:
    town = Town(rules=Rules(batch_size=4, window_s=0.0, token_budget=64))
    town.client(msg.Submit("r", (1, 2, 3), GenerationParams(4), role_policy="mixed"))
    town.run_all(["r"])
    assert (
        "role_policy must be one of split, colocated, adaptive, got 'mixed'"
        in town.outcomes["r"].why
    )
