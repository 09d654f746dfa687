"""A policy that decides at random, in whole clusters: the tokens are the same whatever it decides, also
when workers die in the middle of a local fill, pools are full and prefixes are shared."""

import random
from collections.abc import Callable

import pytest

from baton.wire import messages as msg
from router import roles
from router.batching import Rules
from router.role_policy import Cause, Decision, RolePolicy
from tests.pure.slow_loads import wrong_counts
from tests.pure.test_cluster_random import WildTown, run_under_fire
from tests.pure.town import Town, calm_answer


@pytest.fixture
def dice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Decides from now on who fills."""
    dice = random.Random(request.param)

    def choose(*_args: object, **_more: object) -> Decision:
        itl_s = dice.choice([0.0, 0.001, 10.0])
        return Decision(dice.random() < 0.5, Cause.WAITING, "prefill or decode, by chance", itl_s)

    monkeypatch.setattr(roles, "choose", choose)
    return dice


def measured(town: Town) -> bool:
    """All workers have told their speed."""
    members = list(town.router.workers)
    return bool(members) and all(member.speeds for member in members)


def rules(dice: random.Random) -> Rules:
    return Rules(
        batch_size=dice.choice([2, 4, 8]), window_s=dice.choice([0.0, 0.01]), token_budget=64,
        role_policy=RolePolicy.ADAPTIVE,
    )  # fmt: skip


@pytest.mark.parametrize("dice", range(40), indirect=True)
def test_under_fire_every_answer_is_that_of_a_calm_run(dice: random.Random) -> None:
    town = WildTown(
        dice, prefills=dice.randint(1, 2), decodes=dice.randint(1, 2), blocks=dice.choice([12, 16, 40]),
        rules=rules(dice), prefill_budget=dice.choice([3, 16]), decode_budget=dice.choice([2, 5, 16]),
    )  # fmt: skip
    town.run(lambda: measured(town))
    shared = [dice.randrange(1, 900) for _ in range(12)]
    prompts = {
        f"r{i}": (
            shared[: dice.choice([0, 4, 12])]
            + [dice.randrange(1, 900) for _ in range(dice.randint(1, 14))],
            dice.randint(1, 12),
        )
        for i in range(dice.randint(4, 12))
    }
    run_under_fire(town, dice, prompts, faults=dice.choice([0, 2, 6]))
    assert not town.router.ledger.loads.fills._workers


LONG = list(range(1, 42))


def local_fill(dice: random.Random, **options: object) -> Town:
    """A town with one long prompt that its decode worker fills by itself, three tokens a step."""
    town = Town(rules=rules(dice), decode_budget=3, blocks=40, **options)  # type: ignore[arg-type]
    town.run(lambda: measured(town))
    return town


def halfway(town: Town, request: str, tokens: int) -> Callable[[], bool]:
    """So many of its tokens are computed by its decode worker."""

    def reached() -> bool:
        nodes = [town.nodes[name] for name in town.workers("decode")]
        runs = [r for node in nodes for n, r in node.runs.items() if n.startswith(request + "#")]  # type: ignore[attr-defined]
        return any(tokens <= run.computed < len(run.token_ids) - 3 for run in runs)

    return reached


@pytest.mark.parametrize("dice", range(6), indirect=True)
@pytest.mark.parametrize("fault", ["kill", "stall", "abort"])
def test_a_local_fill_is_interrupted(dice: random.Random, fault: str) -> None:
    town = local_fill(dice)
    prompts: dict[str, list[int]] = {}
    for attempt in range(20):
        last = f"long{attempt}"
        prompts[last] = [900 - attempt, *LONG]
        town.submit(last, prompts[last], 6)
        there = halfway(town, last, 5 * dice.randint(1, 6))
        town.run(lambda last=last, there=there: there() or bool(town.outcomes[last].ends))  # type: ignore[misc]
        if not town.outcomes[last].ends:
            break
    else:
        raise AssertionError("no prompt was filled by decode in 20 throws")
    (decode,) = town.workers("decode")
    if fault == "kill":
        town.kill(decode)
    elif fault == "stall":
        town.stalled.add(decode)
        began = town.now
        town.run(lambda: town.now > began + 10.0)
        town.stalled.clear()
    else:
        town.client(msg.Abort(last))
    prompts["after"] = [*prompts[last], 7]
    town.submit("after", prompts["after"], 6)
    town.run_all(prompts)
    for name, prompt in prompts.items():
        outcome = town.outcomes[name]
        if fault == "abort" and name == last:
            assert outcome.ends == ["abort"]
        else:
            assert outcome.tokens == calm_answer(prompt, 6)[0], name
    assert not list(wrong_counts(town.router))


@pytest.mark.parametrize("dice", range(8), indirect=True)
@pytest.mark.parametrize("blocks", [12, 14])
def test_a_local_fill_that_gives_way_leaves_nothing_half_filled_in_the_prefix_cache(
    dice: random.Random, blocks: int
) -> None:
    town = Town(rules=rules(dice), blocks=blocks, decode_budget=2)
    town.run(lambda: measured(town))
    young, seen = list(range(100, 124)), 0

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal seen
        seen += isinstance(message, msg.Decoded)
        if seen == 10 and isinstance(message, msg.Decoded):
            town.submit("young", young, 6)

    town.before = before
    town.submit("old", [1, 2, 3, 4, 5], 40)
    town.run(lambda: bool(town.outcomes["old"].ends) and bool(town.outcomes["young"].ends))
    town.submit("again", [*young, 7], 6)
    town.run_all(["again"])
    asked = (("old", [1, 2, 3, 4, 5], 40), ("young", young, 6), ("again", [*young, 7], 6))
    for name, prompt, most in asked:
        assert town.outcomes[name].tokens == calm_answer(prompt, most)[0], name
