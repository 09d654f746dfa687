"""Launches the Triton kernels (triton_kernels.py) over a batch. Imported only if triton is installed.

    row            A: 1 token    B: 5 tokens (speculation)   C: 700 tokens (a chunk of a prompt)
    FEW or less    tiles whose keys are split: attend, then reduce
    more than FEW                                            tiles of up to 128 queries: attend alone

Which way a row takes, and what it computes there, depends on that row alone. So its result is the same to
the last bit, whoever else is in the batch, and however wide the block table is.

A forward needs no transfer beyond its batch if its rows have one token each, or if it is recorded: then a
tile's row follows from its number. Otherwise the tiles are listed on the host, once for all layers with
such tiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
from triton.errors import TritonError

from baton.engine.attention import AttentionParams, Kernel
from baton.engine.batch import Batch
from baton.engine.cuda import triton_kernels
from baton.engine.cuda.graphs import MOST_BLOCKS, power_of_two
from baton.engine.errors import Unsupported
from baton.engine.pool import Pool
from baton.kv.row import Row

VERSION = str(triton.__version__)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_GROUP = 128  # query heads that share a KV head: they are rows of one matrix
LARGEST_HEAD = 512
NARROWEST, WIDENING = 16, 4  # widths of recorded block tables: 16 blocks, 64, 256 ...


@dataclass(frozen=True, slots=True)
class Tuning:
    """What changes speed only. Chosen without a GPU; tools/benchmarks/gpu_triton.py tries others."""

    split: int = 256  # keys of a program in a decode step, a power of two
    few: int = 16  # tokens of a row whose keys are split
    queries: int = 128  # rows of a tile of a prompt's chunk
    step: int = 64  # keys at a time
    step_bytes: int = 80 << 10  # of shared memory for the keys and values in flight
    buffers: int = 2  # steps whose keys are on their way while one is computed
    splits_joined: int = 16  # at a time
    scratch_bytes: int = 128 << 20  # for unfinished results; more tiles are launched in parts

    @property
    def stages(self) -> int:
        """Triton's num_stages. Its pipeline loads the block table before the keys, so it takes two
        stages to have one step on its way."""
        return 2 * self.buffers + 1


DESKTOP = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities whose programs may have 99 KiB of shared memory; others have 163 or more."""


def tuned(capability: tuple[int, int]) -> Tuning:
    """For a GPU of this compute capability."""
    return Tuning(step_bytes=32 << 10) if capability in DESKTOP else Tuning()


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of a kernel's programs."""

    rows: int  # M
    tokens: int  # query tokens: rows // heads of a group
    step: int  # N
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one layer."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def padded(self) -> tuple[int, int]:
        """Key and value dimensions in the kernel: powers of two, 16 at least for its matrix products."""
        return power_of_two(max(16, self.key_dim)), power_of_two(max(16, self.value_dim))

    @property
    def unfit(self) -> str:
        """What the kernels do not support; empty if they support it all."""
        if self.dtype not in DTYPES:
            return f"keys in {self.dtype}"
        if self.group > LARGEST_GROUP:
            return f"{self.group} query heads to a KV head"
        largest = max(self.key_dim, self.value_dim)
        return f"heads of {largest} numbers" if largest > LARGEST_HEAD else ""


