"""Rotary frequencies that depend on the length: every token has those of generate(), whatever happens."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ModelError
from baton.kv.prefix import extended, root
from baton.model_files import ModelFiles, _described
from baton.rope import FIXED, NEVER, RopeRule
from baton.wire import messages as msg
from baton.wire.records import Timings
from decode_worker.speculation import PromptLookup
from decode_worker.worker import DecodeWorker
from router.batching import Rules
from tests.pure.test_cluster_random import SHAKEN, WildTown, fire
from tests.pure.town import BLOCK, VOCABULARY, Town, calm_answer, next_token

DYNAMIC = RopeRule(grows_above=8, stretch=4.0)
LONGROPE = RopeRule(switches=(8,))
PHI = RopeRule(switches=(8,), recomputes=True)
LAYERED = RopeRule(grows_above=12, switches=(5, 9))
RULES = {"dynamic": DYNAMIC, "longrope": LONGROPE, "phi3": PHI, "by layer": LAYERED}
EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

FACTORS = dict(short_factor=[1.0], long_factor=[2.0])


# ---- the rule of a config


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"model_type": "llama"}, FIXED),
        ({"model_type": "llama", "rope_scaling": None}, FIXED),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, FIXED),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 9}}, FIXED),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, RopeRule(64, stretch=8.0)),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, RopeRule(64, stretch=2.0)),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16}},
            RopeRule(switches=(16,)),
        ),
        (
            {
                "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16},
                "original_max_position_embeddings": 24,
            },
            RopeRule(switches=(24,)),
        ),
        ({"rope_scaling": {"type": "longrope", **FACTORS}}, RopeRule(switches=(64,))),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "su", **FACTORS},
                "original_max_position_embeddings": 32,
            },
            RopeRule(switches=(32,), recomputes=True),
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", **FACTORS}},
            RopeRule(switches=(4096,), recomputes=True),
        ),
        ({"model_type": "phi3", "original_max_position_embeddings": 32}, FIXED),
        (
            {"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": 1000.0}},
            FIXED,
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 4.0},
                    "sliding_attention": {
                        "rope_type": "longrope",
                        "original_max_position_embeddings": 16,
                    },
                    "other": {"rope_type": "default"},
                }
            },
            RopeRule(64, (16,), stretch=4.0),
        ),
        (
            {"text_config": {"rope_scaling": {"type": "dynamic", "factor": 3.0}}},
            RopeRule(64, stretch=3.0),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_gives_its_rule(config: dict[str, Any], rule: RopeRule) -> None:
    assert RopeRule.of(config, 64) == rule


def described(config: dict[str, Any]) -> ModelFiles:
    whole = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9},
        **{"max_position_embeddings": 64, **config},
    }
    return _described("m", whole, {}, None, None, "")  # type: ignore[arg-type]


def test_a_dynamic_context_is_the_configs_times_its_factor() -> None:
    files = described({"rope_scaling": {"type": "dynamic", "factor": 8.0}})
    assert (files.max_positions, files.context(None), files.context(100)) == (512, 512, 100)
    assert described({"rope_scaling": {"type": "linear", "factor": 8.0}}).max_positions == 64


@pytest.mark.parametrize(
    "scaling", [[1], "dynamic", {"type": "dynamic", "factor": "many"}], ids=str
)
def test_a_scaling_that_cannot_be_read_is_refused_in_one_line(scaling: object) -> None:
    with pytest.raises(ModelError, match=r"^m: the rope_scaling .* cannot be read: [^\n]*$"):
        described({"rope_scaling": scaling})


# ---- rope lengths


@EVERY
@given(floor=st.integers(1, 20), start=st.integers(0, 20), count=st.integers(0, 20))
def test_a_token_has_the_length_of_its_forward(
    rule: RopeRule, floor: int, start: int, count: int
) -> None:
    found = rule.lengths(floor, start, start + count)
    assert found == [rule.effective(max(floor, p + 1)) for p in range(start, start + count)]


@EVERY
@given(a=st.integers(1, 40), b=st.integers(1, 40))
def test_equal_effective_lengths_are_equal_frequencies(rule: RopeRule, a: int, b: int) -> None:
    def frequencies(length: int) -> tuple[object, ...]:
        grown = max(length, rule.grows_above) if rule.grows_above is not None else 0
        return grown, *[length > limit for limit in rule.switches]

    assert (rule.effective(a) == rule.effective(b)) == (frequencies(a) == frequencies(b))
    assert frequencies(rule.effective(a) or 1) == frequencies(a)


def test_a_run_that_recomputes_does_so_once_beyond_the_switch() -> None:
    assert [PHI.recompute_at(floor) for floor in (1, 7, 8, 9, 30)] == [9, 9, 9, NEVER, NEVER]
    assert {rule.recompute_at(3) for rule in (FIXED, DYNAMIC, LONGROPE)} == {NEVER}


# ---- prefix hashes

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@EVERY
@given(a=IDS, b=IDS, size=st.integers(1, 5), extra=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_hashes_are_equal_exactly_as_far_as_tokens_and_their_frequencies_are(
    rule: RopeRule, a: list[int], b: list[int], size: int, extra: tuple[int, int]
) -> None:
    chains, cells = [], []
    for ids, grown in zip((a, b), extra, strict=True):
        lengths = rule.lengths(max(1, len(ids) - grown), 0, len(ids))
        chains.append(extended([root()], ids, size, lengths)[1:])
        cells.append(list(zip(ids, lengths, strict=True)))
    for i, (name, other) in enumerate(zip(*chains, strict=False)):
        end = (i + 1) * size
        assert (name == other) is (cells[0][:end] == cells[1][:end])


def test_hashes_below_the_limit_are_those_of_any_model() -> None:
    assert extended([root()], [1, 2, 3], 2, [0, 0, 0]) == extended([root()], [1, 2, 3], 2)


# ---- whole clusters

PROMPTS = {f"r{n}": ([100 + 7 * n + i for i in range(n)], 12) for n in (1, 3, 7, 8, 9, 14, 21)}


def check(town: Town, prompts: dict[str, tuple[list[int], int]]) -> None:
    for name, (prompt, length) in prompts.items():
        outcome = town.outcomes[name]
        tokens, reason = calm_answer(prompt, length, town.rope)
        if outcome.ends[0] in SHAKEN:
            assert outcome.tokens == tokens[: len(outcome.tokens)], name
        else:
            assert (outcome.tokens, outcome.ends) == (tokens, [reason]), name


def ask(town: Town, prompts: dict[str, tuple[list[int], int]]) -> None:
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)
    town.run_all(prompts)
    check(town, prompts)


@EVERY
@pytest.mark.parametrize("colocated", [False, True], ids=["apart", "colocated"])
def test_a_batch_over_the_limits_says_what_each_says_alone(rule: RopeRule, colocated: bool) -> None:
    prefills = 0 if colocated else 2
    rules = Rules(8, 0.0, 64, colocated=colocated)
    town = Town(
        prefills=prefills, decodes=2, rules=rules, prefill_budget=5, decode_budget=7, rope=rule
    )
    ask(town, PROMPTS)
    assert len({tuple(town.outcomes[name].tokens) for name in PROMPTS}) == len(PROMPTS)
    again = {f"{name}.again": each for name, each in PROMPTS.items()}
    ask(town, again)
    assert any(town.outcomes[name].cached_tokens for name in again)


def test_the_rules_differ_in_this_model() -> None:
    answers = [calm_answer([1, 2, 3], 12, rule)[0] for rule in (FIXED, *RULES.values())]
    assert len({tuple(each) for each in answers}) == 5


@EVERY
def test_a_prefix_is_used_again_with_the_same_frequencies_only(rule: RopeRule) -> None:
    """The same first tokens in prompts up to the limit and beyond it, with what one of them said."""
    town = Town(rope=rule, rules=Rules(4, 0.0, 64))
    base = list(range(1, 8 + 1))
    said = calm_answer(base, 12, rule)[0]
    for number, prompt in enumerate(
        [base, base[:5], base + said, [*base, 40, 41], base, base + said]
    ):
        name = f"p{number}"
        ask(town, {name: (prompt, 9)})
    assert town.outcomes["p4"].cached_tokens == BLOCK  # of the first, below the limit
    assert town.outcomes["p5"].cached_tokens > 8  # of the third, beyond it


def test_what_a_phi_said_before_its_recomputation_is_no_prefix_of_a_longer_prompt() -> None:
    town = Town(rope=PHI, rules=Rules(4, 0.0, 64))
    ask(town, {"short": ([1, 2, 3, 4, 5], 3)})  # ends below the limit
    known = [1, 2, 3, 4, 5, *town.outcomes["short"].tokens]
    ask(town, {"long": ([*known, 9, 9], 3)})
    assert town.outcomes["long"].cached_tokens == 0
    ask(town, {"between": (known, 0 + 1)})
    assert town.outcomes["between"].cached_tokens == BLOCK


def test_a_phi_begins_again_when_it_outgrows_the_limit_and_only_then() -> None:
    """That is no preemption: the pool has room, and nobody gave way."""
    town = Town(rope=PHI, rules=Rules(8, 0.0, 64))
    again: list[str] = []
    told: list[Timings] = []
    full: list[int] = []

    def look(sender: str, receiver: str, message: msg.Message) -> None:
        match message:
            case msg.Outgrown(run):
                again.append(run.partition("#")[0])
            case msg.Finished():
                told.append(message.timings)
            case msg.Observed() if message.counts is not None:
                full.append(message.counts.preemptions)

    town.before = look
    town.client(msg.Observe())
    ask(town, PROMPTS)
    assert sorted(again) == ["r1", "r3", "r7", "r8"]
    assert [(each.preemptions, each.retries) for each in told] == [(0, 0)] * len(PROMPTS)
    assert full
    assert set(full) == {0}


@EVERY
def test_drafts_change_nothing(rule: RopeRule) -> None:
    class Oracle(PromptLookup):
        """Drafts what the model will say, so that drafts are accepted across the limits."""

        def _look_up(self, wanted: Any) -> list[int]:
            for prompt, _ in PROMPTS.values():
                if list(wanted.token_ids[: len(prompt)]) == prompt:
                    whole = prompt + calm_answer(prompt, 12, rule)[0]
                    return whole[len(wanted.token_ids) :][: wanted.most]
            raise AssertionError(wanted)

    town = Town(rope=rule, rules=Rules(8, 0.0, 64), proposer=Oracle)
    ask(town, PROMPTS)


@EVERY
@pytest.mark.parametrize("colocated", [False, True], ids=["apart", "colocated"])
def test_a_full_pool_changes_nothing(rule: RopeRule, colocated: bool) -> None:
    rules = Rules(8, 0.0, 64, colocated=colocated)
    town = Town(rope=rule, rules=rules, blocks=12, prefills=0 if colocated else 1)
    crowd = {f"c{i}": ([100 * i + j for j in range(1, 4 + i)], 30) for i in range(8)}
    ask(town, crowd)
    assert sum(town.outcomes[name].preemptions for name in crowd) > 0


@EVERY
@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_every_token_is_that_of_a_calm_run(rule: RopeRule, seed: int) -> None:
    dice = random.Random(seed)
    rules = Rules(dice.choice([2, 8]), 0.0, 64, local_tokens=dice.choice([0, 6]))
    town = WildTown(
        dice, prefills=dice.randint(1, 2), decodes=dice.randint(1, 2), rope=rule, rules=rules,
        blocks=dice.choice([12, 40]), prefill_budget=dice.choice([3, 16]),
    )  # fmt: skip
    town.before = fire(town, dice, list(PROMPTS), faults=dice.randint(1, 8))
    for name, (prompt, length) in PROMPTS.items():
        town.submit(name, prompt, length)

    def over() -> bool:
        if len(town.stalled) == len(town.workers()) or dice.random() < 0.02:
            town.stalled.clear()
        return all(town.outcomes[name].ends for name in PROMPTS)

    town.run(over, turns=6000)
    town.before = None
    town.settle()
    check(town, PROMPTS)


def test_a_fill_after_a_death_keeps_the_prompts_length() -> None:
    """Prompt and generated tokens are filled together, but not as one prompt."""
    town = Town(rope=DYNAMIC, rules=Rules(4, 0.0, 64))
    fills: list[msg.Fill] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Fill):
            fills.append(message)
        if isinstance(message, msg.Decoded) and len(fills) == 1 and message.runs[0].position == 16:
            town.kill(sender)

    town.before = before
    ask(town, {"a": (list(range(1, 11)), 12)})
    assert [(len(fill.token_ids), fill.rope_floor) for fill in fills] == [(9, 10), (16, 10)]


def test_other_models_send_and_hash_as_before() -> None:
    town = Town(rules=Rules(4, 0.0, 64))
    seen: list[msg.Fill] = []
    town.before = lambda sender, receiver, message: (
        seen.append(message) if isinstance(message, msg.Fill) else None
    )
    ask(town, {"a": (list(range(1, 11)), 3)})
    assert [fill.rope_floor for fill in seen] == [0]
    (decode,) = [node for node in town.nodes.values() if isinstance(node, DecodeWorker)]
    assert decode.rope == FIXED
    assert next_token([1]) < VOCABULARY
