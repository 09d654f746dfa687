"""Rotary frequencies that depend on the length: the tokens are generate()'s, alone on a new model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.engine import limits
from baton.engine.attention import AttentionParams
from baton.engine.boot import boot
from baton.engine.cpu.capture import capture
from baton.engine.cuda.graphs import Again, GraphRunner, StaticAttention
from baton.engine.cuda.select import fastest
from baton.engine.errors import CompileError
from baton.engine.gather import GatherAttention
from baton.engine.loading import prepare
from baton.engine.pool import Pool
from baton.engine.pools import OnePool
from baton.engine.probe import discover_layout
from baton.engine.rotary import Rotary, check_rope
from baton.engine.runner import Runner
from baton.engine.selftest import self_test
from baton.errors import InputError, ModelError
from baton.rope import RopeRule
from baton.wire import messages as msg
from decode_worker.speculation import PromptLookup, Speculation
from decode_worker.worker import DecodeWorker
from tests.cluster.real_town import RealTown
from tests.cluster.reference import Model, load
from tests.torch.families import COMMON, WIDE, make_model
from tests.torch.rope_models import (
    LIMIT,
    ROPES,
    clear_prompts,
    make_rope_model,
    said_alone,
    save_rope_model,
)

LENGTHS = (4, 41, 56, 63, 64, 99, 182, 303)
FEW = [0, 2, 3, 5]  # of them, where less will do
LENGTH = 12
EVERY = pytest.mark.parametrize("kind", ROPES)
BOTH = pytest.mark.parametrize("kind", ["dynamic", "phi3"])  # by token, by sequence


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A model, prompts, and what each of them says alone."""

    model: Model
    prompts: list[list[int]]
    answers: list[list[int]]

    def few(self) -> "Case":
        return Case(self.model, [self.prompts[i] for i in FEW], [self.answers[i] for i in FEW])

    def town(self, **where: Any) -> RealTown:
        return RealTown(self.model, **{**dict(batch_size=16, blocks=96, chunk=64), **where})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def made(kind: str) -> Case:
        folder = save_rope_model(kind, tmp_path_factory.mktemp("model") / kind.replace(" ", "-"))
        model = load(str(folder), block_size=16)
        return Case(model, *clear_prompts(model, LENGTHS, LENGTH))

    return made


def forget(town: RealTown) -> None:
    """What was asked so far, so that its names can be used again."""
    town.outcomes.clear()
    town.ways.clear()
    town.finished.clear()


# ---- whole clusters


@EVERY
@pytest.mark.parametrize("prefills", [0, 2], ids=["colocated", "apart"])
def test_a_batch_says_what_each_prompt_says_alone(
    case: Callable[[str], Case], kind: str, prefills: int
) -> None:
    it = case(kind)
    with it.town(prefills=prefills, decodes=2 if prefills else 1) as town:
        assert town.ask(it.prompts, LENGTH) == it.answers
        few = it.few()
        forget(town)
        assert town.ask(few.prompts[::-1], LENGTH) == few.answers[::-1]  # the engine has been used


def test_kv_that_is_sent_has_the_same_frequencies(case: Callable[[str], Case]) -> None:
    it = case("dynamic").few()
    with it.town(transport="frames", chunk=40) as town:
        assert town.ask(it.prompts, LENGTH) == it.answers


@EVERY
def test_a_prefix_is_used_again_where_its_frequencies_are_the_same(
    case: Callable[[str], Case], kind: str
) -> None:
    """A short prompt; then a longer one that begins with it and its answer, beyond the limit; then both
    again."""
    it = case(kind)
    first = it.prompts[2]
    longer = [*first, *it.answers[2], 7, 8, 9]
    answers = [it.answers[2], said_alone(it.model, longer, LENGTH)[0]]
    cached = []
    with it.town() as town:
        for prompt, answer in zip((first, longer, first, longer), answers * 2, strict=True):
            forget(town)
            assert town.ask([prompt], LENGTH) == [answer]
            cached.append(town.finished["q0"].timings.cached_tokens)
    assert cached[0] == 0
    assert cached[1] == (LIMIT if kind == "phi3" else 0)  # phi3 has computed the first one again
    assert min(cached[2:]) > 0


@BOTH
def test_preemption_in_a_full_pool_changes_no_token(case: Callable[[str], Case], kind: str) -> None:
    it = case(kind).few()
    engine = it.model.engine
    layout = replace(engine.layout, block_size=4)
    small = replace(engine, layout=layout, pools=OnePool(layout, engine.device))
    with replace(it, model=replace(it.model, engine=small)).town(blocks=64) as town:
        assert town.ask(it.prompts, LENGTH) == it.answers
        preempted = sum(end.timings.preemptions for end in town.finished.values())
        assert bool(preempted) is (
            kind == "dynamic"
        )  # phi3 begins again by its own length: no preemption


@BOTH
def test_a_death_changes_no_token(case: Callable[[str], Case], kind: str) -> None:
    """Prompt and generated tokens are filled together afterwards."""
    it = case(kind).few()
    with it.town(decodes=2) as town:
        note, seen = town.before, [0]
        assert note is not None

        def before(sender: str, receiver: str, each: msg.Message) -> None:
            if isinstance(each, msg.Decoded) and sender in town.nodes:
                seen[0] += 1
                if seen[0] in (4, 20):
                    town.kill(sender)
            note(sender, receiver, each)

        town.before = before
        assert town.ask(it.prompts, LENGTH, clean=False) == it.answers
        assert max(end.timings.retries for end in town.finished.values()) >= 1