def decode_tile(heads: Heads, tuning: Tuning) -> Tile:
    """For rows of few tokens: memory is the limit, so as few queries as the matrix units take."""
    rows = max(16, power_of_two(heads.group))
    step = _step(heads, tuning, min(tuning.step, tuning.split))
    return Tile(rows, rows // heads.group, step, _warps(rows, heads), tuning.stages)


def prefill_tile(heads: Heads, tuning: Tuning) -> Tile:
    """For chunks of prompts: arithmetic is the limit, so as many queries as the registers hold."""
    most = tuning.queries * 128 // max(128, *heads.padded)
    if heads.dtype == torch.float32:
        most //= 2
    rows = max(16, most, power_of_two(heads.group))
    step = _step(heads, tuning, tuning.step)
    return Tile(rows, rows // heads.group, step, _warps(rows, heads), tuning.stages)


def _warps(rows: int, heads: Heads) -> int:
    """Four, or eight where the results of a tile would fill their registers."""
    return 8 if rows * heads.padded[1] >= 128 * 128 else 4


def _step(heads: Heads, tuning: Tuning, most: int) -> int:
    """Keys at a time that fit into the shared memory meant for them."""
    bytes_per_key = sum(heads.padded) * heads.dtype.itemsize
    step = most
    while step > 16 and step * bytes_per_key * tuning.buffers > tuning.step_bytes:
        step //= 2
    return step


def tiles_of(
    lengths: Sequence[int], starts: Sequence[int], tokens: int, *, taken: Callable[[int], bool]
) -> list[tuple[int, int]]:
    """(row, first token within it) of the tiles of the rows whose length is `taken`. The tiles with the
    most keys come first, so that the last ones to run are short."""
    found = [
        (row, begin)
        for row, length in enumerate(lengths)
        if taken(length)
        for begin in range(0, length, tokens)
    ]
    return sorted(found, key=lambda tile: -(starts[tile[0]] + tile[1]))


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one launch: listed, or `per_row` of each row."""

    count: int
    tokens: int
    per_row: int = 1
    listed: torch.Tensor | None = None  # i32 [count, 2]


@dataclass(slots=True)
class TritonAttention:
    """The kernel of one forward; the class is a PlanKernel (runner.py)."""

    batch: Batch[torch.Tensor]
    block_size: int
    tuning: Tuning = field(default_factory=Tuning)
    kernels: ModuleType = triton_kernels
    lists: dict[tuple[bool, int], Tiles] = field(default_factory=dict)

    def __call__(
        self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
    ) -> torch.Tensor:
        """See Kernel. Unsupported if the kernels cannot compute this layer."""
        keys, values = pool.keys[layer], pool.values[layer]
        heads = Heads(query.shape[1], keys.shape[2], keys.shape[3], values.shape[3], keys.dtype)
        if heads.unfit:
            raise Unsupported(f"layer {layer} has {heads.unfit}")
        output = query.new_empty(len(query), heads.heads, heads.value_dim)
        launch = _Launch(self, heads, query.contiguous(), keys, values, params, output)
        short = decode_tile(heads, self.tuning)
        if len(query) == len(self.batch.context_lengths):  # one token a row
            launch.split(short, Tiles(len(query), 1))
        elif not self.batch.lengths:  # recorded: as many tokens in each row
            each, left = divmod(len(query), len(self.batch.context_lengths))
            assert not left, "the rows of a recorded step have the same number of tokens"
            per_row = -(-each // short.tokens)
            count = per_row * len(self.batch.context_lengths)
            launch.split(short, Tiles(count, short.tokens, per_row))
        else:
            launch.split(short, self._listed(short, few=True))
            long = prefill_tile(heads, self.tuning)
            launch.whole(long, self._listed(long, few=False))
        return output

    def _listed(self, tile: Tile, *, few: bool) -> Tiles:
        """The tiles of the rows that have few tokens, or more than that."""
        if (few, tile.tokens) not in self.lists:
            batch, most = self.batch, self.tuning.few
            found = tiles_of(
                *(batch.lengths, batch.starts, tile.tokens),
                taken=lambda length: (length <= most) == few,
            )
            listed = torch.tensor(found, dtype=torch.int32).to(
                batch.slots.device, non_blocking=True
            )
            self.lists[few, tile.tokens] = Tiles(len(found), tile.tokens, listed=listed)
        return self.lists[few, tile.tokens]


@dataclass(frozen=True, slots=True)
class _Launch:
    """One layer of one forward."""

    forward: TritonAttention
    heads: Heads
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    params: AttentionParams
    output: torch.Tensor

    def split(self, tile: Tile, tiles: Tiles) -> None:
        """Tiles whose keys are split among programs."""
        if not tiles.count:
            return
        tuning, heads = self.forward.tuning, self.heads
        splits = splits_of(
            self.forward.batch.table_width * self.forward.block_size,
            tiles.tokens,
            self.params.window,
            tuning.split,
        )
        if splits == 1:
            self._attend(tile, tiles, split=tuning.split, parts=None)
            return
        queries = tiles.tokens * heads.group
        numbers = heads.kv_heads * splits * queries * (heads.value_dim + 2)  # of a tile
        at_once = min(tiles.count, max(1, tuning.scratch_bytes // (4 * numbers)))
        shape = (at_once, heads.kv_heads, splits, queries)
        parts = self.output.new_empty(*shape, heads.value_dim, dtype=torch.float32)
        sums = self.output.new_empty(*shape, 2, dtype=torch.float32)
        for first in range(0, tiles.count, at_once):
            count = min(at_once, tiles.count - first)
            self._attend(
                tile, tiles, split=tuning.split, parts=(parts, sums), first=first, count=count
            )
            self._reduce(tiles, parts, sums, first=first, count=count)

    def whole(self, tile: Tile, tiles: Tiles) -> None:
        """Tiles whose keys are visited by one program."""
        if tiles.count:
            self._attend(tile, tiles, split=0, parts=None)

    def _attend(
        self,
        tile: Tile,
        tiles: Tiles,
        *,
        split: int,
        parts: tuple[torch.Tensor, torch.Tensor] | None,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        batch, heads, params = self.forward.batch, self.heads, self.params
        key_padded, value_padded = heads.padded
        count = tiles.count if count is None else count
        given, splits = (parts, parts[0].shape[2]) if parts else ((self.output, self.output), 1)
        launch(
            self.forward.kernels.attend,
            (count, heads.kv_heads, splits),
            *(self.output, *given, self.query, self.keys, self.values),
            *(batch.block_table, batch.context_lengths, batch.query_offsets),
            *(self._list(tiles), self._sinks()),
            *(float(params.scaling), float(params.softcap or 1), params.window or 0),
            batch.table_width,
            *(first, tiles.per_row),
            LISTED=tiles.listed is not None,
            DIRECT=parts is None,
            CAPPED=params.softcap is not None,
            WINDOWED=params.window is not None,
            SINKS=params.sinks is not None,
            HEADS_KV=heads.kv_heads,
            GROUP=heads.group,
            TOKENS=tiles.tokens,
            DK=heads.key_dim,
            DV=heads.value_dim,
            KP=key_padded,
            VP=value_padded,
            PAGE=self.forward.block_size,
            SPLIT=split,
            M=tile.rows,
            N=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _reduce(
        self, tiles: Tiles, parts: torch.Tensor, sums: torch.Tensor, *, first: int, count: int
    ) -> None:
        heads = self.heads
        launch(
            self.forward.kernels.reduce,
            (count * tiles.tokens, heads.heads),
            *(self.output, parts, sums, self.forward.batch.query_offsets),
            *(self._list(tiles), self._sinks(), parts.shape[2], first, tiles.per_row),
            LISTED=tiles.listed is not None,
            SINKS=self.params.sinks is not None,
            HEADS_KV=heads.kv_heads,
            GROUP=heads.group,
            TOKENS=tiles.tokens,
            DV=heads.value_dim,
            VP=heads.padded[1],
            S=self.forward.tuning.splits_joined,
            num_warps=4,
        )

    def _list(self, tiles: Tiles) -> torch.Tensor:
        return self.output if tiles.listed is None else tiles.listed  # any memory: it is not read

    def _sinks(self) -> torch.Tensor:
        return self.output if self.params.sinks is None else self.params.sinks.detach()


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    """Unsupported if Triton cannot compile or load the kernel for this device."""
    try:
        kernel[grid](*given, **constants, enable_fp_fusion=True)  # the default differs by version
    except TritonError as error:
        raise Unsupported(f"{type(error).__name__}: {error}") from error


def splits_of(keys: int, tokens: int, window: int | None, split: int) -> int:
    """How many splits the keys of a tile touch at most, if a row has at most `keys` of them."""
    most = -(-keys // split)
    if window is None:
        return most
    touched = window + tokens - 1  # from the window of the first query to the last one
    return min(most, (touched + split - 2) // split + 1)


class TritonSteps:
    """The StepAttention (graphs.py) of recorded steps."""

    def __init__(self, tuning: Tuning | None = None, kernels: ModuleType = triton_kernels) -> None:
        self.plan = partial(TritonAttention, tuning=tuning or Tuning(), kernels=kernels)

    def width(self, blocks: Sequence[int]) -> int | None:
        """Few different ones: unused columns cost programs that end at once."""
        width = NARROWEST
        while width < max(blocks):
            width *= WIDENING
        return max(max(blocks), min(width, MOST_BLOCKS))

    def begin(self, rows: Sequence[Row], block_size: int) -> None:
        """Does nothing: all it needs is in the batch's memory."""

    def kernel(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """See StepAttention."""
        return self.plan(batch, block_size)
