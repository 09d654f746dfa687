"""Arrivals: which requests come when, at random or from a trace. A seed fixes them. Pure."""

import random

from baton.plan.simulation import Arrival


def poisson(
    rate: float, count: int, *, prompt: int, new_tokens: int, seed: int = 1
) -> list[Arrival]:
    """Open loop: `count` requests at exponential intervals. Prompts have half to one and a half times
    `prompt` tokens, answers half to one and a half times `new_tokens`. No two begin with the same token."""
    dice = random.Random(seed)
    found, at = list[Arrival](), 0.0
    for index in range(count):
        at += dice.expovariate(rate)
        length = dice.randint(max(2, prompt // 2), prompt * 3 // 2)
        answer = dice.randint(max(1, new_tokens // 2), max(1, new_tokens * 3 // 2))
        found.append(Arrival(at, (index + 1,) * length, answer))
    return found
