"""Attention in C++ (native/attention.h) for models whose other layers run in torch on a CPU.

A faster replacement for gather.py. A query's result has the same bits whatever the rest of the batch,
the chunks of its prompt and the number of threads.
"""

import ctypes
import logging
from functools import cache

import torch

from baton.engine.attention import AttentionParams
from baton.engine.batch import Batch
from baton.engine.cpu.build import KERNEL, NoNative, build
from baton.engine.cpu.structures import ATTENTION, CACHES, AttentionBatch, AttentionLayer, check_abi
from baton.engine.errors import CompileError
from baton.engine.gather import GatherAttention
from baton.engine.narrow import head_dim
from baton.engine.pool import Pool
from baton.engine.runner import PlanKernel

log = logging.getLogger(__name__)

CACHE_TYPES = {getattr(torch, name): number for name, number in CACHES.items()}


@cache
def library() -> ctypes.CDLL:
    """The native library, built at the first call. Raises NoNative or CompileError."""
    return declared(build(KERNEL, "kernel"))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library of KERNEL with the types of its functions. CompileError if its structures are others."""
    found = check_abi(library, ATTENTION)
    row = (ctypes.c_void_p, ctypes.c_long)  # a matrix of floats and its stride
    found.baton_attend.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *row, *row, ctypes.c_int)
    found.baton_attend.restype = ctypes.c_int
    found.baton_write_kv.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *row, *row, ctypes.c_int)
    found.baton_write_kv.restype = None
    return found


@cache
def cpu_attention() -> PlanKernel:
    """NativeAttention if it can be built, otherwise GatherAttention and one line in the log."""
    try:
        library()
    except (NoNative, CompileError) as why:
        log.info("attention runs in plain torch, which is slower: %s", why)
        return GatherAttention
    return NativeAttention


def describe_batch(batch: Batch[torch.Tensor], block_size: int) -> AttentionBatch:
    """The batch for C++. It points into the batch's tensors, which must outlive it."""
    return AttentionBatch(
        sequences=len(batch.lengths),
        query_offsets=batch.query_offsets.data_ptr(),
        context_lengths=batch.context_lengths.data_ptr(),
        block_table=batch.block_table.data_ptr(),
        table_width=batch.table_width,
        block_size=block_size,
        slots=batch.slots.data_ptr(),
    )


def describe_layer(
    pool: Pool, layer: int, heads: int, params: AttentionParams, sinks: torch.Tensor | None
) -> AttentionLayer:
    """The C++ description of one layer. `sinks`: those of `params` as contiguous fp32 [heads]; they must
    outlive the result."""
    keys, values = pool.keys[layer], pool.values[layer]
    return AttentionLayer(
        type=CACHE_TYPES[keys.dtype],
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        heads=heads,
        kv_heads=keys.shape[2],
        key_dim=head_dim(keys),
        value_dim=head_dim(values),
        scaling=params.scaling,
        window=params.window or 0,
        softcap=params.softcap or 0.0,
        sinks=None if sinks is None else sinks.data_ptr(),
    )


class NativeAttention:
    """The kernel of one forward. Pools in fp16 or not on a CPU use GatherAttention. `native`: the library
    that computes [default: library()]."""

    def __init__(
        self,
        batch: Batch[torch.Tensor],
        block_size: int,
        threads: int | None = None,
        native: ctypes.CDLL | None = None,
    ) -> None:
        self.batch = batch
        self.native = native
        self.struct = describe_batch(batch, block_size)
        self.threads = threads or torch.get_num_threads()
        self.slow = GatherAttention(batch, block_size)

    def __call__(
        self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
    ) -> torch.Tensor:
        if pool.device.type != "cpu" or pool.keys[layer].dtype not in CACHE_TYPES:
            return self.slow(query, pool, layer, params)
        rows = query.float().contiguous()  # [T, H, Dk]
        sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
        described = describe_layer(pool, layer, rows.shape[1], params, sinks)
        output = rows.new_empty(*rows.shape[:2], described.value_dim)  # [T, H, Dv]
        failed = (self.native or library()).baton_attend(
            ctypes.addressof(described),
            ctypes.addressof(self.struct),
            *(rows.data_ptr(), rows[0].numel()),
            *(output.data_ptr(), output[0].numel()),
            self.threads,
        )
        if failed:
            raise MemoryError(
                f"cannot allocate attention scratch memory for {self.threads} threads"
            )
        return output.to(query.dtype)
