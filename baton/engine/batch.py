"""Batch: rows of several sequences packed into one ragged forward of T tokens, no padding.

    rows        A: 3 tokens from 0       B: 1 token from 40       C: 2 tokens from 16
    input_ids   a0 a1 a2                 b40                      c16 c17             [1, T]
    offsets     0                        3                        4             6     [B + 1]
    contexts    3                        41                       18                  [B]

A token's slot is where its keys and values go: block * block_size + position within the block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.kv.row import Logits, Row


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward needs to know about its tokens, on the device and (`starts`, `lengths`) on
    the host, where the attention loop reads them without waiting for the device."""

    input_ids: torch.Tensor  # i64 [1, T]
    position_ids: torch.Tensor  # i64 [1, T]
    slots: torch.Tensor  # i64 [T]
    query_offsets: torch.Tensor  # i32 [B + 1]
    context_lengths: torch.Tensor  # i32 [B]: tokens of each sequence once these are in
    block_table: torch.Tensor  # i32 [B, max_blocks], short rows end in zeros
    logit_rows: torch.Tensor  # i64 [n]: which of the T tokens need logits
    starts: tuple[int, ...]  # [B]: position of each row's first token
    lengths: tuple[int, ...]  # [B]: tokens of each row


@dataclass(frozen=True, slots=True)
class Packed:
    """The same in lists, before they go to a device."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    logit_rows: list[int]
    offsets: list[int]
    contexts: list[int]
    table: list[int]  # rows of `width`, one after another
    width: int


def lay(rows: Sequence[Row], block_size: int, width: int | None = None) -> Packed:
    """The rows side by side, in their order. `width`: of the block table, cut to it; None: as wide
    as the longest row needs. Rows of one token go a way of their own, which takes a third off a
    decode step's."""
    assert rows, "a forward needs at least one row"
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    offsets, contexts, used = [0], [], []
    for row in rows:
        start, tokens, blocks = row.start, len(row.token_ids), row.blocks
        end = start + tokens
        assert tokens, "a row needs at least one token"
        assert end <= len(blocks) * block_size, f"{len(blocks)} blocks for {end} tokens"
        if row.logits is not Logits.NONE:
            first = len(ids) if row.logits is Logits.ALL else len(ids) + tokens - 1
            logit_rows.extend(range(first, len(ids) + tokens))
        ids.extend(row.token_ids)
        if tokens == 1:
            positions.append(start)
            slots.append(blocks[start // block_size] * block_size + start % block_size)
        else:
            span = range(start, end)
            positions.extend(span)
            slots.extend([blocks[p // block_size] * block_size + p % block_size for p in span])
        offsets.append(len(ids))
        contexts.append(end)
        used.append(-(-end // block_size))
    width = max(used) if width is None else width
    table: list[int] = []
    for row, needed in zip(rows, used, strict=True):
        count = min(needed, width)
        table.extend(row.blocks[:count])
        table.extend([0] * (width - count))
    return Packed(ids, positions, slots, logit_rows, offsets, contexts, table, width)


def pack(rows: Sequence[Row], block_size: int, device: torch.device) -> Batch:
    """Lay the rows side by side on the device."""
    laid = lay(rows, block_size)

    def moved(numbers: list[int] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)

    tokens = moved([laid.ids, laid.positions, laid.slots], torch.int64)  # one transfer for three
    return Batch(
        input_ids=tokens[0:1],
        position_ids=tokens[1:2],
        slots=tokens[2],
        query_offsets=moved(laid.offsets, torch.int32),
        context_lengths=moved(laid.contexts, torch.int32),
        block_table=moved(laid.table, torch.int32).view(len(rows), laid.width),
        logit_rows=moved(laid.logit_rows, torch.int64),
        starts=tuple(row.start for row in rows),
        lengths=tuple(len(row.token_ids) for row in rows),
    )
