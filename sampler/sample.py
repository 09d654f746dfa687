"""Logits to token ids: pure batched functions, each row with its own parameters.

    logits -> allowed mask, allowed ids and forbidden ids -> logit_bias
           -> repetition penalty -> frequency and presence penalty
           -> temperature -> top_k -> top_p -> min_p -> draw

The order is vLLM's up to the temperature (shape.py) and transformers' after it. Each step that
transformers has gives what its processor gives on the same logits (CPU: the same bits), filtered
tokens being -inf. No step mutates its input or looks across rows: a row's token depends on its
logits, its parameters, what it may draw now and (seed, choice, position), never on its neighbours,
on the batch size, or on what was drawn before.

Shapes: logits float [rows, vocab]; every per-row parameter [rows]. All arithmetic is float32 (or
wider), whatever type the logits have.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sampler.narrow import (
    FEW,
    filtered_few,
    largest,
    likeliest,
    nucleus_few,
    tied,
    total_weight,
)
from sampler.params import SamplingParams
from sampler.race import draw, draw_from
from sampler.shape import NO, Shape, build_shape, shaped

PER_ROW = (
    "greedy",
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "seed",
    "choice",
    "position",
)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The parameters of a step's rows, on the device. Greedy rows hold neutral values.

    The plain fields say, without asking the device, which work no row needs.
    """

    greedy: Tensor  # bool [rows]
    temperature: Tensor  # float64 [rows], like the next two
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor  # int64 [rows], like the next three; 0: off
    seed: Tensor
    choice: Tensor
    position: Tensor
    shape: Shape | None  # None: every row takes its logits as they are
    all_greedy: bool
    largest_top_k: int  # 0: nobody filters by top_k
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def build(
        cls,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        seen: Sequence[Collection[int]],
        device: torch.device | str,
        *,
        generated: Sequence[Sequence[int]] | None = None,
        forbidden: Sequence[Collection[int]] | None = None,
        masks: Sequence[bytes | None] | None = None,
    ) -> "SamplingBatch":
        """One entry per row. `positions[i]`: how many tokens (prompt and generated) stand before
        the one to draw, so a resumed run draws the same numbers. `seen[i]`: those tokens, repeats
        or not; read only where the repetition penalty is not 1, elsewhere it may be empty.

        `generated[i]`: the tokens generated so far, with repeats; read only where the frequency or
        presence penalty is not 0. `forbidden[i]`: ids that must not be drawn now. `masks[i]`: the
        ids that may, or None for all of them: bit i of the little-endian 32-bit words allows id i,
        as llguidance's `LLMatcher.compute_bitmask()` has it; ids past its end are not allowed."""
        _check_rows(params, positions, seen, generated, forbidden, masks)
        neutral = SamplingParams()
        drawn = [neutral if p.greedy else p for p in params]
        real = partial(torch.tensor, dtype=torch.float64, device=device)
        whole = partial(torch.tensor, dtype=torch.int64, device=device)
        return cls(
            greedy=torch.tensor([p.greedy for p in params], dtype=torch.bool, device=device),
            temperature=real([d.temperature for d in drawn]),
            top_p=real([d.top_p for d in drawn]),
            min_p=real([d.min_p for d in drawn]),
            top_k=whole([d.top_k for d in drawn]),
            seed=whole([d.seed for d in drawn]),
            choice=whole([d.choice for d in drawn]),
            position=whole(positions),
            shape=build_shape(params, seen, generated, forbidden, masks, device),
            all_greedy=all(p.greedy for p in params),
            largest_top_k=max((d.top_k for d in drawn), default=0),
            any_top_p=any(d.top_p < 1 for d in drawn),
            any_min_p=any(d.min_p > 0 for d in drawn),
        )

    def of(self, rows: Tensor) -> "SamplingBatch":
        """The same for some of the rows, whose logits are shaped already."""
        return replace(
            self,
            shape=None,
            **{name: getattr(self, name)[rows] for name in PER_ROW},
        )


def _check_rows(
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    seen: Sequence[Collection[int]],
    *optional: Sequence[object] | None,
) -> None:
    if not len(params) == len(positions) == len(seen):
        raise ValueError(
            "params, positions and seen must have one entry per row, got "
            f"{len(params)}, {len(positions)} and {len(seen)}"
        )
    for name, given in zip(("generated", "forbidden", "masks"), optional, strict=True):
        if given is not None and len(given) != len(params):
            raise ValueError(
                f"{name} must have one entry per row or be None, got {len(given)} entries for "
                f"{len(params)} rows"
            )


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The next token of each row: int64 [rows]. Greedy rows take the largest shaped logit (the
    lowest id among equals); a batch of such rows costs one argmax."""
    return _sample(shaped(logits, batch.shape), batch)[0]


def sample_finite(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether the row could be sampled at all: False where its
    logits are not sound (see finite_rows) or nothing that they allow is left to be drawn. Where
    no logit was touched, the look at the largest tells both."""
    scores = shaped(logits, batch.shape)
    tokens, highest = _sample(scores, batch)
    if batch.shape is None:
        return tokens, highest.isfinite()
    return tokens, finite_rows(logits) & (highest > NO)


