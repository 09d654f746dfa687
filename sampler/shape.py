"""Shaping: the changes to logits before temperature. Greedy rows choose from the result too.

    allowed mask, allowed ids and forbidden ids -> logit_bias
        -> repetition penalty -> frequency and presence penalty

The order is vLLM's. No step mutates its input, and rows are independent. Ids past the vocabulary are
ignored, as in transformers: an embedding may be wider than the head.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sampler.copies import free_to_read
from sampler.params import SamplingParams

NO = float("-inf")
INFINITE = 2**62  # no token id is as large
# [256, 8]: upper limits of eight logits, by the byte of the mask; bit i allows token i.
LIMITS = torch.where(((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool(), -NO, NO)


@dataclass(frozen=True, slots=True)
class Masks:
    """Rows restricted by a bit mask over the vocabulary."""

    rows: Tensor  # int64 [n], ascending
    bits: Tensor  # uint8 [n, bytes]: bit i of byte j allows token 8 * j + i


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows restricted to listed ids."""

    rows: Tensor  # int64 [n], ascending
    at: Tensor  # int64 [2, m]: (index in `rows`, token id)


@dataclass(frozen=True, slots=True)
class Additions:
    """Amounts that are added to single logits."""

    at: Tensor  # int64 [2, n]: (row, token id), without repeats
    amounts: Tensor  # float32 [n]


@dataclass(frozen=True, slots=True)
class Repetition:
    """The input of the repetition penalty."""

    seen: Tensor  # int64 [2, n]: (row, token id), with or without repeats
    penalty: Tensor  # float64 [rows]


@dataclass(frozen=True, slots=True)
class Shape:
    """The changes to a step's logits, on the device. None: no row needs the change."""

    masks: Masks | None
    allowed: Allowed | None
    bias: Additions | None  # forbidden ids too: a bias of -inf
    repetition: Repetition | None
    frequency: Additions | None  # and presence
    inside: bool = False  # all ids are known to be within the vocabulary


def build_shape(
    params: Sequence[SamplingParams],
    seen: Sequence[Collection[int]],
    generated: Sequence[Sequence[int]] | None,
    forbidden: Sequence[Collection[int]] | None,
    masks: Sequence[bytes | None] | None,
    vocab: int | None,
) -> Shape | None:
    """Takes the arguments of SamplingBatch.build; all tensors are on the CPU. None if no row changes its
    logits. ValueError if `generated` is missing for a row with a frequency or presence penalty."""
    end = INFINITE if vocab is None else vocab
    shape = Shape(
        masks=None if masks is None else _masks(masks),
        allowed=_allowed(params, end),
        bias=_additions(_biases(params, forbidden), end),
        repetition=_repetition(params, seen, end),
        frequency=_additions(_repeats(params, generated), end),
        inside=vocab is not None,
    )
    parts = (shape.masks, shape.allowed, shape.bias, shape.repetition, shape.frequency)
    return None if all(part is None for part in parts) else shape


def _masks(masks: Sequence[bytes | None]) -> Masks | None:
    given = {row: mask for row, mask in enumerate(masks) if mask is not None}
    if not given:
        return None
    width = max(1, *map(len, given.values()))  # frombuffer() rejects an empty buffer
    together = bytearray(b"".join(mask.ljust(width, b"\0") for mask in given.values()))
    bits = torch.frombuffer(together, dtype=torch.uint8).view(len(given), width)
    return Masks(torch.tensor(list(given)), bits)


def _allowed(params: Sequence[SamplingParams], end: int) -> Allowed | None:
    """Of the ids below `end`, as in the next functions."""
    given = {
        row: [token for token in p.allowed_token_ids if token < end]
        for row, p in enumerate(params)
        if p.allowed_token_ids
    }
    if not given:
        return None
    pairs = [[place for place, ids in enumerate(given.values()) for _ in ids]]
    pairs.append([token for ids in given.values() for token in ids])
    return Allowed(torch.tensor(list(given)), torch.tensor(pairs, dtype=torch.int64))


def _biases(
    params: Sequence[SamplingParams], forbidden: Sequence[Collection[int]] | None
) -> dict[int, Mapping[int, float]]:
    biases: dict[int, Mapping[int, float]] = {
        row: dict(p.logit_bias) for row, p in enumerate(params) if p.logit_bias
    }
    for row, ids in enumerate(forbidden or ()):
        if ids:
            biases[row] = {**biases.get(row, {}), **dict.fromkeys(ids, NO)}
    return biases


def _repeats(
    params: Sequence[SamplingParams], generated: Sequence[Sequence[int]] | None
) -> dict[int, Mapping[int, float]]:
    repeats: dict[int, Mapping[int, float]] = {}
    for row, p in enumerate(params):
        if p.frequency_penalty or p.presence_penalty:
            if generated is None:
                raise ValueError(
                    "generated must be given where presence_penalty or frequency_penalty is not 0, "
                    f"got None and such a penalty for row {row}"
                )
            counts = Counter(generated[row]).items()
            repeats[row] = {
                token: -(count * p.frequency_penalty + p.presence_penalty)
                for token, count in counts
            }
    return repeats


