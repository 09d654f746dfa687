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

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sampler.copies import down, free_to_read, up
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
class Ways:
    """The rows that are drawn, by the way that each takes first: numbers on the host, and as one tensor
    in this order."""

    few: tuple[int, ...]  # with a small top_k
    nucleus: tuple[int, ...]  # top_p or min_p may leave few tokens
    wide: tuple[int, ...]  # all others
    order: Tensor  # int64 [rows of all ways]


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
    given: dict[str, tuple[float, ...]]  # `values` on the host
    ways: Ways

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
        vocab: int | None = None,
    ) -> "SamplingBatch":
        """All arguments have one entry per row; ValueError otherwise. `positions[i]`: the number of
        tokens (prompt and generated) before the one to draw, so a resumed run draws the same
        numbers. `seen[i]`: those tokens, with or without repeats; may be empty if the repetition
        penalty is 1.

        `generated[i]`: the tokens generated so far, with repeats; required if the frequency or
        presence penalty is not 0. `forbidden[i]`: ids that must not be drawn now. `masks[i]`: the
        allowed ids, None for all: bit i of the little-endian 32-bit words allows id i, as in
        llguidance's `LLMatcher.compute_bitmask()`; ids past its end are not allowed. `vocab`: the width
        of the logits, if it is known: then ids beyond it are left out here, and sampling never waits
        for the device to find them."""
        _check_rows(params, positions, seen, generated, forbidden, masks)
        neutral = SamplingParams()
        drawn = [neutral if p.greedy else p for p in params]
        wanted = {each.name: tuple([getattr(d, each.name) for d in drawn]) for each in FILTERS}
        active = tuple(f for f in FILTERS if any(value != f.off for value in wanted[f.name]))
        whole = partial(torch.tensor, dtype=torch.int64)
        greedy = [p.greedy for p in params]
        batch = cls(
            greedy=torch.tensor(greedy, dtype=torch.bool),
            temperature=torch.tensor([d.temperature for d in drawn], dtype=torch.float64),
            values={each.name: torch.tensor(wanted[each.name], dtype=each.dtype)
                    for each in FILTERS},
            seed=whole([d.seed for d in drawn]),
            choice=whole([d.choice for d in drawn]),
            position=whole(positions),
            shape=build_shape(params, seen, generated, forbidden, masks, vocab),
            all_greedy=all(greedy),
            active=active,
            largest={each.name: max(wanted[each.name]) for each in active},
            given=wanted,
            ways=arranged(greedy, wanted, active),
        )  # fmt: skip
        return up(batch, device)

    def of(self, rows: Sequence[int], index: Tensor) -> "SamplingBatch":
        """The parameters of some of the rows, whose logits are shaped already; the same rows as int64 on
        the device. It has no `ways`."""
        if len(rows) == len(self.greedy):
            return replace(self, shape=None)
        given = {name: tuple([of[row] for row in rows]) for name, of in self.given.items()}
        active = tuple(f for f in self.active if any(value != f.off for value in given[f.name]))
        return replace(
            self,
            shape=None,
            values={name: of.index_select(0, index) for name, of in self.values.items()},
            active=active,
            largest={each.name: max(given[each.name]) for each in active},
            given=given,
            **{name: getattr(self, name).index_select(0, index) for name in PER_ROW},
        )


def arranged(
    greedy: Sequence[bool], given: dict[str, tuple[float, ...]], active: Iterable[Filter]
) -> Ways:
    """Which row takes which way."""
    few: list[int] = []
    nucleus: list[int] = []
    wide: list[int] = []
    never = [(given[each.name], each.off) for each in active if each.narrow is Narrow.NEVER]
    rows = zip(given["top_k"], given["top_p"], given["min_p"], strict=True)
    for row, (top_k, top_p, min_p) in enumerate(rows):
        if greedy[row]:
            continue
        if any(values[row] != off for values, off in never):
            wide.append(row)
        elif 0 < top_k <= FEW:
            few.append(row)
        else:
            (nucleus if top_k == 0 and (top_p < 1 or min_p > 0) else wide).append(row)
    order = torch.tensor([*few, *nucleus, *wide], dtype=torch.int64)
    return Ways(tuple(few), tuple(nucleus), tuple(wide), order)


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
    return _settled(launch(logits, batch), batch)


