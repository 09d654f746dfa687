"""Filters: which tokens a row may draw after temperature. Each is declared once, in FILTERS.

Sampling has two paths, and both read FILTERS: the full path (sample.py) over the whole vocabulary, and
the narrow path (narrow.py) over the few largest logits of a row.

To add a filter:

1. Give SamplingParams (params.py) a number of this name: one line in the class, one in RULES. This
   changes the messages: raise PROTOCOL in baton/wire/messages.py, once for each release.
2. Write `keep_<name>(scores, values, largest)` here, with the contract of Filter.
3. Append Filter(name, off, keep, narrow) to FILTERS. `narrow` has no default: it is SAME if the
   function gives the same result on the tokens that earlier filters have kept, otherwise NEVER.

HTTP clients can set it as soon as GenerationRequest (baton/server/schema.py) has a field of this name.
tests/torch/test_sampler_ways.py runs every combination of FILTERS on both paths: add values to try to
its VALUES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from sampler.copies import free_to_read
from sampler.params import RULES
from sampler.shape import NO

FEW = 512  # the largest number of tokens on the narrow path


class Narrow(Enum):
    """How a filter works on the narrow path: on a row's largest scores, in descending order."""

    BUILT_IN = 1  # narrow.py implements it, because it decides that few tokens are left
    SAME = 2  # the same function, on the tokens that the built-in filters have kept
    NEVER = 3  # it needs the whole vocabulary: rows that use it take the full path


@dataclass(frozen=True, slots=True)
class Filter:
    """`keep` takes scores float32 [rows, n], the rows' values [rows] and the largest value of the batch
    (a host number, so reading it does not wait for the device). It returns the scores with -inf
    where filtered. It must not change rows whose value is `off`, and must keep at least one token in
    every other row. ValueError if SamplingParams has no such number."""

    name: str  # of a number in SamplingParams
    off: float  # keeps everything
    keep: Callable[[Tensor, Tensor, float], Tensor]
    narrow: Narrow

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"SamplingParams has no number {self.name}: add it to its RULES")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows' values."""
        return torch.int64 if RULES[self.name][0] is int else torch.float64


def keep_top_k(scores: Tensor, top_k: Tensor, largest: float) -> Tensor:
    """Keeps scores that are not below the k-th largest, so equals of the k-th stay too."""
    best = scores.topk(min(int(largest), scores.shape[-1]), dim=-1).values
    kth = best.gather(1, (top_k[:, None] - 1).clamp(0, best.shape[-1] - 1))
    return scores.masked_fill((scores < kth) & (top_k[:, None] > 0), NO)


def keep_top_p(scores: Tensor, top_p: Tensor, _: float = 1.0) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probabilities reach `top_p` (float64, so that
    1 - top_p rounds as in transformers).

    Sorting a vocabulary is by far the most expensive step (1.6 ms for a row of 50,257 on two Zen 5
    cores, ten times the others together), so a row in which top_k has left few tokens sorts only
    those. Both variants keep the same values. Which of several equal tokens at the edge is kept may
    differ; transformers' unstable sort does not define it either.
    """
    cut = top_p < 1
    if not free_to_read(scores):  # which rows need less is known to the device alone
        return torch.where(cut[:, None], keep_nucleus(scores, top_p, scores.shape[-1]), scores)
    kept = scores.clone()
    narrow = ((scores > NO).sum(dim=-1) <= FEW) & (scores.shape[-1] > FEW)
    for chosen, width in ((cut & narrow, FEW), (cut & ~narrow, scores.shape[-1])):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            kept[rows] = keep_nucleus(scores[rows], top_p[rows], width)
    return kept


def keep_nucleus(scores: Tensor, top_p: Tensor, width: int) -> Tensor:
    """keep_top_p for rows in which all tokens but the `width` largest are -inf."""
    if width < scores.shape[-1]:
        values, ids = (best.flip(-1) for best in scores.topk(width, dim=-1))
    else:
        values, ids = scores.sort(dim=-1)
    below = values.softmax(dim=-1).cumsum(
        dim=-1
    )  # the probability of a token and of all smaller ones
    removed = below <= (1 - top_p).float()[:, None]
    removed[:, -1] = False  # the most likely token always stays
    return scores.scatter(1, ids, values.masked_fill(removed, NO))


def keep_min_p(scores: Tensor, min_p: Tensor, _: float = 1.0) -> Tensor:
    """Keeps tokens that are at least `min_p` times as likely as the most likely one."""
    probs = scores.softmax(dim=-1)
    least = min_p.float()[:, None] * probs.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probs < least, NO)


FILTERS = (
    Filter("top_k", off=0, keep=keep_top_k, narrow=Narrow.BUILT_IN),
    Filter("top_p", off=1, keep=keep_top_p, narrow=Narrow.BUILT_IN),
    Filter("min_p", off=0, keep=keep_min_p, narrow=Narrow.BUILT_IN),
)
"""In the order in which they apply. Built-in filters come first: SAME applies to what they keep."""
