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


def pack(rows: Sequence[Row], block_size: int, device: torch.device) -> Batch:
    """Lay the rows side by side, in their order."""
    assert rows, "a forward needs at least one row"
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    offsets = [0]
    for row in rows:
        assert row.token_ids, "a row needs at least one token"
        assert row.end <= len(row.blocks) * block_size, (
            f"{len(row.blocks)} blocks for {row.end} tokens"
        )
        span = range(row.start, row.end)
        ids.extend(row.token_ids)
        positions.extend(span)
        slots.extend(row.blocks[p // block_size] * block_size + p % block_size for p in span)
        logit_rows.extend(_wants_logits(row, offsets[-1]))
        offsets.append(len(ids))

    used = [-(-row.end // block_size) for row in rows]
    width = max(used)
    table = [[*row.blocks[:n], *[0] * (width - n)] for row, n in zip(rows, used, strict=True)]
    tokens = torch.tensor([ids, positions, slots]).to(
        device, non_blocking=True
    )  # one transfer for three
    return Batch(
        input_ids=tokens[0:1],
        position_ids=tokens[1:2],
        slots=tokens[2],
        query_offsets=torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True),
        context_lengths=torch.tensor([row.end for row in rows], dtype=torch.int32).to(
            device, non_blocking=True
        ),
        block_table=torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64).to(device, non_blocking=True),
        starts=tuple(row.start for row in rows),
        lengths=tuple(len(row.token_ids) for row in rows),
    )


def _wants_logits(row: Row, offset: int) -> range:
    end = offset + len(row.token_ids)
    match row.logits:
        case Logits.NONE:
            return range(0)
        case Logits.LAST:
            return range(end - 1, end)
        case Logits.ALL:
            return range(offset, end)
