"""Numbers: integers out of words, and values times scales. Nothing here knows a format's names.

    weight[row, column] = (value[row, column] - zero[row's block, column's block]) * scale[same]

computed in float32 and rounded once, to the dtype that is served. An integer of 8 bits less another,
times a scale of 16 bits, is exact in float32.
"""

from collections.abc import Sequence

import torch

from baton.quantized.scheme import Block

WORD, BYTE = 32, 8  # bits
NUMBERS_AT_ONCE = 1 << 22
"""Floats of one step: they come beside what is kept."""


def unpacked(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """uint8 [rows, words * 32 / bits] out of int32 [rows, words], the lowest bits first. `order`: where
    among its word's numbers each belongs, if not in turn. `bits`: 2, 4 or 8."""
    parts = words.contiguous().view(
        torch.uint8
    )  # the lowest byte first, as on every CPU that is served
    if bits < BYTE:
        mask = (1 << bits) - 1
        parts = torch.stack([(parts >> shift) & mask for shift in range(0, BYTE, bits)], -1)
    if order is not None:
        places = torch.tensor([order.index(number) for number in range(WORD // bits)])
        parts = parts.view(*words.shape, WORD // bits)[:, :, places]
    return parts.reshape(words.shape[0], -1)


def ones_added(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words whose numbers are one more. A carry goes into the next number, as the borrow did."""
    one = sum(1 << shift for shift in range(0, WORD, bits))
    return (words.long() + one).to(torch.int32)  # the low 32 bits


def restored(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | int,
    *,
    block: Block,
    index: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix [rows, columns] of `dtype`. `scales`, and `zeros` if there are several: [row blocks,
    column blocks]. `index`: the column block of each column, if not in turn. IndexError for one that is
    not there."""
    rows, columns = values.shape
    found = torch.empty((rows, columns), dtype=dtype)
    each = columns if block.columns is None else block.columns
    if index is None and columns % each:
        index = torch.arange(columns) // each
    step = max(1, NUMBERS_AT_ONCE // max(1, columns))
    for begin in range(0, rows, step):
        these = torch.arange(begin, min(begin + step, rows))
        row_blocks = torch.zeros_like(these) if block.rows is None else these // block.rows
        numbers = values[begin : begin + step].float()
        if index is None:  # without a copy of each scale for each of its columns
            numbers = numbers.reshape(len(these), columns // each, each)
        zero = _spread(zeros, row_blocks, index) if isinstance(zeros, torch.Tensor) else zeros
        some = (numbers - zero).mul_(_spread(scales, row_blocks, index))
        found[begin : begin + step] = some.view(len(these), columns)
    return found


def _spread(
    numbers: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None
) -> torch.Tensor:
    """For each row, [groups, 1]; with `columns` for each number."""
    some = numbers[rows].float()
    return some[:, :, None] if columns is None else some[:, columns]
