"""Logits to token ids: pure batched functions, each row with its own parameters.

    logits -> allowed mask, allowed ids and forbidden ids -> logit_bias
           -> repetition penalty -> frequency and presence penalty
           -> temperature -> filters, in the order of FILTERS (filters.py) -> draw

The order is vLLM's up to the temperature (shape.py) and transformers' after it. Each step that
transformers has equals its processor on the same logits (on a CPU with the same bits); filtered tokens
are -inf. No step mutates its input, and rows are independent: a row's token depends on its logits, its
parameters, its allowed tokens and (seed, choice, position), but not on other rows, the batch size or
earlier draws.

Shapes: logits float [rows, vocab]; every per-row parameter [rows]. All arithmetic is float32 (or
wider), whatever type the logits have.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sampler.filters import FEW, FILTERS, Filter, Narrow
from sampler.narrow import (
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

PER_ROW = ("greedy", "temperature", "seed", "choice", "position")


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The parameters of a step's rows, on the device. Greedy rows have neutral values.

    The fields that are not tensors show, without a device synchronisation, which work can be skipped.
    """

    greedy: Tensor  # bool [rows]
    temperature: Tensor  # float64 [rows]
    values: dict[str, Tensor]  # by filter: [rows]
    seed: Tensor  # int64 [rows], like the next two
    choice: Tensor
    position: Tensor
    shape: Shape | None  # None: no row changes its logits
    all_greedy: bool
    active: tuple[Filter, ...]  # the filters that some row uses, in their order
    largest: dict[str, float]  # by active filter: the largest value of all rows

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
        """All arguments have one entry per row; ValueError otherwise. `positions[i]`: the number of
        tokens (prompt and generated) before the one to draw, so a resumed run draws the same
        numbers. `seen[i]`: those tokens, with or without repeats; may be empty if the repetition
        penalty is 1.

        `generated[i]`: the tokens generated so far, with repeats; required if the frequency or
        presence penalty is not 0. `forbidden[i]`: ids that must not be drawn now. `masks[i]`: the
        allowed ids, None for all: bit i of the little-endian 32-bit words allows id i, as in
        llguidance's `LLMatcher.compute_bitmask()`; ids past its end are not allowed."""
        _check_rows(params, positions, seen, generated, forbidden, masks)
        neutral = SamplingParams()
        drawn = [neutral if p.greedy else p for p in params]
        wanted = {each.name: [getattr(d, each.name) for d in drawn] for each in FILTERS}
        active = tuple(f for f in FILTERS if any(value != f.off for value in wanted[f.name]))
        whole = partial(torch.tensor, dtype=torch.int64, device=device)
        return cls(
            greedy=torch.tensor([p.greedy for p in params], dtype=torch.bool, device=device),
            temperature=torch.tensor(
                [d.temperature for d in drawn], dtype=torch.float64, device=device
            ),
            values={
                each.name: torch.tensor(wanted[each.name], dtype=each.dtype, device=device)
                for each in FILTERS
            },
            seed=whole([d.seed for d in drawn]),
            choice=whole([d.choice for d in drawn]),
            position=whole(positions),
            shape=build_shape(params, seen, generated, forbidden, masks, device),
            all_greedy=all(p.greedy for p in params),
            active=active,
            largest={each.name: max(wanted[each.name]) for each in active},
        )

    def of(self, rows: Tensor) -> "SamplingBatch":
        """The parameters of some of the rows, whose logits are shaped already."""
        return replace(
            self,
            shape=None,
            values={name: values[rows] for name, values in self.values.items()},
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
    """The next token of each row, int64 [rows], from logits [rows, vocab]. Greedy rows take the largest
    shaped logit (the lowest id among equals); a batch of only such rows costs one argmax."""
    return _sample(shaped(logits, batch.shape), batch)[0]


def sample_finite(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether it is valid, bool [rows]: False if the row's logits are
    not finite (finite_rows) or all allowed tokens are -inf. If no logit was changed, the largest one
    decides both."""
    scores = shaped(logits, batch.shape)
    tokens, highest = _sample(scores, batch)
    if batch.shape is None:
        return tokens, highest.isfinite()
    return tokens, finite_rows(logits) & (highest > NO)


def _sample(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Each row's token and largest score."""
    highest, best = likeliest(scores)
    if batch.all_greedy:
        return best, highest
    tokens, left = best.clone(), ~batch.greedy
    may = left  # rows that may take the narrow path
    for each in batch.active:
        if each.narrow is Narrow.NEVER:
            may = may & (batch.values[each.name] == each.off)
    top_k, active = batch.values["top_k"], [each.name for each in batch.active]
    ways = [(may & (top_k > 0) & (top_k <= FEW), _draw_few)]
    if ("top_p" in active or "min_p" in active) and scores.shape[-1] > FEW:
        cut = (batch.values["top_p"] < 1) | (batch.values["min_p"] > 0)
        ways.append((may & (top_k == 0) & cut, _draw_nucleus))
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


def _same(batch: SamplingBatch) -> list[Filter]:
    """The active filters that the narrow path applies by their own function."""
    return [each for each in batch.active if each.narrow is Narrow.SAME]


def _some(scores: Tensor, rows: Tensor) -> Tensor:
    """These rows, without a copy if they are all."""
    return scores if len(rows) == len(scores) else scores[rows]


def _draw_few(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens of rows with a small top_k, and whether each is certain. Not if tokens beyond top_k stay
    because they equal the last one: that needs the full path."""
    given = batch.values
    count = min(int(given["top_k"].max()), scores.shape[-1])
    top_k = given["top_k"].clamp(max=count)
    values, ids = largest(scores, min(count + 1, scores.shape[-1]))
    kept = filtered_few(values, batch.temperature, top_k, given["top_p"], given["min_p"])
    kept = keep(kept, batch, _same(batch))
    token = draw_from(ids, kept, scores.shape[-1], batch.seed, batch.choice, batch.position)
    return token, ~tied(values, top_k)


def _draw_nucleus(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens of rows in which top_p or min_p may leave few tokens, and whether each is certain. Not if
    more are left, or a token is so close to the edge that only the full path can decide."""
    values, ids = largest(scores, FEW)
    values = apply_temperature(values, batch.temperature)
    total = total_weight(apply_temperature(scores, batch.temperature), values[:, 0])
    kept, sure = nucleus_few(values, total, batch.values["top_p"], batch.values["min_p"])
    tokens, rows = ids[:, 0].clone(), sure.nonzero()[:, 0]
    if len(rows):
        width = int((kept[rows] > NO).sum(dim=-1).amax())  # tokens that are left
        left = kept[rows, :width]
        if same := _same(batch):
            left = keep(left, batch.of(rows), same)
        counters = (batch.seed[rows], batch.choice[rows], batch.position[rows])
        tokens[rows] = draw_from(ids[rows, :width], left, scores.shape[-1], *counters)
    return tokens, sure


def filtered(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The scores from which non-greedy rows draw: float32 [rows, vocab], -inf where filtered."""
    return keep(apply_temperature(logits, batch.temperature), batch, batch.active)


def keep(scores: Tensor, batch: SamplingBatch, filters: Iterable[Filter]) -> Tensor:
    """Scores [rows, n] after these filters, in their order."""
    for each in filters:
        scores = each.keep(scores, batch.values[each.name], batch.largest[each.name])
    return scores


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits / temperature.float()[:, None]


def finite_rows(logits: Tensor) -> Tensor:
    """bool [rows]: False for rows with a NaN or a +inf, or with only -inf."""
    return logits.amax(dim=-1).isfinite()
