"""Numbers: integers out of words, and values times scales. Nothing here knows a format's names.

    weight[row, column] = (value[row, column] - zero[row's block, column's block]) * scale[same]

computed in float32 and rounded once, to the dtype that is served. An integer of 8 bits less another,
times a scale of 16 bits, is exact in float32.
"""

from collections.abc import Sequence

import torch

from baton.quantized.scheme import Block

WORD = 32  # bits
NUMBERS_AT_ONCE = 1 << 22
"""Floats of one step: they come beside what is kept."""


def unpacked(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """uint8 [rows, words * 32 / bits] out of int32 [rows, words], the lowest bits first. `order`: where
    among its word's numbers each belongs, if not in turn."""
    each = WORD // bits
    found = torch.empty((words.shape[0], words.shape[1], each), dtype=torch.uint8)
    for place, number in enumerate(order or range(each)):
        found[:, :, number] = (words >> (place * bits)) & ((1 << bits) - 1)
    return found.view(words.shape[0], -1)


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
    if index is None and block.columns is not None:
        index = torch.arange(columns) // block.columns
    step = max(1, NUMBERS_AT_ONCE // max(1, columns))
    for begin in range(0, rows, step):
        these = torch.arange(begin, min(begin + step, rows))
        row_blocks = torch.zeros_like(these) if block.rows is None else these // block.rows
        numbers = values[begin : begin + step].float()
        zero = _spread(zeros, row_blocks, index) if isinstance(zeros, torch.Tensor) else zeros
        found[begin : begin + step] = (numbers - zero) * _spread(scales, row_blocks, index)
    return found


def _spread(
    numbers: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None
) -> torch.Tensor:
    some = numbers[rows].float()
    return some if columns is None else some[:, columns]
