"""KV blocks as rows of a slab, and copies of them: runs of adjacent blocks, gather and scatter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.errors import TransferError
from baton.kv.layout import KVLayout
from baton.transfer.checks import check_source


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` blocks that are adjacent both in the source and in the target."""

    source: int
    target: int
    count: int


def stretches(source: Sequence[int], target: Sequence[int], longest: int) -> list[Stretch]:
    """The fewest copies that move source[i] to target[i], in order, of at most `longest` blocks."""
    found: list[Stretch] = []
    start = 0
    for i in range(1, len(source) + 1):
        if (
            i < len(source)
            and i - start < longest
            and source[i] == source[i - 1] + 1
            and target[i] == target[i - 1] + 1
        ):
            continue
        found.append(Stretch(source[start], target[start], i - start))
        start = i
    return found


@dataclass(frozen=True, slots=True)
class Rows:
    """One layer's slab, viewed as rows of blocks."""

    keys: torch.Tensor  # uint8 [blocks, key_block_bytes]
    values: torch.Tensor  # uint8 [blocks, value_block_bytes]

    def copy(self, stretch: Stretch, source: "Rows", *, non_blocking: bool = False) -> None:
        """Copy this stretch from `source`."""
        ours = slice(stretch.target, stretch.target + stretch.count)
        theirs = slice(stretch.source, stretch.source + stretch.count)
        self.keys[ours].copy_(source.keys[theirs], non_blocking=non_blocking)
        self.values[ours].copy_(source.values[theirs], non_blocking=non_blocking)


def rows(layout: KVLayout, layer: int, slab: torch.Tensor) -> Rows:
    """Views of this layer's slab, uint8 [slab bytes], which may hold any number of blocks."""
    key_bytes, value_bytes = layout.key_block_bytes(layer), layout.value_block_bytes(layer)
    blocks, rest = divmod(slab.numel(), key_bytes + value_bytes)
    if rest or slab.dtype != torch.uint8 or slab.dim() != 1:
        raise TransferError(f"not a slab of layer {layer}: {slab.dtype} {tuple(slab.shape)}")
    keys, values = slab[: blocks * key_bytes], slab[blocks * key_bytes :]
    return Rows(keys.view(blocks, key_bytes), values.view(blocks, value_bytes))


def all_rows(layout: KVLayout, slabs: Sequence[torch.Tensor]) -> list[Rows]:
    """The rows of each layer. `slabs`: one per layer, then the stamps."""
    return [rows(layout, layer, slab) for layer, slab in enumerate(slabs[:-1])]


def block_bytes(layout: KVLayout, layer: int) -> int:
    """Bytes of one block of one layer, keys and values."""
    return layout.key_block_bytes(layer) + layout.value_block_bytes(layer)


def gather(view: Rows, blocks: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of these blocks on the CPU, uint8 [bytes]: all keys, then all values. `out`: where to, if
    the blocks are on the CPU too."""
    check_source(blocks, len(view.keys))
    index = torch.tensor(blocks, dtype=torch.int64, device=view.keys.device)
    if view.keys.is_cuda:
        parts = [view.keys.index_select(0, index), view.values.index_select(0, index)]
        return torch.cat([part.view(-1) for part in parts]).cpu()
    keys, values = view.keys[0].numel() * len(blocks), view.values[0].numel() * len(blocks)
    copy = torch.empty(keys + values, dtype=torch.uint8) if out is None else out
    torch.index_select(view.keys, 0, index, out=copy[:keys].view(len(blocks), -1))
    torch.index_select(view.values, 0, index, out=copy[keys:].view(len(blocks), -1))
    return copy


def scatter(payload: memoryview, view: Rows, blocks: Sequence[int]) -> None:
    """Write what gather() returned into these blocks."""
    data = torch.frombuffer(payload, dtype=torch.uint8).to(view.keys.device)
    keys = view.keys[0].numel() * len(blocks)
    source = Rows(data[:keys].view(len(blocks), -1), data[keys:].view(len(blocks), -1))
    for stretch in stretches(range(len(blocks)), blocks, len(blocks)):
        view.copy(stretch, source)
