"""Gather attention over shapes that do not depend on the sequences, so that it can be recorded: what
gather.py does for rows of one token, with all that varies on the device. It pays for the width of
the block table, not for what a sequence has; so widths are powers of two (see graphs.py)."""

from collections.abc import Sequence

import torch

from baton.engine.attention import Kernel
from baton.engine.batch import Batch
from baton.engine.cuda.graphs import power_of_two
from baton.engine.gather import GPU_KEYS, GatherAttention, Group
from baton.kv.row import Row

NARROWEST = 4  # blocks
CHEAP = 4096  # blocks that may be gathered whether they are needed or not
WASTE = 4  # of more than that, how many may be gathered for each that is needed


class StaticAttention:
    """The StepAttention (see graphs.py) of any model and any device."""

    def width(self, blocks: Sequence[int]) -> int | None:
        """One long sequence among many short ones is left to gather.py, which groups them."""
        width = max(NARROWEST, power_of_two(max(blocks)))
        gathered = width * power_of_two(len(blocks))
        return width if gathered <= max(CHEAP, WASTE * sum(blocks)) else None

    def begin(self, rows: Sequence[Row], block_size: int) -> None:
        """Nothing: what it needs is in the batch's memory."""

    def kernel(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """See StepAttention."""
        return GatherAttention(batch, block_size, static_groups)


def static_groups(batch: Batch[torch.Tensor], block_size: int, window: int | None) -> list[Group]:
    """All rows, a bounded number of keys at a time. A place without a key (behind a sequence's end,
    or in a table's padding) reads the first one again and is masked: what nobody wrote might not
    be a number."""
    count, width = batch.block_table.shape
    keys = width * block_size if window is None else min(width * block_size, window)
    context = batch.context_lengths[:, None]  # [rows, 1]
    first = (context - keys).clamp_min(0)
    position = first + torch.arange(keys, device=context.device)  # [rows, keys]
    seen = position < context
    inside = torch.where(seen, position, first)
    block = batch.block_table.gather(1, inside // block_size)
    slots = block * block_size + inside % block_size
    tokens = torch.arange(count, device=context.device)
    step = max(1, GPU_KEYS // keys)
    return [
        Group(
            rows=min(step, count - i),
            tokens=tokens[i : i + step],
            slots=slots[i : i + step].flatten(),
            mask=seen[i : i + step, None, None],
            causal=False,
        )
        for i in range(0, count, step)
    ]
