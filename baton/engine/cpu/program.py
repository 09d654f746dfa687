"""Program: one model's forward in a mapped file, run by native code (see native/program.cpp)."""

import ctypes
import json
import mmap
import os
from collections.abc import Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy

from baton.engine.cpu import structures as native

Batch = native.Batch


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the library's functions take and give."""
    library.baton_program_new.argtypes = [c_void_p]
    library.baton_program_new.restype = c_void_p
    library.baton_program_free.argtypes = [c_void_p]
    library.baton_program_free.restype = None
    library.baton_program_run.argtypes = [c_void_p, POINTER(Batch), c_int64, c_int64, c_int32]
    library.baton_program_run.restype = c_int32
    library.baton_packed_bytes.argtypes = [c_int32, c_int64, c_int64]
    library.baton_packed_bytes.restype = c_int64
    library.baton_pack.argtypes = [
        *(c_int32, c_void_p, c_int32, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p),
        c_int32,
    ]
    library.baton_pack.restype = None
    return library


@dataclass(frozen=True, slots=True)
class StageInfo:
    """What a stage does; a product's weight is [n, k], so many bytes."""

    kind: str
    n: int
    k: int
    weight_bytes: int


class Program:
    """A forward: `stages` of them, `vocabulary` logits a row. `writes[l]` stages are done when layer
    l's KV is in the pool. The file's pages are shared by every process that maps it."""

    def __init__(self, library: ctypes.CDLL, file: BinaryIO) -> None:
        self._library = library
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("it is empty")
        self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._mapping) < ctypes.sizeof(native.Spec):
            raise ValueError(f"{len(self._mapping)} bytes are no program")
        self.bytes = len(self._mapping)
        begin = numpy.frombuffer(self._mapping, dtype=numpy.uint8)
        spec = native.Spec.from_buffer_copy(self._mapping)
        if spec.file_bytes != len(self._mapping) or not spec.stage_count:
            raise ValueError(f"{len(self._mapping)} bytes, it says {spec.file_bytes}")
        stages = self._array(native.Stage, spec.stages, spec.stage_count)
        buffers = self._array(native.Buffer, spec.buffers, spec.buffer_count)
        self.info: dict[str, Any] = json.loads(
            self._mapping[spec.info : spec.info + spec.info_bytes]
        )
        self.steps = tuple(self._described(each, spec) for each in stages)
        self.stages = len(stages)
        self.writes = [i + 1 for i, each in enumerate(stages) if each.kind == native.WRITE_KV]
        self.vocabulary = next(b.width for b in buffers if b.kind == native.KINDS["logits"])
        self.token_floats, self.pick_floats = spec.token_floats, spec.pick_floats
        self._begin = begin
        self._handle = c_void_p(library.baton_program_new(begin.ctypes.data))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.baton_program_free(self._handle)

    def run(self, batch: Batch, first: int, last: int, threads: int) -> None:
        """Stages first..last-1 of one forward. MemoryError if scratch cannot be had."""
        if self._library.baton_program_run(self._handle, batch, first, last, threads):
            raise MemoryError("no memory for a forward's scratch")

    def _described(self, stage: native.Stage, spec: native.Spec) -> StageInfo:
        kind = native.STAGES[stage.kind]
        if stage.kind != native.PRODUCT:
            return StageInfo(kind, 0, 0, 0)
        weight = self._array(native.Weight, spec.weights, spec.weight_count)[stage.first]
        size = self._library.baton_packed_bytes(weight.type, weight.n, weight.k)
        return StageInfo(kind, weight.n, weight.k, size)

    def _array(self, kind: Any, offset: int, count: int) -> Sequence[Any]:
        array: Sequence[Any] = (kind * count).from_buffer_copy(self._mapping, offset)
        return array
