"""plan_step(): which runs take part in the next decode step, with how many tokens. Pure."""

from collections.abc import Sequence
from typing import NamedTuple


class Progress(NamedTuple):
    """A started run: `known` tokens, of which the KV of `computed` is in the pool. At most `most` of
    the others in one forward, where that is limited."""

    run: str
    known: int
    computed: int
    most: int | None = None


class Share(NamedTuple):
    """A run's part of the next forward: so many tokens; `samples` if that reaches its last one."""

    run: str
    tokens: int
    samples: bool


def plan_step(runs: Sequence[Progress], *, token_budget: int) -> list[Share]:
    """Continuous batching. Every run with one token left to compute (a decode step) goes, always:
    no answer waits for a prompt. What the budget leaves goes to prompts that
    decode fills by itself, first come, first served, in chunks; at least one token of the first,
    so that it is never starved."""
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
