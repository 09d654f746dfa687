"""Pool: typed views of a KV pool's memory. One storage per layer, one block per row.

`KVLayout` defines the bytes. The memory may belong to this process or, by shared memory or CUDA IPC,
to a decode worker. Keys and values are never read before they are written, so only the stamps are
cleared.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from baton.engine.device import allocated, free_memory
from baton.engine.narrow import narrowed, widened
from baton.errors import OutOfMemory
from baton.kv.layout import INT8, ITEM_BYTES, KVLayout
from baton.memory import out_of_memory

CPU_SHARE, DEVICE_SHARE = 0.25, 0.85  # of free memory by default; main memory has other users
WORKING_BYTES = (
    1 << 30
)  # of a worker on a GPU beside weights and pool: CUDA's own, forwards, graphs


@dataclass(frozen=True, slots=True)
class Pool:
    """Typed views of the slabs. Write through `write`; attention reads `keys` and `values`. In int8 these
    have the bytes of a scale behind those of each head (baton/engine/narrow.py)."""

    layout: KVLayout
    slabs: tuple[torch.Tensor, ...]  # uint8 [bytes], one per layer, then the stamps
    keys: tuple[torch.Tensor, ...]  # per layer [blocks, block_size, kv_heads, key_dim]
    values: tuple[torch.Tensor, ...]  # per layer [blocks, block_size, kv_heads, value_dim]
    stamps: torch.Tensor  # int64 [blocks]: the generation that filled the block, 0: not filled
    spare: int | None = None  # a block that is never granted, see spare_blocks()
    addresses: tuple["array[int]", "array[int]"] = field(
        init=False
    )  # of each layer's keys and values

    def __post_init__(self) -> None:
        places = (array("Q", [each.data_ptr() for each in of]) for of in (self.keys, self.values))
        object.__setattr__(self, "addresses", tuple(places))

    @property
    def blocks(self) -> int:
        return len(self.stamps)

    @property
    def device(self) -> torch.device:
        return self.stamps.device

    @classmethod
    def over(
        cls, layout: KVLayout, blocks: int, slabs: Sequence[torch.Tensor], *, spare: bool = False
    ) -> "Pool":
        """A pool over existing slabs, uint8 [slab bytes], whose bytes are left unchanged. `spare`: the
        last block is never granted."""
        wanted = layout.slab_bytes(blocks)
        found = [len(slab) for slab in slabs]
        assert found == wanted, f"slabs of {found} bytes, the layout needs {wanted}"
        views = [_layer_views(layout, i, blocks, slabs[i]) for i in range(len(layout.layers))]
        keys, values = zip(*views, strict=True)
        last = blocks - 1 if spare else None
        return cls(layout, tuple(slabs), keys, values, slabs[-1].view(torch.int64), last)

    @classmethod
    def private(
        cls, layout: KVLayout, blocks: int, device: torch.device, *, spare: bool = False
    ) -> "Pool":
        """A pool in this process's own memory, with cleared stamps. `spare`: add a block that is never
        granted. Raises OutOfMemory."""
        blocks += spare
        sizes = layout.slab_bytes(blocks)
        try:
            slabs = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemory(_too_small(sum(sizes), free_memory(device), device)) from error
        slabs[-1].zero_()
        return cls.over(layout, blocks, slabs, spare=spare)

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write the keys [T, kv_heads, key_dim] and values [T, kv_heads, value_dim] of T tokens to
        `slots` i64 [T] (slot = block * block_size + position within the block)."""
        if self.layout.dtype == INT8:
            keys, values = narrowed(keys), narrowed(values)
        for pool, new in ((self.keys[layer], keys), (self.values[layer], values)):
            pool.flatten(0, 1).index_copy_(0, slots, new.to(pool.dtype))

    def finite(self, blocks: Sequence[int]) -> bool:
        """Whether all keys and values in these blocks, which are full, are finite numbers."""
        for pool in (*self.keys, *self.values):
            heads = pool[list(blocks)]
            if self.layout.dtype == INT8:
                heads = widened(heads, torch.float32)
            if not heads.isfinite().all():
                return False
        return True


def spare_blocks(device: torch.device) -> int:
    """How many blocks at the end of a decode worker's pool are never granted: one on a GPU. A recorded
    step has a fixed number of rows, and its padding rows write there."""
    return 1 if device.type == "cuda" else 0


def pool_blocks(
    layout: KVLayout,
    device: torch.device,
    memory_bytes: int | None,
    max_tokens_wanted: int,
    *,
    tokens_needed: int = 1,
) -> int:
    """The number of blocks of a pool: enough for `max_tokens_wanted`, but no more than fit into
    `memory_bytes` (None: a share of the free memory). OutOfMemory if they hold fewer than
    `tokens_needed` tokens."""
    free = free_memory(device)
    share = CPU_SHARE if device.type == "cpu" else DEVICE_SHARE
    budget = int(free * share) if memory_bytes is None else memory_bytes
    per_block = sum(layout.slab_bytes(1))
    blocks = min(layout.blocks_for(max_tokens_wanted), budget // per_block)
    needed = layout.blocks_for(tokens_needed)
    if blocks < needed or blocks * per_block > free:
        raise OutOfMemory(_too_small(max(blocks, needed) * per_block, min(budget, free), device))
    return blocks


@dataclass(frozen=True, slots=True)
class Beside:
    """How many other workers share the GPU of a decode worker."""

    prefills: int
    decodes: int

    def share(self, total: int, weights: int, draft: int = 0) -> int:
        """Bytes of this worker's pool, on a GPU of `total` bytes, when each worker holds so many bytes of
        weights, and each decode worker those of a draft model with its pool as well. It does not depend
        on who has loaded by now: a share of what is free at some moment would leave a worker that loads
        later without memory."""
        workers = 1 + self.prefills + self.decodes
        left = int(total * DEVICE_SHARE) - workers * (weights + WORKING_BYTES)
        left -= (1 + self.decodes) * draft
        return max(0, left) // (1 + self.decodes)


def decode_pool_blocks(
    layout: KVLayout,
    device: torch.device,
    memory_bytes: int | None,
    max_tokens_wanted: int,
    beside: Beside | None = None,
    weights: int = 0,
) -> int:
    """pool_blocks() of a decode worker, its spare blocks included. `beside`: who shares its GPU.
    `weights`: bytes there of the model that all of them hold; what this worker has beyond, only decode
    workers have."""
    if memory_bytes is None and beside is not None and device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        memory_bytes = beside.share(total, weights, allocated(device) - weights)
    spare = spare_blocks(device) * layout.block_size
    return pool_blocks(
        layout, device, memory_bytes, max_tokens_wanted + spare, tokens_needed=1 + spare
    )


def _layer_views(
    layout: KVLayout, layer: int, blocks: int, slab: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks first, value blocks after them (see KVLayout)."""
    shape, dtype = layout.layers[layer], getattr(torch, layout.dtype)
    split = blocks * layout.key_block_bytes(layer)
    head = (blocks, layout.block_size, shape.kv_heads)
    wide = [
        layout.head_bytes(dim) // ITEM_BYTES[layout.dtype]
        for dim in (shape.key_dim, shape.value_dim)
    ]
    keys = slab[:split].view(dtype).view(*head, wide[0])
    values = slab[split:].view(dtype).view(*head, wide[1])
    return keys, values


def _too_small(needed: int, free: int, device: torch.device) -> str:
    return (
        f"the KV pool needs {needed / 2**20:.0f} MiB on {device}, but {free / 2**20:.0f} MiB are "
        "available: give it more memory, or ask for a shorter context or fewer sequences"
    )
