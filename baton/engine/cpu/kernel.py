"""Attention in C++ (native/attention.h) for models whose other layers run in torch on a CPU.

The fast sibling of gather.py. What a query gets does not depend, to the bit, on its neighbours in
the batch, on how its sequence is cut into chunks, nor on the number of threads.
"""

import ctypes
import logging
from functools import cache

import torch

from baton.engine.attention import Flavour
from baton.engine.batch import Batch
from baton.engine.cpu.build import NoNative, build
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.runner import PlanKernel

log = logging.getLogger(__name__)

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class BatchStruct(ctypes.Structure):
    """AttentionBatch of attention.h."""

    _fields_ = (
        ("sequences", ctypes.c_long),
        ("query_offsets", ctypes.c_void_p),
        ("context_lengths", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("table_width", ctypes.c_long),
        ("block_size", ctypes.c_long),
        ("slots", ctypes.c_void_p),
    )


class LayerStruct(ctypes.Structure):
    """AttentionLayer of attention.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("heads", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("key_dim", ctypes.c_long),
        ("value_dim", ctypes.c_long),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_long),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """Built at the first call. Raises NoNative."""
    found = build(["kernel.cpp"], "kernel")
    row = (ctypes.c_void_p, ctypes.c_long)  # a matrix of floats and its stride
    found.baton_attend.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *row, *row, ctypes.c_int)
    found.baton_attend.restype = ctypes.c_int
    found.baton_write_kv.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *row, *row, ctypes.c_int)
    found.baton_write_kv.restype = None
    return found


@cache
def cpu_attention() -> PlanKernel:
    """NativeAttention where it can be built, else its slow sibling, and one line in the log."""
    try:
        library()
    except NoNative as why:
        log.info("attention runs in plain torch, which is slower: %s", why)
        return GatherAttention
    return NativeAttention


def describe_batch(batch: Batch, block_size: int) -> BatchStruct:
    """The batch for C++. It points into the batch's tensors, which must outlive it."""
    return BatchStruct(
        sequences=len(batch.lengths),
        query_offsets=batch.query_offsets.data_ptr(),
        context_lengths=batch.context_lengths.data_ptr(),
        block_table=batch.block_table.data_ptr(),
        table_width=batch.block_table.shape[1],
        block_size=block_size,
        slots=batch.slots.data_ptr(),
    )


def describe_layer(
    pool: Pool, layer: int, heads: int, flavour: Flavour, sinks: torch.Tensor | None
) -> LayerStruct:
    """One layer for C++. `sinks` are the flavour's, fp32 and contiguous, and must outlive it."""
    keys, values = pool.keys[layer], pool.values[layer]
    return LayerStruct(
        type=CACHE_TYPES[keys.dtype],
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        heads=heads,
        kv_heads=keys.shape[2],
        key_dim=keys.shape[3],
        value_dim=values.shape[3],
        scaling=flavour.scaling,
        window=flavour.window or 0,
        softcap=flavour.softcap or 0.0,
        sinks=None if sinks is None else sinks.data_ptr(),
    )


class NativeAttention:
    """The kernel of one forward. Pools in half precision other than bf16 go to the slow sibling."""

    def __init__(self, batch: Batch, block_size: int, threads: int | None = None) -> None:
        self.batch = batch
        self.struct = describe_batch(batch, block_size)
        self.threads = threads or torch.get_num_threads()
        self.slow = GatherAttention(batch, block_size)

    def __call__(
        self, query: torch.Tensor, pool: Pool, layer: int, flavour: Flavour
    ) -> torch.Tensor:
        if pool.device.type != "cpu" or pool.keys[layer].dtype not in CACHE_TYPES:
            return self.slow(query, pool, layer, flavour)
        rows = query.float().contiguous()  # [T, H, Dk]
        sinks = None if flavour.sinks is None else flavour.sinks.detach().float().contiguous()
        described = describe_layer(pool, layer, rows.shape[1], flavour, sinks)
        output = rows.new_empty(*rows.shape[:2], described.value_dim)  # [T, H, Dv]
        failed = library().baton_attend(
            ctypes.addressof(described),
            ctypes.addressof(self.struct),
            *(rows.data_ptr(), rows[0].numel()),
            *(output.data_ptr(), output[0].numel()),
            self.threads,
        )
        if failed:
            raise MemoryError(f"no memory for the attention scratch of {self.threads} threads")
        return output.to(query.dtype)
