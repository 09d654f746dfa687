"""Log-probabilities of the raw logits, before penalties, temperature and filters (`raw_logprobs` in
vLLM), in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampler.narrow import largest


@dataclass(frozen=True, slots=True)
class Chosen:
    """The logprob of a drawn token, and of the most likely tokens at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


def report(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[Chosen | None]:
    """For each row the logprob of its token and of the `counts[i]` most likely tokens; None for a
    count of -1, which costs nothing. Among equals the lowest ids come first, as in greedy rows, so a
    row's result does not depend on the batch.

    logits [rows, vocab], any float type; token_ids int64 [rows], both on one device. A count beyond
    the vocabulary returns all of it. ValueError for other lengths than [rows], or counts below -1.
    """
    if not len(logits) == len(token_ids) == len(counts):
        raise ValueError(
            "logits, token_ids and counts must have one entry per row, got "
            f"{len(logits)}, {len(token_ids)} and {len(counts)}"
        )
    if bad := [count for count in counts if count < -1]:
        raise ValueError(f"counts must be at least -1, got {bad[0]}")
    wanted = [row for row, count in enumerate(counts) if count >= 0]
    answers: list[Chosen | None] = [None] * len(counts)
    if not wanted:
        return answers
    if len(wanted) < len(counts):
        rows = torch.tensor(wanted, device=logits.device)
        logits, token_ids = logits[rows], token_ids[rows]
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
    tops = _tops(logprobs, [counts[row] for row in wanted])
    for row, logprob, top in zip(wanted, chosen, tops, strict=True):
        answers[row] = Chosen(logprob, top)
    return answers


def _tops(logprobs: Tensor, counts: list[int]) -> list[tuple[tuple[int, float], ...]]:
    most = max(counts)
    if not most:
        return [()] * len(counts)
    # One more than requested, to detect equals of the last one that were left out.
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
    """float32 [rows]: the logprob of each row's token.

    logits [rows, vocab], any float type; token_ids int64 [rows].
    """
    return logits.float().log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]
