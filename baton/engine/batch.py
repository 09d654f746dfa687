"""Batch: rows of several sequences packed into one ragged forward of T tokens, no padding.

    rows        A: 3 tokens from 0       B: 1 token from 40       C: 2 tokens from 16
    input_ids   a0 a1 a2                 b40                      c16 c17             [1, T]
    offsets     0                        3                        4             6     [B + 1]
    contexts    3                        41                       18                  [B]

A token's slot is where its keys and values go: block * block_size + position within the block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from baton.kv.row import Logits, Row
from sampler.copies import up

Numbers = TypeVar("Numbers", list[int], torch.Tensor)


@dataclass(frozen=True, slots=True)
class Batch(Generic[Numbers]):
    """The input of one forward, T tokens of B rows: flat lists on the host (`pack_lists`), or tensors on
    the device (`pack`). `starts` and `lengths` stay on the host, so the attention loop can read them
    without waiting for the device."""

    input_ids: Numbers  # i64 [1, T]
    position_ids: Numbers  # i64 [1, T]
    slots: Numbers  # i64 [T]
    query_offsets: Numbers  # i32 [B + 1]
    context_lengths: Numbers  # i32 [B]: tokens of each sequence, with those of this batch
    block_table: Numbers  # i32 [B, table_width], short rows end in zeros
    logit_rows: Numbers  # i64 [n]: which of the T tokens need logits
    table_width: int
    starts: tuple[int, ...]  # [B]: position of each row's first token
    lengths: tuple[int, ...]  # [B]: tokens of each row


def pack_lists(rows: Sequence[Row], block_size: int, width: int | None = None) -> Batch[list[int]]:
    """Pack the rows in their order. `width`: of the block table, which is cut to it; None: what the
    longest row needs. Rows of one token take a separate path, a third faster for a decode step."""
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
    starts = tuple([row.start for row in rows])
    lengths = tuple([len(row.token_ids) for row in rows])
    return Batch(
        *(ids, positions, slots, offsets, contexts, table, logit_rows, width, starts, lengths)
    )


def pack(rows: Sequence[Row], block_size: int, device: torch.device) -> Batch[torch.Tensor]:
    """The packed rows as tensors on the device, in one copy."""
    batch = pack_lists(rows, block_size)
    tokens = torch.tensor([batch.input_ids, batch.position_ids, batch.slots])  # i64 [3, T]
    whole = partial(torch.tensor, dtype=torch.int32)
    packed = Batch(
        input_ids=tokens[0:1],
        position_ids=tokens[1:2],
        slots=tokens[2],
        query_offsets=whole(batch.query_offsets),
        context_lengths=whole(batch.context_lengths),
        block_table=whole(batch.block_table).view(len(rows), batch.table_width),
        logit_rows=torch.tensor(batch.logit_rows, dtype=torch.int64),
        table_width=batch.table_width,
        starts=batch.starts,
        lengths=batch.lengths,
    )
    return up(packed, device)
