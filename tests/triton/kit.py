"""What the tests of the Triton kernels share. Importing it needs triton: `pytest.importorskip` it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.cuda import triton_kernels
from baton.engine.cuda.graphs import Again, Buffers, CudaGraphs, Recorder
from baton.engine.cuda.triton_attention import TritonAttention, Tuning
from baton.engine.cuda.triton_check import Layer, Setting
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row
from tests.torch.families import make_model

PAGE = 4
TINY = Tuning(split=16, few=4, queries=32, step=16, splits_joined=4, scratch_bytes=8 << 10)
"""Several splits, steps and launches in sequences of some forty tokens."""

PLAIN = Layer(6, LayerShape(2, 24, 12), AttentionParams(0.2))
PECULIAR = Layer(
    6,
    LayerShape(2, 24, 12),
    AttentionParams(
        0.2, window=9, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])
    ),
)


def setting(
    device: torch.device, dtype: str = "float32", kernels: ModuleType = triton_kernels
) -> Setting:
    """The tiny setting of most tests."""
    return Setting(PAGE, dtype, device, TINY, kernels)


def plain_on(family: str, device: torch.device) -> tuple[Runner, KVLayout]:
    """A tiny model of this family in torch, and its layout in blocks of PAGE tokens."""
    model: Any = make_model(family).to(device)
    return Runner(model), discover_layout(model, PAGE, torch.float32)


def recorder(device: torch.device) -> Recorder:
    """CUDA graphs where there is a GPU, else the function called again."""
    return CudaGraphs(device) if device.type == "cuda" else Again()


def module_of(source: str, folder: Path, name: str) -> Any:
    """A module with this text. Triton reads it from the file."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, slots=True)
class World:
    """Rows over one pool, of which any may be in a batch. (start, tokens) of each."""

    pool: Pool
    rows: Sequence[Row]
    queries: Sequence[torch.Tensor]  # [tokens, heads, DK] each
    layer: Layer

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], layer: Layer, device: torch.device) -> "World":
        """Random keys, values and queries. Blocks are given out from the end."""
        dice, layer = torch.Generator().manual_seed(1), layer.on(device)
        layout = KVLayout((layer.shape,), PAGE, "float32")
        needed = [layout.blocks_for(start + count) for start, count in spans]
        free = list(range(sum(needed)))
        pool = Pool.private(layout, len(free), device)
        for part in (pool.keys[0], pool.values[0]):
            part.copy_(torch.randn(part.shape, generator=dice))
        rows = [
            Row([0] * count, start, [free.pop() for _ in range(blocks)])
            for (start, count), blocks in zip(spans, needed, strict=True)
        ]
        shape = (layer.heads, layer.shape.key_dim)
        queries = [torch.randn(count, *shape, generator=dice).to(device) for _, count in spans]
        return cls(pool, rows, queries, layer)

    def attend(self, present: Sequence[int], width: int | None = None) -> list[torch.Tensor]:
        """The result of each row that is present, in one batch; recorded with a table of this width."""
        rows = [self.rows[i] for i in present]
        batch = pack(rows, PAGE, self.pool.device)
        if width is not None:
            buffers = Buffers(len(rows), width, self.pool.device)
            buffers.load(rows, PAGE)
            batch = buffers.batch
        query = torch.cat([self.queries[i] for i in present])
        found = TritonAttention(batch, PAGE, TINY)(query, self.pool, 0, self.layer.params)
        return list(found.split([len(row.token_ids) for row in rows]))
