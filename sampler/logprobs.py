"""Log-probabilities of the model itself: taken from the raw logits, before penalties, temperature
and filters (what vLLM calls `raw_logprobs`), in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampler.narrow import largest


@dataclass(frozen=True, slots=True)
class Chosen:
    """How likely the model held a drawn token, and what it held likeliest in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


def report(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[Chosen | None]:
    """What each row asks for: the logprob of its token and the `counts[i]` likeliest, or with -1
    nothing, and rows that ask for nothing cost nothing. Of equals the lowest ids come first, as
    greedy rows choose, so a row's answer is the same in any batch.

    logits [rows, vocab], any float type; token_ids int64 [rows], both on one device. A count beyond
    the vocabulary asks for all of it.
    """
    if not len(logits) == len(token_ids) == len(counts):
        raise ValueError(
            "logits, token_ids and counts must have one entry per row, got "
            f"{len(logits)}, {len(token_ids)} and {len(counts)}"
        )
    if bad := [count for count in counts if count < -1]:
        raise ValueError(f"counts must be at least -1, got {bad[0]}")
    asking = [row for row, count in enumerate(counts) if count >= 0]
    answers: list[Chosen | None] = [None] * len(counts)
    if not asking:
        return answers
    if len(asking) < len(counts):
        rows = torch.tensor(asking, device=logits.device)
        logits, token_ids = logits[rows], token_ids[rows]
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
    tops = _tops(logprobs, [counts[row] for row in asking])
    for row, logprob, top in zip(asking, chosen, tops, strict=True):
        answers[row] = Chosen(logprob, top)
    return answers


def _tops(logprobs: Tensor, counts: list[int]) -> list[tuple[tuple[int, float], ...]]:
    most = max(counts)
    if not most:
        return [()] * len(counts)
    # One more than asked for, to see whether the last has equals that were left out.
    values, ids = largest(logprobs, min(most + 1, logprobs.shape[-1]))
    tops = []
    for row, (count, its_ids, its_values) in enumerate(
        zip(counts, ids.tolist(), values.tolist(), strict=True)
    ):
        pairs = list(zip(its_ids, its_values, strict=True))
        if 0 < count < len(pairs) and its_values[count] == (edge := its_values[count - 1]):
            equals = (logprobs[row] == edge).nonzero()[:, 0].tolist()
            pairs = [pair for pair in pairs if pair[1] > edge] + [(id_, edge) for id_ in equals]
        pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        tops.append(tuple(pairs[:count]))
    return tops


def logprobs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [rows]: how likely each row's token was.

    logits [rows, vocab], any float type; token_ids int64 [rows].
    """
    return logits.float().log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row, likeliest first.

    Returns values float32 [rows, count] and ids int64 [rows, count]; a token's value has the same
    bits as `logprobs_of` gives for it.
    """
    if not 0 <= count <= logits.shape[-1]:
        raise ValueError(f"count must be in [0, vocab = {logits.shape[-1]}], got {count}")
    values, ids = torch.topk(logits.float().log_softmax(dim=-1), count, dim=-1)
    return values, ids
