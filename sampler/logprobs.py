"""Log-probabilities of the raw logits, before penalties, temperature and filters (`raw_logprobs` in
vLLM), in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampler.copies import down, up
from sampler.narrow import largest


@dataclass(frozen=True, slots=True)
class Chosen:
    """The logprob of a drawn token, and of the most likely tokens at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Looked:
    """What look() has found, on the device: of each row that is reported."""

    logprobs: Tensor  # float32 [rows, vocab]
    chosen: Tensor  # float32 [rows]
    values: Tensor  # float32 [rows, k], descending
    ids: Tensor  # int64 [rows, k]

    @property
    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the host needs of it."""
        return self.chosen, self.values, self.ids


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
    wanted = reported(counts)
    if not wanted:
        return [None] * len(counts)
    index = up(torch.tensor(wanted), logits.device)
    looked = look(logits, token_ids, counts, index)
    return told(looked, down(looked.answers), counts)


def reported(counts: Sequence[int]) -> list[int]:
    """The rows with a count. ValueError for counts below -1."""
    if bad := [count for count in counts if count < -1]:
        raise ValueError(f"counts must be at least -1, got {bad[0]}")
    return [row for row, count in enumerate(counts) if count >= 0]


def look(logits: Tensor, token_ids: Tensor, counts: Sequence[int], index: Tensor) -> Looked:
    """The numbers of report(), without waiting for the device. `index`: what reported() says, int64 on
    the device."""
    if len(index) < len(counts):
        logits, token_ids = logits.index_select(0, index), token_ids.index_select(0, index)
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    # One more than requested, to detect equals of the last one that were left out.
    most = max(counts)
    count = min(most + 1, logprobs.shape[-1]) if most else 0
    none = chosen.new_empty(len(index), 0)
    values, ids = largest(logprobs, count) if count else (none, none.long())
    return Looked(logprobs, chosen, values, ids)


def told(looked: Looked, answers: Sequence[Tensor], counts: Sequence[int]) -> list[Chosen | None]:
    """report()'s answer, from `looked.answers` on the CPU. Waits for the device if a row has equals of
    its last token that were left out."""
    chosen, values, ids = (each.tolist() for each in answers)
    found: list[Chosen | None] = [None] * len(counts)
    wanted = [row for row, count in enumerate(counts) if count >= 0]
    for place, row in enumerate(wanted):
        count, its_values = counts[row], values[place]
        pairs = list(zip(ids[place], its_values, strict=True))
        if 0 < count < len(pairs) and its_values[count] == (edge := its_values[count - 1]):
            line = down([looked.logprobs[place]])[0]
            equals = (line == edge).nonzero()[:, 0].tolist()
            pairs = [pair for pair in pairs if pair[1] > edge] + [(id_, edge) for id_ in equals]
        pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        found[row] = Chosen(chosen[place], tuple(pairs[:count]))
    return found


def logprobs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [rows]: the logprob of each row's token.

    logits [rows, vocab], any float type; token_ids int64 [rows].
    """
    return logits.float().log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]
