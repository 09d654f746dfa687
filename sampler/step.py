"""One step's draws: everything goes up in one copy, and everything that is read comes down in one.

The second look at the device is rare: for rows whose first way could not decide (sample.py), and for
logprobs with equals at their edge (logprobs.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sampler.copies import down, up
from sampler.logprobs import Chosen, Looked, look, reported, told
from sampler.sample import SamplingBatch, launch, redrawn


class Result(NamedTuple):
    """A row's token, and its logprobs if they were asked for."""

    token_id: int
    chosen: Chosen | None


def step(
    logits: Tensor,
    batch: SamplingBatch,
    counts: Sequence[int],
    known: Sequence[int | None] | None = None,
) -> list[Result | None]:
    """The next token of each row of logits [rows, vocab], which may be on any device; None where it is
    not valid (sample_finite). `batch`: built on the CPU, with the width of the logits. `counts[i]`: how
    many logprobs row i reports (logprobs.report). `known[i]`: nothing is drawn for row i, whose token
    this is."""
    wanted = torch.tensor(reported(counts), dtype=torch.int64)
    fixed = None
    if known is not None and any(each is not None for each in known):
        fixed = torch.tensor([-1 if each is None else each for each in known])
    batch, wanted, fixed = up((batch, wanted, fixed), logits.device)
    drawn = launch(logits, batch)

    def read(tokens: Tensor) -> tuple[list[Tensor], Looked | None]:
        """On the CPU: tokens, whether they are valid, whether they are sure, then the logprobs."""
        if fixed is not None:
            tokens = torch.where(fixed >= 0, fixed, tokens)
        looked = look(logits, tokens, counts, wanted) if len(wanted) else None
        sure = torch.ones_like(drawn.valid) if drawn.sure is None else drawn.sure
        answers = () if looked is None else looked.answers
        return down([tokens, drawn.valid, sure, *answers]), looked

    found, looked = read(drawn.tokens)
    if again := [row for row, certain in enumerate(found[2].tolist()) if not certain]:
        found, looked = read(redrawn(drawn, batch, again))
    tokens, valid, _, *answers = found
    chosen: list[Chosen | None] = [None] * len(counts)
    if looked is not None:
        chosen = told(looked, answers, counts)
    return [
        Result(token, its) if good else None
        for token, good, its in zip(tokens.tolist(), valid.tolist(), chosen, strict=True)
    ]
