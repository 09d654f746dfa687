"""Shortcuts change nothing: a cached prefix, a guessed token, a compiled model in fewer bits; nor does
a pool that is too small."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from baton.engine.boot import boot
from baton.engine.cpu.build import NoCompiler, build, program_sources
from decode_worker.draft import DraftModel
from decode_worker.speculation import PromptLookup, Proposer, Speculation
from decode_worker.worker import DecodeWorker
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.real_town import WHOLE, RealTown
from tests.cluster.reference import Model
from tests.cluster.ways import MIXTURE

LENGTH = 24
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> Model:
    return calm.demo()


def answer(town: RealTown, name: str, prompt: list[int], sampling: SamplingParams) -> list[int]:
    town.submit(name, prompt, LENGTH, sampling=sampling)
    town.run_all([name])
    return town.outcomes[name].tokens


PAIRS = [
    pytest.param(way, chunk, (GREEDY, MIXTURE[0])[(i + j) % 2], id=f"{way}-{chunk}-{name}")
    for i, way in enumerate(("shm", "frames", "pinned", "colocated"))
    for j, chunk in enumerate((7, WHOLE))
    for name in [("greedy", "sampled")[(i + j) % 2]]
]
"""Every two of way, chunk and sampling together."""


@pytest.mark.parametrize(("way", "chunk", "sampling"), PAIRS)
def test_a_prefix_that_is_there_already_gives_the_same_answer(
    demo: Model, way: str, chunk: int, sampling: SamplingParams
) -> None:
    (long,) = demo.clear_prompts([53], 2 * LENGTH + 3)
    other = [*long[:35], *long[5:12]]
    prefills = 0 if way == "colocated" else 1
    transport = "shm" if way == "colocated" else way

    def fresh(prompt: list[int]) -> list[int]:
        with RealTown(demo, prefills=prefills, transport=transport, chunk=chunk) as town:
            return answer(town, "x", prompt, sampling)

    first = fresh(long)
    chat = [*long, *first, 9, 8, 7]
    with RealTown(demo, prefills=prefills, transport=transport, chunk=chunk) as town:
        assert answer(town, "a", long, sampling) == first
        assert answer(town, "b", long, sampling) == first
        assert answer(town, "c", other, sampling) == fresh(other)
        assert answer(town, "d", chat, sampling) == fresh(chat)
        cached = {name: town.outcomes[name].cached_tokens for name in "abcd"}
        again = town.finished["b"].timings
    assert cached == {"a": 0, "b": 48, "c": 32, "d": (53 + LENGTH - 1) // 16 * 16}
    assert again.moved_bytes == 0, "a full hit moves nothing"


CROWD = [5, 17, 2, 34, 16, 9, 21, 3]  # tokens of each prompt


def test_giving_way_to_older_requests_changes_no_answer(demo: Model) -> None:
    """Nor does the way: where there is room, one of them tells for all."""
    length = 50
    prompts = demo.clear_prompts(CROWD, length)
    with RealTown(demo) as town:
        roomy = town.ask(prompts, length, list(MIXTURE))
        assert not any(end.timings.preemptions for end in town.finished.values())
    for where in (dict(transport="shm"), dict(transport="frames"), dict(prefills=0)):
        with RealTown(demo, blocks=8, **where) as town:  # type: ignore[arg-type]
            assert town.ask(prompts, length, list(MIXTURE), clean=False) == roomy, where
            assert any(end.timings.preemptions for end in town.finished.values()), where


@pytest.mark.parametrize("decodes", [1, 2])
def test_guessed_tokens_are_those_of_plain_decoding(demo: Model, decodes: int) -> None:
    prompts = demo.clear_prompts(CROWD, LENGTH)
    sampling = list(MIXTURE)
    with RealTown(demo, decodes=decodes) as town:
        plain = town.ask(prompts, LENGTH, sampling)
        steps = town.delivered
    for who in ("ngram", "draft"):
        with RealTown(demo, decodes=decodes) as town:
            for node in town.nodes.values():
                if isinstance(node, DecodeWorker):
                    node.speculation = Speculation(proposer(demo, who), most=4)
            assert town.ask(prompts, LENGTH, sampling) == plain, who
            if who == "draft":  # the model itself: all it guesses is right
                assert town.delivered < steps


def proposer(demo: Model, who: str) -> Proposer:
    if who == "ngram":
        return PromptLookup()
    return DraftModel(demo.engine, 64, context=200, chunk=16)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int8_weight_only"])
def test_in_fewer_bits_too_nothing_depends_on_the_company(demo: Model, dtype: str) -> None:
    """What no other engine promises: in half precision and int8 a request gets the same tokens alone,
    in a batch, disaggregated and colocated, chunk by chunk."""
    try:
        build(program_sources(["f32"], ["f32"]), "program-float32")
    except NoCompiler as error:
        pytest.skip(f"needs a compiled model: {error}")
    engine = boot(demo.files, device="cpu", dtype=dtype, block_size=16)
    assert engine.runner.backend == "compiled for this CPU"
    model = replace(demo, engine=engine)
    prompts = demo.clear_prompts(CROWD, LENGTH)
    with RealTown(model) as town:
        together = town.ask(prompts, LENGTH, list(MIXTURE))
    with RealTown(model, prefills=0, chunk=7, batch_size=3) as town:
        assert town.ask(prompts, LENGTH, list(MIXTURE)) == together
    with RealTown(model, batch_size=1, chunk=5, transport="frames") as town:
        assert town.ask(prompts, LENGTH, list(MIXTURE)) == together
