"""A model's forward as a memory-mapped file that native code runs (native/program.cpp)."""

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy

from baton.engine.cpu import structures as native


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' types declared. CompileError if its structures differ from
    Python's (structures.py)."""
    native.check_abi(library, native.PROGRAM)
    library.baton_program_fault.argtypes = [c_void_p, c_int64]
    library.baton_program_fault.restype = c_char_p
    library.baton_program_new.argtypes = [c_void_p]
    library.baton_program_new.restype = c_void_p
    library.baton_program_free.argtypes = [c_void_p]
    library.baton_program_free.restype = None
    library.baton_program_run.argtypes = [
        c_void_p,
        POINTER(native.ForwardArgs),
        c_int64,
        c_int64,
        c_int32,
    ]
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
    """A stage's kind; for a product also its weight, [n, k], and the packed size in bytes: 0 for a
    grouped one, which reads what the tokens choose."""

    kind: str
    n: int
    k: int
    weight_bytes: int


class Program:
    """A forward in `stages` stages, with `vocabulary` logits per row. Layer l's KV is in the pool after
    `writes[l]` stages. Stage `head` is the lm_head, whose input has `width` numbers a row. All processes
    that map the file share its pages."""

    def __init__(self, library: ctypes.CDLL, file: BinaryIO) -> None:
        """ValueError if the file is damaged: every offset, index and extent is checked once, here.
        The contents of weights and constants are not, because reading all of them takes long."""
        self._library = library
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("it is empty")
        self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = len(self._mapping)
        begin = numpy.frombuffer(self._mapping, dtype=numpy.uint8)
        if fault := library.baton_program_fault(begin.ctypes.data, self.bytes):
            raise ValueError(fault.decode())
        spec = native.Spec.from_buffer_copy(self._mapping)
        arrays = {
            name: self._array(kind, getattr(spec, f"{name}s"), getattr(spec, f"{name}_count"))
            for name, kind in native.ARRAYS.items()
        }
        info = self._mapping[spec.info : spec.info + spec.info_bytes]
        if spec.checksum != checksum(spec, [info, *(bytes(each) for each in arrays.values())]):
            raise ValueError("its checksum is wrong")
        stages, buffers = arrays["stage"], arrays["buffer"]
        self.info: dict[str, Any] = json.loads(info)
        self.steps = tuple(self._described(each, arrays["weight"]) for each in stages)
        self.stages = len(stages)
        self.writes = [i + 1 for i, each in enumerate(stages) if each.kind == native.WRITE_KV]
        self.head = max(i for i, each in enumerate(stages) if each.kind == native.PRODUCT)
        rows = stages[self.head].a
        self._hidden = buffers[rows.buffer], rows.offset
        self.width = arrays["weight"][stages[self.head].first].k
        self.vocabulary = next(b.width for b in buffers if b.kind == native.LOGITS)
        self.token_floats, self.logit_row_floats = spec.token_floats, spec.logit_row_floats
        self._begin = begin
        self._handle = c_void_p(library.baton_program_new(begin.ctypes.data))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.baton_program_free(self._handle)

    def run(self, args: native.ForwardArgs, first: int, last: int, threads: int) -> None:
        """Run stages first..last-1 of a forward. MemoryError if there is no scratch memory."""
        if self._library.baton_program_run(self._handle, args, first, last, threads):
            raise MemoryError("cannot allocate the scratch memory of a forward")

    def hidden(self, tokens: int, logit_count: int) -> tuple[int, int, int]:
        """Where in a forward's memory the lm_head's input is once all stages before it have run: the
        place of its first row and the distance between rows, in floats; and the number of rows."""
        buffer, offset = self._hidden
        if native.KINDS[buffer.kind] == "logit_rows":
            start = self.token_floats * tokens + buffer.offset * logit_count
            return start + offset, buffer.width, logit_count
        return buffer.offset * tokens + offset, buffer.width, tokens

    def _described(self, stage: native.Stage, weights: Sequence[native.Weight]) -> StageInfo:
        kind = native.STAGES[stage.kind]
        if stage.kind not in (native.PRODUCT, native.GROUPED):
            return StageInfo(kind, 0, 0, 0)
        weight = weights[stage.first]
        if stage.kind == native.GROUPED:
            return StageInfo(kind, weight.n, weight.k, 0)
        size = self._library.baton_packed_bytes(weight.type, weight.n, weight.k)
        return StageInfo(kind, weight.n, weight.k, size)

    def _array(self, kind: type[ctypes.Structure], offset: int, count: int) -> Any:
        return (kind * count).from_buffer_copy(self._mapping, offset)


def checksum(spec: native.Spec, parts: Sequence[bytes]) -> int:
    """The checksum of a program's head and its parts: info, then ARRAYS in their order."""
    digest = hashlib.blake2b(bytes(spec)[: native.Spec.checksum.offset], digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)