def _additions(wanted: Mapping[int, Mapping[int, float]], end: int) -> Additions | None:
    found = [
        (row, token, amount)
        for row, amounts in wanted.items()
        for token, amount in amounts.items()
        if token < end
    ]
    if not found:
        return None
    rows, tokens, amounts = zip(*found, strict=True)
    at = torch.tensor([rows, tokens], dtype=torch.int64)
    return Additions(at, torch.tensor(amounts, dtype=torch.float32))


def _repetition(
    params: Sequence[SamplingParams], seen: Sequence[Collection[int]], end: int
) -> Repetition | None:
    penalised = [row for row, p in enumerate(params) if p.repetition_penalty != 1]
    if not penalised:
        return None
    ids = [[token for token in seen[row] if token < end] for row in penalised]
    pairs = [[row for row, of in zip(penalised, ids, strict=True) for _ in of]]
    pairs.append([token for of in ids for token in of])
    penalty = [p.repetition_penalty for p in params]
    return Repetition(
        torch.tensor(pairs, dtype=torch.int64), torch.tensor(penalty, dtype=torch.float64)
    )


def shaped(logits: Tensor, shape: Shape | None) -> Tensor:
    """All changes in order: float32 [rows, vocab], -inf for tokens that must not be drawn."""
    scores = logits.float()
    if shape is None:
        return scores
    within = shape.inside
    if shape.masks:
        scores = keep_allowed(scores, shape.masks)
    if shape.allowed:
        scores = keep_only(scores, shape.allowed, inside=within)
    if shape.bias:
        scores = add(scores, shape.bias, inside=within)
    if shape.repetition:
        seen, penalty = shape.repetition.seen, shape.repetition.penalty
        scores = apply_repetition_penalty(scores, seen, penalty, inside=within)
    if shape.frequency:
        scores = add(scores, shape.frequency, inside=within)
    return scores


def keep_allowed(logits: Tensor, masks: Masks) -> Tensor:
    """Keeps the ids that a row's mask allows; ids past the end of the mask are not allowed.

    A lookup per byte and one minimum are cheaper than a boolean mask on a CPU.
    """
    vocab = logits.shape[-1]
    bits = pad(masks.bits, (0, -(-vocab // 8) - masks.bits.shape[-1]))  # a negative width truncates
    if free_to_read(logits):
        kept = LIMITS.index_select(0, bits.flatten().int())
    else:  # the table is on the CPU
        single = (bits.flatten()[:, None] >> torch.arange(8, device=bits.device)) & 1
        kept = torch.where(single.bool(), -NO, NO)
    kept = kept.view(len(bits), -1)[:, :vocab]
    everywhere = len(bits) == len(logits)
    # In place: for large tensors new memory costs more than the arithmetic.
    mine = logits if everywhere else logits.index_select(0, masks.rows)
    torch.minimum(mine, kept, out=kept)
    return kept if everywhere else logits.index_copy(0, masks.rows, kept)


# With `inside` all ids are within the vocabulary. To leave out others the host waits for the device.


def single(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """[n]: these logits of [rows, vocab]."""
    return logits.reshape(-1).index_select(0, rows * logits.shape[-1] + tokens)


def keep_only(logits: Tensor, allowed: Allowed, *, inside: bool = False) -> Tensor:
    """Keeps a row's allowed ids."""
    rows = logits.index_select(0, allowed.rows)
    places, tokens = allowed.at if inside else allowed.at[:, allowed.at[1] < logits.shape[-1]]
    kept = torch.full_like(rows, NO).index_put((places, tokens), single(rows, places, tokens))
    return logits.index_copy(0, allowed.rows, kept)


def add(logits: Tensor, additions: Additions, *, inside: bool = False) -> Tensor:
    (rows, tokens), amounts = additions.at, additions.amounts
    if not inside:
        known = tokens < logits.shape[-1]
        rows, tokens, amounts = rows[known], tokens[known], amounts[known]
    return logits.index_put((rows, tokens), single(logits, rows, tokens) + amounts)


def apply_repetition_penalty(
    logits: Tensor, seen: Tensor, penalty: Tensor, *, inside: bool = False
) -> Tensor:
    """Makes each (row, token id) pair of `seen` [2, n] less likely, once even if it is repeated: a
    negative logit is multiplied by the row's penalty, any other is divided by it."""
    rows, tokens = seen if inside else seen[:, seen[1] < logits.shape[-1]]
    old, factor = single(logits, rows, tokens), penalty.float().index_select(0, rows)
    return logits.index_put((rows, tokens), torch.where(old < 0, old * factor, old / factor))
