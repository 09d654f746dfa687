"""Attention by FlashInfer. Imported only if that package is installed (select.py).

Written against the documentation and source of 0.2 to 0.7. Paged KV is a pair of
[blocks, block_size, kv_heads, head_dim] tensors ("NHD"), the same as a layer of our pool. `plan` runs
on the host, once per forward for all layers of a kind; `run` is called for each layer. A planned
wrapper copies from host memory that the next plan overwrites, so we wait for the stream first.
Forwards end with a wait anyway, for tokens or for KV.

By default FlashInfer chooses its kernels by card. "fa2" works on every card since capability 8.0,
supports windows and softcaps, and its plans can be recorded in a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import torch

from baton.engine.attention import AttentionParams, Kernel
from baton.engine.batch import Batch
from baton.engine.cuda.graphs import MOST_BLOCKS
from baton.engine.errors import Unsupported
from baton.engine.pool import Pool
from baton.kv.row import Row

WORKSPACE_BYTES = 256 << 20  # partial results of long sequences; all wrappers share it, in turn
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
FEW_HEADS = 2  # query heads per key head; with more, tensor core kernels are faster
VERSION = str(flashinfer.__version__)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a plan depends on besides the sequences."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    params: AttentionParams

    def options(self) -> dict[str, Any]:
        """Arguments of `plan`, whose window excludes the query itself."""
        window, softcap = self.params.window, self.params.softcap
        return {
            "sm_scale": self.params.scaling,
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }


@dataclass(frozen=True, slots=True)
class Pages:
    """The blocks of sequences in FlashInfer's format: i32, on the host except for the blocks of a
    ragged batch. Sequence i has `blocks[offsets[i] : offsets[i + 1]]`."""

    offsets: torch.Tensor  # [sequences + 1]
    blocks: torch.Tensor  # [blocks of all sequences]
    last: torch.Tensor  # [sequences]: tokens in the last block


class FlashInferAttention:
    """The wrappers of one device: a StepAttention (graphs.py), and `ragged` for all other forwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._steps: dict[tuple[int, Kind], Any] = {}  # by rows
        self._ragged: dict[Kind, Any] = {}
        self._pages: Pages | None = None  # of the current step

    def width(self, blocks: Sequence[int]) -> int | None:
        """0: this backend reads page lists instead of the block table."""
        return 0

    def begin(self, rows: Sequence[Row], block_size: int) -> None:
        """See StepAttention."""
        used = [row.blocks[: -(-row.end // block_size)] for row in rows]
        blocks = torch.tensor([block for each in used for block in each], dtype=torch.int32)
        self._pages = pages([row.end for row in rows], blocks, block_size)
        wait(self._device)
        for (count, kind), wrapper in self._steps.items():
            if count == len(rows) and kind.block_size == block_size:
                self._plan_step(wrapper, kind)

    def kernel(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """See StepAttention. A new kind of layer is planned at its first run, during warm-up."""
        count = len(batch.slots)

        def attend(
            query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
        ) -> torch.Tensor:
            kind = kind_of(query, pool, layer, params)
            wrapper = self._steps.get((count, kind))
            if wrapper is None:
                wrapper = self._steps[count, kind] = self._new_step(count, kind)
                self._plan_step(wrapper, kind)
            return run(wrapper, query, pool, layer)

        return attend

    def ragged(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """The kernel of one unrecorded forward: a PlanKernel (runner.py)."""
        planned: dict[Kind, Any] = {}

        def attend(
            query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
        ) -> torch.Tensor:
            kind = kind_of(query, pool, layer, params)
            if kind not in planned:
                planned[kind] = self._plan_ragged(kind, batch)
            return run(planned[kind], query, pool, layer)

        return attend

    def _new_step(self, rows: int, kind: Kind) -> Any:
        def fixed(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=self._device)

        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=kind.heads // kind.kv_heads > FEW_HEADS,
            paged_kv_indptr_buffer=fixed(rows + 1),
            paged_kv_indices_buffer=fixed(rows * MOST_BLOCKS),
            paged_kv_last_page_len_buffer=fixed(rows),
            backend="fa2",
        )

    def _plan_step(self, wrapper: Any, kind: Kind) -> None:
        assert self._pages is not None
        where = (self._pages.offsets, self._pages.blocks, self._pages.last)
        shape = (kind.heads, kind.kv_heads, kind.head_dim, kind.block_size)
        wrapper.plan(*where, *shape, **kind.options())

    def _plan_ragged(self, kind: Kind, batch: Batch[torch.Tensor]) -> Any:
        wrapper = self._ragged.get(kind)
        if wrapper is None:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend="fa2"
            )
            self._ragged[kind] = wrapper
        contexts = [s + n for s, n in zip(batch.starts, batch.lengths, strict=True)]
        used = torch.tensor([-(-context // kind.block_size) for context in contexts])
        taken = torch.arange(batch.block_table.shape[1]) < used[:, None]
        row, column = taken.nonzero().to(self._device).unbind(1)
        where = pages(contexts, batch.block_table[row, column], kind.block_size)
        queries = torch.tensor([0, *batch.lengths]).cumsum(0).int()
        wait(self._device)
        shape = (kind.heads, kind.kv_heads, kind.head_dim, kind.block_size)
        places = (queries, where.offsets, where.blocks, where.last)
        wrapper.plan(*places, *shape, causal=True, **kind.options())
        return wrapper


def pages(contexts: Sequence[int], blocks: torch.Tensor, block_size: int) -> Pages:
    """The pages of sequences with `contexts` tokens; `blocks`: their blocks, concatenated."""
    lengths = torch.tensor(contexts, dtype=torch.int32)
    used = (lengths + block_size - 1) // block_size
    offsets = torch.cat([torch.zeros(1), used.cumsum(0)]).int()
    return Pages(offsets, blocks, (lengths - 1) % block_size + 1)


def kind_of(query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams) -> Kind:
    """The kind of this layer. Unsupported if FlashInfer cannot compute it."""
    kv_heads, head_dim = pool.keys[layer].shape[2:]
    why = unfit(query.dtype, head_dim, pool.values[layer].shape[3], params)
    if why:
        raise Unsupported(f"layer {layer} has {why}")
    size = pool.layout.block_size
    return Kind(query.shape[1], kv_heads, head_dim, size, query.dtype, params)


def unfit(dtype: torch.dtype, key_dim: int, value_dim: int, params: AttentionParams) -> str:
    """What FlashInfer does not support in this layer; empty if it does."""
    if dtype not in DTYPES:
        return f"keys in {dtype}"
    if params.sinks is not None:
        return "attention sinks"
    if key_dim != value_dim:
        return f"keys of {key_dim} and values of {value_dim} numbers"
    return "" if key_dim in HEAD_DIMS else f"heads of {key_dim} numbers"


def wait(device: torch.device) -> None:
    """Wait until all earlier plans have been copied."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def run(wrapper: Any, query: torch.Tensor, pool: Pool, layer: int) -> torch.Tensor:
    """Attention of queries [T, H, D] over one layer of the pool -> [T, H, D]."""
    found: torch.Tensor = wrapper.run(query.contiguous(), (pool.keys[layer], pool.values[layer]))
    return found
