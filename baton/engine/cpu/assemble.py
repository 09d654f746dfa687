"""Assembles a planned forward into a program's file: stages, operations, constants, and weights in the
order in which the kernels read them. The file is mapped as data; nothing in it is executed."""

import ctypes
import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch

from baton.engine.attention import AttentionParams
from baton.engine.cpu import structures as native
from baton.engine.cpu.layout import MemoryPlan, Merged, RowWork, Step
from baton.engine.cpu.program import checksum
from baton.engine.cpu.values import At, Attend, Base, Grouped, Micro, Space, Value
from baton.engine.errors import CompileError
from baton.kv.layout import KVLayout

PAGE = 4096


def assemble(
    file: BinaryIO,
    library: ctypes.CDLL,
    plan: MemoryPlan,
    layer_params: Sequence[AttentionParams],
    layout: KVLayout,
    *,
    weights: torch.dtype,
    threads: int,
    info: dict[str, object],
) -> None:
    """Write the program to `file`. CompileError if the kernels do not support the KV cache's dtype.
    `threads`: how many pack the weights; `info`: JSON that the program carries along."""
    assembler = _Assembler(file, library, plan, weights, threads)
    stages = [stage for step in plan.steps for stage in assembler.stages(step)]
    layers = [assembler.layer(i, each, layout) for i, each in enumerate(layer_params)]
    text = json.dumps(info).encode()
    found: dict[str, Sequence[Any]] = {
        **{"op": assembler.ops, "stage": stages, "buffer": assembler.buffers},
        **{"weight": assembler.weights, "layer": layers, "table": assembler.tables},
    }
    spec = native.Spec(info=assembler.append(text), info_bytes=len(text))
    parts = [text]
    for name, kind in native.ARRAYS.items():
        parts.append(bytes((kind * len(found[name]))(*found[name])))
        setattr(spec, f"{name}s", assembler.append(parts[-1]))
        setattr(spec, f"{name}_count", len(found[name]))
    spec.token_floats = plan.floats[Space.TOKENS]
    spec.logit_row_floats = plan.floats[Space.LOGIT_ROWS]
    spec.scratch_floats = plan.scratch_floats
    spec.file_bytes = assembler.append(b"")
    spec.checksum = checksum(spec, parts)
    file.truncate(spec.file_bytes)
    file.seek(0)
    file.write(bytes(spec))
    file.flush()