@BOTH
def test_drafts_change_no_token(case: Callable[[str], Case], kind: str) -> None:
    it = case(kind).few()

    class Oracle(PromptLookup):
        """Drafts that are accepted, across the limit as well."""

        def _look_up(self, wanted: Any) -> list[int]:
            known = list(wanted.token_ids)
            for prompt, tokens in zip(it.prompts, it.answers, strict=True):
                if known[: len(prompt)] == prompt:
                    return (prompt + tokens)[len(known) :][: wanted.most]
            raise AssertionError

    with it.town() as town:
        (decode,) = [node for node in town.nodes.values() if isinstance(node, DecodeWorker)]
        decode.speculation = Speculation(Oracle(), 4)
        assert town.ask(it.prompts, LENGTH) == it.answers


# ---- the engine


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_test_accepts_it(kind: str, dtype: torch.dtype) -> None:
    model = make_rope_model(kind, dtype=dtype)
    self_test(Runner(model), model, discover_layout(model, 16, dtype))


@EVERY
def test_it_is_not_compiled_and_not_recorded(case: Callable[[str], Case], kind: str) -> None:
    """A program or a recording would have the frequencies of one length."""
    model = make_rope_model(kind)
    with pytest.raises(CompileError, match="rotary embedding depends on the length"):
        capture(model)
    assert "rotary embedding depends on the length" in case(kind).model.engine.runner.backend
    plain = Runner(model)
    layout = discover_layout(model, 16, torch.float32)
    ways = [("torch", lambda: GraphRunner(plain, StaticAttention(), Again))]
    assert fastest(plain, layout, ways) is plain


def test_int8_weights_are_refused_in_one_line(case: Callable[[str], Case]) -> None:
    files = case("phi3").model.files
    with pytest.raises(InputError, match="cannot have int8 weights: its rotary embedding depends"):
        boot(files, device="cpu", dtype="int8", block_size=16)


def test_the_context_of_dynamic_is_stretched(case: Callable[[str], Case]) -> None:
    assert case("dynamic").model.files.max_positions == 8 * LIMIT
    assert case("longrope").model.files.max_positions == 1024


def test_a_config_that_transformers_reads_otherwise_is_refused(
    case: Callable[[str], Case],
) -> None:
    files = replace(case("longrope").model.files, rope=RopeRule(switches=(96,)))
    with pytest.raises(ModelError, match="beyond 96 tokens, for transformers beyond 64 tokens"):
        check_rope(files, make_rope_model("longrope"))


# ---- what the self-test notices


class Forgetful(GatherAttention):
    """Attention that knows no window."""

    def __call__(
        self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
    ) -> torch.Tensor:
        return super().__call__(
            query, pool, layer, AttentionParams(params.scaling, None, params.softcap, params.sinks)
        )


def windowed() -> Any:
    """A window that no short test sequence reaches."""
    config = AutoConfig.for_model(
        "mistral", **COMMON | WIDE | dict(max_position_embeddings=256, sliding_window=48)
    )
    torch.manual_seed(0)
    return prepare(AutoModelForCausalLM.from_config(config, attn_implementation="baton_paged"))


def test_the_self_test_crosses_a_sliding_window() -> None:
    model = windowed()
    layout = discover_layout(model, 16, torch.float32)
    assert limits.limits(model) == [48]
    self_test(Runner(model), model, layout)
    with pytest.raises(ModelError, match="57 tokens, where a limit is 48"):
        self_test(Runner(model, Forgetful), model, layout)


@EVERY
def test_the_self_test_notices_frequencies_of_the_whole_batch(kind: str) -> None:
    """transformers' own modules, as they were served before."""
    model = make_rope_model(kind)
    layout, runner = discover_layout(model, 16, torch.float32), Runner(model)
    assert runner.rotary is not None
    for each in runner.rotary.modules:
        each.module.forward = copy.deepcopy(each._original).forward
    with pytest.raises(ModelError, match="its rotary embedding our values differ"):
        self_test(runner, model, layout)
    limits_only = [0.0]
    for _, ours, theirs in limits.crossed(runner, model, layout):
        limits_only.append(float((ours - theirs).abs().max()))
    assert max(limits_only) > 0.01


def test_large_limits_are_tested_on_the_rotary_modules_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_rope_model("longrope")
    layout, runner = discover_layout(model, 16, torch.float32), Runner(model)
    assert list(limits.crossed(runner, model, layout))
    monkeypatch.setattr(limits, "AFFORDABLE", 1e6)
    assert not list(limits.crossed(runner, model, layout))
    assert list(limits.rotated(model))


def test_models_of_fixed_frequencies_are_left_alone() -> None:
    model = make_model("llama")
    assert Runner(model).rotary is None
    assert "forward" not in model.model.rotary_emb.__dict__


def test_a_way_of_generating_that_is_not_known_is_refused() -> None:
    model = make_rope_model("longrope")

    class Own(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **named: Any) -> Any:
            raise AssertionError

    model.__class__ = Own
    with pytest.raises(ModelError, match=r"Own cannot be served: .* in a way of its own"):
        Rotary.of(model)
