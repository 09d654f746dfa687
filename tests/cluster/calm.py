"""What an undisturbed run says: the demo model on one colocated worker, inside this process. It is
itself held against transformers in tests/torch/test_sameness.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from sampler.params import SamplingParams
from tests.cluster.real_town import RealTown
from tests.cluster.reference import Model, load

PROMPTS = (
    "In the future, artificial intelligence will",
    "Scientists have discovered a new way to",
    "On a distant planet, aliens are",
    "One of the greatest inventions in human history is",
    "In a peaceful village, the residents daily",
    "In a mysterious forest, explorers found",
    "In a bustling city, people are",
    "In an ancient castle, there is a hidden",
    "The old man walked slowly to the",
    "A",
    "When the rain had stopped, the children ran out and",
    "At the end of the long road there was a small house, and in the house",
)


@dataclass(frozen=True)
class Calm:
    """The answer to one prompt."""

    tokens: tuple[int, ...]
    text: str
    reason: str


@cache
def demo() -> Model:
    torch.set_num_threads(1)
    return load("demo", block_size=16)


@cache
def answers(length: int, sampling: SamplingParams, prompts: Sequence[str] = PROMPTS) -> list[Calm]:
    """For each prompt, with the model's own end token."""
    model = demo()
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    with RealTown(
        model, prefills=0, blocks=256, batch_size=16, eos=model.files.eos_token_ids
    ) as town:
        tokens = town.ask(ids, length, [sampling] * len(ids))
        seen = [town.outcomes[f"q{i}"] for i in range(len(ids))]
    return [
        Calm(tuple(each), outcome.text, outcome.ends[0])
        for each, outcome in zip(tokens, seen, strict=True)
    ]
