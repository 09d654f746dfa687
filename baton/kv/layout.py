"""KVLayout: the bytes of one block of a KV pool. Pools with equal fingerprints can exchange blocks.

One layer's memory is one *slab*: all key blocks, then all value blocks.

    slab of layer l:  | key block 0 | key block 1 | ... | value block 0 | value block 1 | ... |
    key block:    [block_size, kv_heads, key_dim]
    value block:  [block_size, kv_heads, value_dim]

With dtype int8 a head of a token takes its numbers, one byte each, and behind them their scale, a float32
(decision 0008). So scales lie with the block, and whatever copies blocks copies them too.

After the layers comes one more slab, the *stamps*: an int64 per block, the generation of the grant
under which the block was last completely filled (0: not filled).
"""

import hashlib
from dataclasses import dataclass

INT8 = "int8"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, INT8: 1}
SCALE_BYTES = 4
STAMP_BYTES = 8


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads and sizes of one attention layer's keys and values (unequal for MLA models)."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a KV pool without its number of blocks."""

    layers: tuple[LayerShape, ...]
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a KV layout needs at least one attention layer")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype must be one of {sorted(ITEM_BYTES)}, got {self.dtype!r}")

    def head_bytes(self, dim: int) -> int:
        """Bytes of one head's `dim` numbers of one token, keys or values."""
        return dim * ITEM_BYTES[self.dtype] + (SCALE_BYTES if self.dtype == INT8 else 0)

    def key_block_bytes(self, layer: int) -> int:
        shape = self.layers[layer]
        return self.block_size * shape.kv_heads * self.head_bytes(shape.key_dim)

    def value_block_bytes(self, layer: int) -> int:
        shape = self.layers[layer]
        return self.block_size * shape.kv_heads * self.head_bytes(shape.value_dim)

    def slab_bytes(self, blocks: int) -> list[int]:
        """Bytes of each slab of a pool with so many blocks: one per layer, then the stamps."""
        layers = range(len(self.layers))
        per_block = [self.key_block_bytes(i) + self.value_block_bytes(i) for i in layers]
        return [blocks * each for each in per_block] + [blocks * STAMP_BYTES]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(self.slab_bytes(1)) - STAMP_BYTES

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def fingerprint(self) -> str:
        """Equal for pools that can exchange blocks."""
        parts = [f"{s.kv_heads}x{s.key_dim}+{s.value_dim}" for s in self.layers]
        text = f"{self.dtype}/{self.block_size}/" + ",".join(parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
