"""Filters: which tokens a row may still draw after temperature, one declaration each, in their order.

A new filter is a number of SamplingParams (one line in its class, one in RULES) and one entry of
FILTERS. Both ways of sampling read this list: the full one (sample.py) over the whole vocabulary, and
the narrow one (narrow.py) over the few largest logits of a row. `narrow` has no default, so each
filter says what it does there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from sampler.params import RULES
from sampler.shape import NO

FEW = 512  # tokens that the narrow way looks at, at most


class Narrow(Enum):
    """How a filter works over a row's largest scores alone, in descending order."""

    BUILT_IN = 1  # narrow.py does it: it also decides that few tokens are left
    SAME = 2  # the same function over the tokens that the built-in filters kept
    NEVER = 3  # it needs the whole vocabulary: rows that use it take the full way


@dataclass(frozen=True, slots=True)
class Filter:
    """`keep` takes scores float32 [rows, n], the rows' values [rows] and the batch's largest value
    (known without waiting for the device), and gives the scores with -inf where filtered. Rows
    whose value is `off` stay as they are; each other row keeps at least one token."""

    name: str  # of a number in SamplingParams
    off: float  # keeps everything
    keep: Callable[[Tensor, Tensor, float], Tensor]
    narrow: Narrow

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"{self.name} is no number of SamplingParams: add it to its RULES")

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows' values."""
        return torch.int64 if RULES[self.name][0] is int else torch.float64


def keep_top_k(scores: Tensor, top_k: Tensor, largest: float) -> Tensor:
    """Keeps what is not below the row's k-th largest score, so equals of the k-th stay too."""
    best = scores.topk(min(int(largest), scores.shape[-1]), dim=-1).values
    kth = best.gather(1, (top_k[:, None] - 1).clamp(0, best.shape[-1] - 1))
    return scores.masked_fill((scores < kth) & (top_k[:, None] > 0), NO)


def keep_top_p(scores: Tensor, top_p: Tensor, _: float = 1.0) -> Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach `top_p` (float64, so that
    1 - top_p rounds as transformers' does).

    Sorting a vocabulary is the dearest step by far (1.6 ms a row of 50,257 on two Zen 5 cores, ten
    times the others together), so a row that top_k has left few tokens sorts only those. A row's
    own tokens decide its way. Both ways keep the same values; only *which* of several equal tokens
    at the edge is kept may differ, and transformers' unstable sort leaves that open too.
    """
    kept = scores.clone()
    cut = top_p < 1
    narrow = ((scores > NO).sum(dim=-1) <= FEW) & (scores.shape[-1] > FEW)
    for chosen, width in ((cut & narrow, FEW), (cut & ~narrow, scores.shape[-1])):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            kept[rows] = keep_nucleus(scores[rows], top_p[rows], width)
    return kept


def keep_nucleus(scores: Tensor, top_p: Tensor, width: int) -> Tensor:
    """keep_top_p for rows whose tokens, but for the `width` largest, are all -inf."""
    if width < scores.shape[-1]:
        values, ids = (best.flip(-1) for best in scores.topk(width, dim=-1))
    else:
        values, ids = scores.sort(dim=-1)
    below = values.softmax(dim=-1).cumsum(dim=-1)  # a token's own probability and all smaller ones
    removed = below <= (1 - top_p).float()[:, None]
    removed[:, -1] = False  # the likeliest token always stays
    return scores.scatter(1, ids, values.masked_fill(removed, NO))


def keep_min_p(scores: Tensor, min_p: Tensor, _: float = 1.0) -> Tensor:
    """Keeps the tokens at least `min_p` times as likely as the likeliest, which itself stays."""
    probs = scores.softmax(dim=-1)
    least = min_p.float()[:, None] * probs.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probs < least, NO)


FILTERS = (
    Filter("top_k", off=0, keep=keep_top_k, narrow=Narrow.BUILT_IN),
    Filter("top_p", off=1, keep=keep_top_p, narrow=Narrow.BUILT_IN),
    Filter("min_p", off=0, keep=keep_min_p, narrow=Narrow.BUILT_IN),
)
"""In the order in which they apply. Built-in ones come first: SAME is over what they kept."""
