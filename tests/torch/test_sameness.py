"""Disaggregated = colocated = transformers.generate, token for token, whatever the topology."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.wire import messages as msg
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.real_town import WHOLE, RealTown
from tests.cluster.reference import Model
from tests.cluster.ways import MIXTURE, check_colocated, check_ways

TRANSPORTS = ("shm", "frames", "pinned")
CHUNKS = (1, 7, WHOLE)
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))  # prefill workers, decode workers
LENGTHS = (5, 1, 17, 2, 34, 16)  # of the prompts; blocks hold 16
LENGTH = 10


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> Model:
    return calm.demo()


@pytest.fixture(scope="module")
def prompts(demo: Model) -> list[list[int]]:
    return demo.clear_prompts(LENGTHS, LENGTH)


@pytest.fixture(scope="module")
def expected(demo: Model, prompts: list[list[int]]) -> list[list[int]]:
    return [demo.generate(prompt, LENGTH).tokens for prompt in prompts]


def every_pair() -> list[tuple[str, int, tuple[int, int]]]:
    """Every transport with every chunk, every transport with every shape, every chunk with every
    shape. All three at once would be three times as many."""
    return [
        (transport, CHUNKS[(i + j) % len(CHUNKS)], shape)
        for i, transport in enumerate(TRANSPORTS)
        for j, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize(("transport", "chunk", "shape"), every_pair(), ids=str)
def test_disaggregated_is_what_transformers_generates(
    demo: Model,
    prompts: list[list[int]],
    expected: list[list[int]],
    transport: str,
    chunk: int,
    shape: tuple[int, int],
) -> None:
    with RealTown(
        demo, prefills=shape[0], decodes=shape[1], transport=transport, chunk=chunk
    ) as town:
        assert town.ask(prompts, LENGTH) == expected
        check_ways(town, prompts, chunk)


@pytest.mark.parametrize("decodes", [1, 2])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_colocated_is_what_transformers_generates(
    demo: Model, prompts: list[list[int]], expected: list[list[int]], chunk: int, decodes: int
) -> None:
    with RealTown(demo, prefills=0, decodes=decodes, chunk=chunk) as town:
        assert town.ask(prompts, LENGTH) == expected
        check_colocated(town)


def test_short_prompts_filled_by_decode_are_the_same(
    demo: Model, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with RealTown(demo, local_tokens=8, chunk=7) as town:
        assert town.ask(prompts, LENGTH) == expected
        filled = {i: town.ways[f"q{i}"].filled_by for i in range(len(prompts))}
    assert {i for i, by in filled.items() if by} == {
        i for i, prompt in enumerate(prompts) if len(prompt) - 1 > 8
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_small_batch_gives_the_same(
    demo: Model, prompts: list[list[int]], expected: list[list[int]], batch_size: int
) -> None:
    with RealTown(demo, batch_size=batch_size) as town:
        assert town.ask(prompts, LENGTH) == expected


def test_a_pool_too_small_for_all_gives_the_same(
    demo: Model, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with RealTown(demo, blocks=4, transport="frames", chunk=7) as town:
        assert town.ask(prompts, LENGTH) == expected


def test_a_long_answer_over_many_blocks_is_the_same(demo: Model) -> None:
    (prompt,) = demo.clear_prompts([40], 70)
    expected = demo.generate(prompt, 70).tokens
    with RealTown(demo, prefills=0) as town:
        assert town.ask([prompt], 70) == [expected]
    with RealTown(demo, transport="frames", chunk=7) as town:
        assert town.ask([prompt], 70) == [expected]


def test_greedy_with_a_repetition_penalty_is_what_transformers_generates(demo: Model) -> None:
    length, penalty = 20, 1.8
    prompts = demo.clear_prompts(LENGTHS, length, repetition_penalty=penalty)
    expected = [demo.generate(p, length, repetition_penalty=penalty).tokens for p in prompts]
    assert expected != [demo.generate(p, length).tokens for p in prompts]
    sampling = [SamplingParams(temperature=0, repetition_penalty=penalty)] * len(prompts)
    with RealTown(demo, prefills=2, decodes=2, chunk=7) as town:
        assert town.ask(prompts, length, sampling) == expected


# ---- the end of a text


def test_the_end_token_is_the_last_as_in_transformers(
    demo: Model, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """The end tokens are some that do come: of one prompt the first, of others one in the middle."""
    eos = (expected[0][0], expected[2][4], expected[4][LENGTH - 1])
    ended = [demo.generate(prompt, LENGTH, eos=eos).tokens for prompt in prompts]
    assert [len(tokens) for tokens in ended[:5:2]] == [1, 5, LENGTH]
    disaggregated: dict[str, Any] = dict(prefills=2, decodes=2, transport="frames", chunk=7)
    for where in (dict(prefills=0), disaggregated):
        with RealTown(demo, eos=eos, **where) as town:
            assert town.ask(prompts, LENGTH) == ended
            for i, tokens in enumerate(ended):
                reason = "stop" if tokens[-1] in eos else "length"
                assert town.outcomes[f"q{i}"].ends == [reason]
                said = tokens[:-1] if reason == "stop" else tokens  # the end itself is no text
                text = demo.tokenizer.decode(prompts[i] + said)
                assert text.endswith(town.outcomes[f"q{i}"].text)


def test_without_ends_it_goes_on_to_the_length(
    demo: Model, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with RealTown(demo, eos=(expected[0][0], expected[2][4])) as town:
        assert town.ask(prompts, LENGTH, ignore_eos=True) == expected


# ---- sampling


@pytest.fixture(scope="module")
def crowd(demo: Model) -> tuple[list[list[int]], list[SamplingParams]]:
    """32 requests: equal prompts with other seeds among them, and every kind of sampling."""
    numbers = torch.Generator().manual_seed(3)
    lengths = [1 + (7 * i) % 23 for i in range(32)]
    vocabulary = demo.files.vocab_size
    prompts = [torch.randint(1, vocabulary, (n,), generator=numbers).tolist() for n in lengths]
    prompts[8:16] = [prompts[0][:] for _ in range(8)]
    return prompts, [replace(MIXTURE[i % len(MIXTURE)], seed=100 + i) for i in range(32)]


@pytest.fixture(scope="module")
def alone(demo: Model, crowd: tuple[list[list[int]], list[SamplingParams]]) -> list[list[int]]:
    """What each request of the crowd says when it is the only one, colocated."""
    prompts, sampling = crowd
    with RealTown(demo, prefills=0, batch_size=1) as town:
        return town.ask(prompts, LENGTH, sampling)


def test_seeds_and_parameters_matter(
    alone: list[list[int]], crowd: tuple[list[list[int]], list[SamplingParams]]
) -> None:
    drawn = [tuple(t) for t, s in zip(alone, crowd[1], strict=True) if not s.greedy]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "where",
    [
        dict(prefills=0),
        dict(prefills=0, decodes=2, chunk=7),
        dict(chunk=1),
        dict(prefills=2, decodes=2, chunk=7),
        dict(prefills=2, decodes=1, transport="frames"),
        dict(prefills=1, decodes=2, transport="pinned", chunk=7),
    ],
    ids=str,
)
def test_sampling_is_the_same_in_a_crowd_and_everywhere(
    demo: Model,
    crowd: tuple[list[list[int]], list[SamplingParams]],
    alone: list[list[int]],
    where: dict[str, Any],
) -> None:
    prompts, sampling = crowd
    with RealTown(demo, batch_size=32, blocks=256, **where) as town:
        assert town.ask(prompts, LENGTH, sampling) == alone


# ---- after a death


def victims(town: RealTown, message: type, nth: int, role: str) -> None:
    """Kill a worker of this role before the nth message of this kind is delivered, once."""
    note, seen = town.before, [0]

    def before(sender: str, receiver: str, each: msg.Message) -> None:
        assert note is not None
        if isinstance(each, message):
            seen[0] += 1
            if seen[0] == nth:
                there = sender if sender.startswith(role) else receiver
                town.kill(there if there.startswith(role) else town.workers(role)[0])
        note(sender, receiver, each)

    town.before = before


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("message", "nth", "role"),
    [
        (msg.Fill, 1, "prefill"),
        (msg.Filled, 2, "prefill"),
        (msg.Fill, 1, "decode"),
        (msg.Start, 2, "decode"),
        (msg.Decoded, 1, "decode"),
        (msg.Decoded, 6, "decode"),
        (msg.Decoded, LENGTH - 1, "decode"),
    ],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_a_death_changes_no_token(
    demo: Model,
    crowd: tuple[list[list[int]], list[SamplingParams]],
    alone: list[list[int]],
    transport: str,
    message: type,
    nth: int,
    role: str,
) -> None:
    prompts, sampling = crowd[0][:8], crowd[1][:8]
    with RealTown(demo, prefills=1, decodes=2, transport=transport, chunk=7) as town:
        victims(town, message, nth, role)
        assert town.ask(prompts, LENGTH, sampling, clean=False) == alone[:8]
        assert max(end.timings.retries for end in town.finished.values()) >= 1