class _Assembler:
    def __init__(
        self,
        file: BinaryIO,
        library: ctypes.CDLL,
        plan: MemoryPlan,
        weights: torch.dtype,
        threads: int,
    ) -> None:
        self.ops: list[native.Op] = []
        self.buffers: list[native.BufferSpec] = []
        self.weights: list[native.Weight] = []
        self.tables: list[native.Table] = []  # constants of row work: fp32, bf16 embeddings as is
        self._file = file
        self._library = library
        self._plan = plan
        self._weights = weights
        self._threads = threads
        self._numbers: dict[Base, int] = {}
        self._known: dict[tuple[object, ...], int] = {}
        self._end = ctypes.sizeof(native.Spec)

    def append(self, data: bytes | torch.Tensor | None) -> int:
        """Write and return the offset, aligned to a page if the data is large, else to 64 bytes."""
        if data is None:
            return 0
        raw: memoryview | bytes = (
            data.contiguous().flatten().view(torch.uint8).numpy().data
            if isinstance(data, torch.Tensor)
            else data
        )
        alignment = PAGE if len(raw) >= PAGE else 64
        start = -(-self._end // alignment) * alignment
        self._file.seek(start)
        self._file.write(raw)
        self._end = start + len(raw)
        return start

    # ---- stages

    def stages(self, step: Step) -> list[native.Stage]:
        if isinstance(step, RowWork):
            first = len(self.ops)
            self.ops += [self._op(micro) for micro in step.micros]
            of_logit_rows = step.space == Space.LOGIT_ROWS
            return [native.Stage(native.ROWS, of_logit_rows, first, len(step.micros))]
        to = self._home(step.to)
        if isinstance(step, Merged):
            self.weights.append(self._packed(step))
            number, of_logit_rows = len(self.weights) - 1, step.to.space == Space.LOGIT_ROWS
            return [
                native.Stage(native.PRODUCT, of_logit_rows, number, 1, self._ref(step.rows), to=to)
            ]
        if isinstance(step, Grouped):
            return [self._grouped(step)]
        key, value, query = (self._ref(each) for each in (step.key, step.value, step.query))
        return [
            native.Stage(native.WRITE_KV, 0, step.layer, 1, key, value),
            native.Stage(native.ATTEND, 0, step.layer, 1, query, to=to),
        ]

    def _grouped(self, step: Grouped) -> native.Stage:
        first, experts = len(self.weights), len(step.weight)
        for i in range(experts):
            bias = None if step.bias is None else step.bias[i]
            one = Merged(step.rows, (step.weight[i].t(),), (bias,), step.to)
            self.weights.append(self._packed(one))
        return native.Stage(
            *(native.GROUPED, step.to.space == Space.LOGIT_ROWS, first, experts),
            *(self._ref(step.rows), self._ref(step.chosen), self._home(step.to)),
            slots=step.chosen.size,
            slot_stride=step.weight.shape[2] if len(step.rows.shape) == 2 else 0,
        )

    def _op(self, micro: Micro) -> native.Op:
        as_it_is = micro.code == "embed_bf16"
        places = [self._operand(at, as_it_is) for at in (micro.to, micro.a, micro.b, micro.c)]
        code = native.CODES.index(micro.code)
        return native.Op(code, 0, micro.outer, micro.inner, *places, micro.x, micro.y)

    def _operand(self, at: At | None, as_it_is: bool) -> native.Operand:
        if at is None:
            return native.Operand(native.NONE)
        strides = at.outer_stride, at.inner_stride
        if isinstance(at.where, torch.Tensor):
            return native.Operand(
                native.CONSTANT, self._table(at.where, as_it_is), at.offset, *strides
            )
        root, offset = at.where.root()
        offset += at.offset
        if root in self._plan.scratch:
            return native.Operand(native.SCRATCH, 0, self._plan.scratch[root] + offset, *strides)
        place = native.GATHERED if at.gathered else native.VALUE
        return native.Operand(place, self._buffer(root), offset, *strides)

    def _ref(self, value: Value) -> native.TensorRef:
        home = self._home(value.base)
        return native.TensorRef(home.buffer, home.offset + value.offset)

    def _home(self, base: Base) -> native.TensorRef:
        root, offset = base.root()
        return native.TensorRef(self._buffer(root), offset)

    def _buffer(self, root: Base) -> int:
        if root not in self._numbers:
            kind = root.space.name.lower() if root.kind == "arena" else root.kind
            width, start = root.width, 0
            if root.kind == "arena":
                width, start = -(-width // 16) * 16, self._plan.starts[root]
            elif kind != "logits":  # an input: after the computed values
                start = self._plan.floats[root.space]
                self._plan.floats[root.space] += 1
            self._numbers[root] = len(self.buffers)
            self.buffers.append(native.BufferSpec(native.KINDS.index(kind), 0, width, start))
        return self._numbers[root]

    # ---- constants

    def _table(self, constant: torch.Tensor, as_it_is: bool) -> int:
        key = (constant.data_ptr(), constant.shape, constant.stride(), constant.dtype, as_it_is)
        if key not in self._known:
            self._known[key] = len(self.tables)
            table = constant.detach() if as_it_is else constant.detach().float()
            self.tables.append(native.Table(self.append(table), table.nbytes))
        return self._known[key]

    def _packed(self, step: Merged) -> native.Weight:
        parts = [weight.detach().t() for weight in step.weights]  # [N, K]
        source = parts[0] if len(parts) == 1 else torch.cat(parts)
        if source.dtype not in (torch.float32, torch.bfloat16):
            source = source.float()
        n, k = source.shape
        quantized = self._weights in native.SCALED
        scaled = quantized and not step.exact
        kind = native.WEIGHTS[torch.float32 if quantized and step.exact else self._weights]
        panels = _aligned(self._library.baton_packed_bytes(kind, n, k))
        scales = torch.empty(n) if scaled else None
        self._library.baton_pack(
            *(kind, source.data_ptr(), source.dtype == torch.bfloat16),
            *(*source.stride(), n, k, panels.data_ptr()),
            *(None if scales is None else scales.data_ptr(), self._threads),
        )
        bias = None
        if any(each is not None for each in step.biases):
            widths = [weight.shape[1] for weight in step.weights]
            bias = torch.cat(
                [
                    torch.zeros(width) if each is None else each.detach().float().reshape(-1)
                    for each, width in zip(step.biases, widths, strict=True)
                ]
            )
        places = [self.append(each) for each in (panels, scales, bias)]
        return native.Weight(kind, n, k, *places)

    def layer(
        self, number: int, params: AttentionParams, layout: KVLayout
    ) -> native.AttentionLayer:
        if layout.dtype not in native.CACHES:
            raise CompileError(f"a KV cache in {layout.dtype} is not supported")
        step = next(s for s in self._plan.steps if isinstance(s, Attend) and s.layer == number)
        shape = layout.layers[number]
        sinks = None if params.sinks is None else params.sinks.detach().float()
        return native.AttentionLayer(
            *(native.CACHES[layout.dtype], None, None, step.query.shape[1], shape.kv_heads),
            *(shape.key_dim, shape.value_dim, params.scaling, params.window or 0),
            *(params.softcap or 0.0, self.append(sinks)),
        )


def _aligned(size: int) -> torch.Tensor:
    """uint8 [size], aligned to 64 bytes."""
    memory = torch.empty(size + 64, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 64 :][:size]
