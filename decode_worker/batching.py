"""plan_step(): which runs take part in the next decode step, with how many tokens. Pure."""

from collections.abc import Sequence
from typing import NamedTuple


class Progress(NamedTuple):
    """A started run: `known` tokens, of which the KV of `computed` is in the pool. `most`: limit of its
    tokens in one forward."""

    run: str
    known: int
    computed: int
    most: int | None = None


class Share(NamedTuple):
    """A run's part of the next forward. `samples`: it reaches the last known token."""

    run: str
    tokens: int
    samples: bool


def plan_step(runs: Sequence[Progress], *, token_budget: int) -> list[Share]:
    """Continuous batching. Every run with one token left to compute (a decode step) always takes part, so
    no answer waits for a prompt. The rest of the budget goes to prompts that decode fills by itself, in
    chunks, first come, first served; the first gets at least one token, so it is never starved."""
    decoding = [run for run in runs if run.known - run.computed == 1]
    filling = [run for run in runs if run.known - run.computed > 1]
    shares = [Share(run.run, 1, samples=True) for run in decoding]
    budget = max(token_budget - len(decoding), 1 if filling else 0)
    for run in filling:
        if budget <= 0:
            break
        tokens = min(run.known - run.computed, budget, run.most or budget)
        shares.append(Share(run.run, tokens, samples=tokens == run.known - run.computed))
        budget -= tokens
    return shares
