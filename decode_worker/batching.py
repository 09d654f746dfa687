"""plan_step(): which runs take part in the next decode step, with how many tokens. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from baton.pace import Pace, Prompt, share_out


class Progress(NamedTuple):
    """A started run: `known` tokens, of which the KV of `computed` is in the pool. `most`: limit of its
    tokens in one forward. `itl_s`: while its prompt is filled, streams want a token within so many
    seconds; 0: no limit."""

    run: str
    known: int
    computed: int
    most: int | None = None
    itl_s: float = 0.0


class Share(NamedTuple):
    """A run's part of the next forward. `samples`: it reaches the last known token."""

    run: str
    tokens: int
    samples: bool


def plan_step(
    runs: Sequence[Progress], *, token_budget: int, pace: Pace | None = None
) -> list[Share]:
    """Continuous batching. Every run with one token left to compute (a decode step) always takes part, so
    no answer waits for a prompt. What is left of the budget, and of the time of one step at this `pace`,
    goes to prompts that decode fills by itself, in chunks: half to the oldest, the rest to those with the
    least left (baton/pace.py). The oldest gets at least one token, so it is never starved."""
    decoding = [run for run in runs if run.known - run.computed == 1]
    filling = [run for run in runs if run.known - run.computed > 1]
    shares = [Share(run.run, 1, samples=True) for run in decoding]
    prompts = [Prompt(run.computed, run.known - run.computed, run.most) for run in filling]
    budget = max(token_budget - len(decoding), 1)
    limits = [run.itl_s for run in filling if run.itl_s and decoding]
    pace = (pace or Pace()).limited(min(limits, default=0.0))
    given = share_out(prompts, pace, token_budget=budget)
    for run, prompt, tokens in zip(filling, prompts, given, strict=True):
        if tokens:
            shares.append(Share(run.run, tokens, samples=tokens == prompt.left))
    return shares