def sample_finite(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether it is valid, bool [rows]: False if the row's logits are
    not finite (finite_rows) or all allowed tokens are -inf. If no logit was changed, the largest one
    decides both."""
    drawn = launch(logits, batch)
    return _settled(drawn, batch), drawn.valid


@dataclass(frozen=True, slots=True)
class Drawn:
    """What launch() has begun, on the device."""

    scores: Tensor  # float32 [rows, vocab]: the shaped logits
    tokens: Tensor  # int64 [rows]
    valid: Tensor  # bool [rows]
    sure: (
        Tensor | None
    )  # bool [rows]: False where the token is still to be drawn; None: all are sure


def launch(logits: Tensor, batch: SamplingBatch) -> Drawn:
    """Draw each row's token in the way that it takes first, without waiting for the device. Where that
    way cannot decide, which is rare, `sure` is False, and redrawn() gives the token."""
    scores = shaped(logits, batch.shape)
    highest, tokens = likeliest(scores)
    sound = highest.isfinite() if batch.shape is None else finite_rows(logits) & (highest > NO)
    if batch.all_greedy:
        return Drawn(scores, tokens, sound, None)
    ways, tokens, sure, start = batch.ways, tokens.clone(), None, 0
    nucleus, wide = ways.nucleus, ways.wide
    if scores.shape[-1] <= FEW:
        nucleus, wide = (), (*nucleus, *wide)
    first: tuple[tuple[tuple[int, ...], Way], ...] = (
        (ways.few, _draw_few), (nucleus, _draw_nucleus), (wide, _draw_wide)
    )  # fmt: skip
    for rows, way in first:
        if not rows:
            continue
        index = ways.order[start : start + len(rows)]
        start += len(rows)
        found, certain = way(_some(scores, index), batch.of(rows, index))
        if len(rows) == len(scores):  # neither was put into the order of `index`
            return Drawn(scores, found, sound, certain)
        tokens.index_copy_(0, index, found)
        if certain is not None:
            sure = torch.ones_like(sound) if sure is None else sure
            sure.index_copy_(0, index, certain)
    return Drawn(scores, tokens, sound, sure)


def redrawn(drawn: Drawn, batch: SamplingBatch, rows: Sequence[int]) -> Tensor:
    """All tokens, with those of `rows` drawn from the whole vocabulary."""
    if not rows:
        return drawn.tokens
    index = up(torch.tensor(rows), drawn.tokens.device)
    found, _ = _draw_wide(_some(drawn.scores, index), batch.of(rows, index))
    return drawn.tokens.index_copy(0, index, found)


def _settled(drawn: Drawn, batch: SamplingBatch) -> Tensor:
    """All tokens. Waits for the device if not all rows may be sure."""
    return drawn.tokens if drawn.sure is None else redrawn(drawn, batch, unsure(drawn.sure))


def unsure(sure: Tensor) -> list[int]:
    """The rows that are not, from bool [rows]; waits for it."""
    return [row for row, certain in enumerate(down([sure])[0].tolist()) if not certain]


def _same(batch: SamplingBatch) -> list[Filter]:
    """The active filters that the narrow path applies by their own function."""
    return [each for each in batch.active if each.narrow is Narrow.SAME]


def _some(scores: Tensor, index: Tensor) -> Tensor:
    """These rows, without a copy if they are all."""
    return scores if len(index) == len(scores) else scores.index_select(0, index)


Way = Callable[[Tensor, SamplingBatch], tuple[Tensor, Tensor | None]]
"""Scores [rows, vocab] and their parameters to tokens [rows], and whether each is certain (None: all)."""


def _draw_wide(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, None]:
    """Tokens drawn from the whole vocabulary."""
    kept = filtered(scores, batch)
    return draw(kept, batch.seed, batch.choice, batch.position), None


def _draw_few(scores: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens of rows with a small top_k, and whether each is certain. Not if tokens beyond top_k stay
    because they equal the last one: that needs the full path."""
    given = batch.values
    count = min(int(max(batch.given["top_k"])), scores.shape[-1])
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
    if not free_to_read(scores):  # all rows at their full width rather than a wait
        left = keep(kept, batch, _same(batch))
        drawn = draw_from(ids, left, scores.shape[-1], batch.seed, batch.choice, batch.position)
        return drawn, sure
    tokens, index = ids[:, 0].clone(), sure.nonzero()[:, 0]
    if len(index):
        width = int((kept[index] > NO).sum(dim=-1).amax())  # tokens that are left
        some = batch.of(index.tolist(), index)
        left = keep(kept[index, :width], some, _same(some))
        counters = (some.seed, some.choice, some.position)
        tokens[index] = draw_from(ids[index, :width], left, scores.shape[-1], *counters)
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