def _sample(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Each row's token and its largest score."""
    highest, best = likeliest(scores)
    if batch.all_greedy:
        return best, highest
    tokens, left = best.clone(), ~batch.greedy
    few = left & (batch.top_k > 0) & (batch.top_k <= FEW)
    ways = [(few, _draw_few)]
    if (batch.any_top_p or batch.any_min_p) and scores.shape[-1] > FEW:
        filters = (batch.top_p < 1) | (batch.min_p > 0)
        ways.append((left & (batch.top_k == 0) & filters, _draw_nucleus))
    for chosen, way in ways:
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            tokens[rows], sure = way(_some(scores, rows), batch.of(rows))
            left[rows] = ~sure
    wide = left.nonzero()[:, 0]
    if len(wide):
        some = batch.of(wide)
        tokens[wide] = draw(
            filtered(_some(scores, wide), some), some.seed, some.choice, some.position
        )
    return tokens, highest


def _some(scores: Tensor, rows: Tensor) -> Tensor:
    """Without a copy if it is all of them."""
    return scores if len(rows) == len(scores) else scores[rows]


def _draw_few(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens of rows that top_k leaves few, and whether each is sure: not if more tokens than top_k
    stay because they are equal to the last, which the wide way alone can tell."""
    count = min(int(batch.top_k.max()), scores.shape[-1])
    top_k = batch.top_k.clamp(max=count)
    values, ids = largest(scores, min(count + 1, scores.shape[-1]))
    kept = filtered_few(values, batch.temperature, top_k, batch.top_p, batch.min_p)
    token = draw_from(ids, kept, scores.shape[-1], batch.seed, batch.choice, batch.position)
    return token, ~tied(values, top_k)


def _draw_nucleus(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens of rows that top_p or min_p may leave few, and whether each is sure: not if it leaves
    more, or if a token is so close to the edge that the wide way alone can tell its side."""
    values, ids = largest(scores, FEW)
    values = apply_temperature(values, batch.temperature)
    total = total_weight(apply_temperature(scores, batch.temperature), values[:, 0])
    kept, sure = nucleus_few(values, total, batch.top_p, batch.min_p)
    tokens, rows = ids[:, 0].clone(), sure.nonzero()[:, 0]
    if len(rows):
        width = int((kept[rows] > NO).sum(dim=-1).amax())  # what is left to race
        counters = (batch.seed[rows], batch.choice[rows], batch.position[rows])
        tokens[rows] = draw_from(ids[rows, :width], kept[rows, :width], scores.shape[-1], *counters)
    return tokens, sure


def filtered(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What rows that are not greedy draw from: scores float32 [rows, vocab], -inf where filtered."""
    scores = apply_temperature(logits, batch.temperature)
    if batch.largest_top_k:
        scores = keep_top_k(scores, batch.top_k, largest=batch.largest_top_k)
    if batch.any_top_p:
        scores = keep_top_p(scores, batch.top_p)
    if batch.any_min_p:
        scores = keep_min_p(scores, batch.min_p)
    return scores


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits / temperature.float()[:, None]


def keep_top_k(logits: Tensor, top_k: Tensor, *, largest: int) -> Tensor:
    """Keeps what is not below the row's k-th largest logit, so equals of the k-th stay too; 0 keeps
    all. `largest`: the biggest k of the batch."""
    best = logits.topk(min(largest, logits.shape[-1]), dim=-1).values
    kth = best.gather(1, (top_k[:, None] - 1).clamp(0, best.shape[-1] - 1))
    return logits.masked_fill((logits < kth) & (top_k[:, None] > 0), NO)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach `top_p` (float64, so that
    1 - top_p rounds as transformers' does); 1 keeps all.

    Sorting a vocabulary is the dearest step by far (1.6 ms a row of 50,257 on two Zen 5 cores, ten
    times the others together), so a row that top_k has left few tokens sorts only those. A row's
    own tokens decide its way. Both ways keep the same values; only *which* of several equal tokens
    at the edge is kept may differ, and transformers' unstable sort leaves that open too.
    """
    kept = logits.clone()
    cut = top_p < 1
    narrow = ((logits > NO).sum(dim=-1) <= FEW) & (logits.shape[-1] > FEW)
    for chosen, width in ((cut & narrow, FEW), (cut & ~narrow, logits.shape[-1])):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            kept[rows] = _keep_nucleus(logits[rows], top_p[rows], width)
    return kept


def _keep_nucleus(logits: Tensor, top_p: Tensor, width: int) -> Tensor:
    """keep_top_p for rows whose tokens, but for the `width` largest, are all -inf."""
    if width < logits.shape[-1]:
        values, ids = (best.flip(-1) for best in logits.topk(width, dim=-1))
    else:
        values, ids = logits.sort(dim=-1)
    below = values.softmax(dim=-1).cumsum(dim=-1)  # a token's own probability and all smaller ones
    removed = below <= (1 - top_p).float()[:, None]
    removed[:, -1] = False  # the likeliest token always stays
    return logits.scatter(1, ids, values.masked_fill(removed, NO))


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Keeps the tokens at least `min_p` times as likely as the likeliest, which itself stays."""
    probs = logits.softmax(dim=-1)
    least = min_p.float()[:, None] * probs.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probs < least, NO)


def finite_rows(logits: Tensor) -> Tensor:
    """bool [rows]: False where a row cannot be sampled: a NaN, a +inf, or nothing but -inf."""
    return logits.amax(dim=-1).isfinite()
