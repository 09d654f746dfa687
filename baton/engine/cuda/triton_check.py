"""Puts the Triton kernels to the test on this device before they serve, and makes the runner with them.

The kernels are compiled here, for this card, and a compiler may be wrong. So every kind of layer that the
model has is computed once in every kind of launch, over a pool with random keys, and compared with the
gathered attention in float32. This also compiles what serving will need: no request waits for a compiler.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import torch

from baton.engine.attention import AttentionParams, Kernel
from baton.engine.batch import Batch, pack
from baton.engine.cuda import triton_kernels
from baton.engine.cuda.graphs import Buffers, GraphRunner, Recorder
from baton.engine.cuda.triton_attention import (
    VERSION,
    TritonAttention,
    TritonSteps,
    Tuning,
    tuned,
)
from baton.engine.errors import Unsupported
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.runner import Runner
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row

CAPABILITY = (8, 0)  # the first with copies to shared memory beside computation, and bf16
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest result. Weights are rounded to the dtype of the values, and so are results."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A kind of layer: what the kernels are compiled for."""

    heads: int
    shape: LayerShape
    params: AttentionParams

    def on(self, device: torch.device) -> "Layer":
        """This layer, its sinks on the device."""
        sinks = self.params.sinks
        moved = None if sinks is None else sinks.to(device)
        return replace(self, params=replace(self.params, sinks=moved))

    def same(self, other: "Layer") -> bool:
        """Whether both are one kind: the values of sinks make no other kernel."""
        mine, theirs = (replace(each.params, sinks=None) for each in (self, other))
        sinks = (self.params.sinks is None) == (other.params.sinks is None)
        return sinks and (self.heads, self.shape, mine) == (other.heads, other.shape, theirs)


class Noting:
    """The gathered attention, which notes the kinds of layers that use it."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def plan(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """A PlanKernel (runner.py)."""
        gather = GatherAttention(batch, block_size)

        def attend(
            query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
        ) -> torch.Tensor:
            found = Layer(query.shape[1], pool.layout.layers[layer], params)
            if not any(found.same(each) for each in self.layers):
                self.layers.append(found)
            return gather(query, pool, layer, params)

        return attend


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: (start, tokens) of its rows."""

    name: str
    rows: tuple[tuple[int, int], ...]
    width: int = 0  # of a recorded block table; 0: as wide as the rows need, not recorded


def cases(page: int, tuning: Tuning) -> list[Case]:
    """Every kind of launch: keys in one split and in several, one token a row and more, chunks of prompts
    from the beginning and behind it, recorded and not. Edges of blocks and splits are crossed."""
    split, few = tuning.split, tuning.few
    wide = -(-4 * split // page)
    narrow = max(1, split // page)
    short = ((0, 1), (min(page, split - 1), 1))
    singles = (*short, (split - 1, 1), (split, 1), (2 * split + 5, 1))
    return [
        Case("a decode step", singles),
        Case("a decode step of short rows", short),
        Case("a recorded step", singles, wide),
        Case("a recorded step of short rows", short, narrow),
        Case(
            "a mixed batch",
            ((split - 1, 3), (0, 3 * few + 1), (7, 1), (2 * split + 2 * page + 1, few + 4)),
        ),
        Case("a mixed batch of short rows", ((2, 3), (0, few + 1), (3, 1))),
    ]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is tried, and where."""

    page: int
    dtype: str
    device: torch.device
    tuning: Tuning = field(default_factory=Tuning)
    kernels: ModuleType = triton_kernels

    def check(self, layers: Sequence[Layer]) -> None:
        """Unsupported if the kernels give something else than the gathered attention."""
        allowed = LARGEST_ERROR[getattr(torch, self.dtype)]
        for layer in layers:
            for case in cases(self.page, self.tuning):
                off = self.error_of(case, layer)
                if not off <= allowed:  # also rejects NaN
                    raise Unsupported(
                        f"in {case.name} the results for {layer.heads} heads of "
                        f"{layer.shape.key_dim} numbers differ by {off:.1%} of the largest, "
                        f"{allowed:.2%} are allowed"
                    )

    def error_of(self, case: Case, layer: Layer) -> float:
        """The largest difference from the gathered attention in float32, relative to its largest result.
        NaN if a result is."""
        dice, layer = torch.Generator().manual_seed(0), layer.on(self.device)
        rows = self._rows(case, layer, dice)
        plain = batch = pack(rows, self.page, self.device)
        if case.width:
            buffers = Buffers(len(rows), case.width, self.device)
            buffers.load(rows, self.page)
            batch = buffers.batch
        pool = self._pool(rows, layer, dice)
        count = sum(len(row.token_ids) for row in rows)
        query = torch.randn(count, layer.heads, layer.shape.key_dim, generator=dice)
        query = query.to(self.device, pool.keys[0].dtype)
        attention = TritonAttention(batch, self.page, self.tuning, self.kernels)
        ours = attention(query, pool, 0, layer.params).float()

        exact = Pool.private(
            KVLayout((layer.shape,), self.page, "float32"), pool.blocks, self.device
        )
        exact.keys[0].copy_(pool.keys[0])
        exact.values[0].copy_(pool.values[0])
        theirs = GatherAttention(plain, self.page)(query.float(), exact, 0, layer.params)
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def _rows(self, case: Case, layer: Layer, dice: torch.Generator) -> list[Row]:
        """The rows of a case, their blocks in random order. Nobody's is block 0, which pads tables."""
        needed = [-(-(start + count) // self.page) for start, count in case.rows]
        order = (torch.randperm(sum(needed), generator=dice) + 1).tolist()
        return [
            Row([0] * count, start, [order.pop() for _ in range(blocks)])
            for (start, count), blocks in zip(case.rows, needed, strict=True)
        ]

    def _pool(self, rows: Sequence[Row], layer: Layer, dice: torch.Generator) -> Pool:
        """A pool with the keys and values of the rows. The rest is NaN: it must not be read."""
        blocks = 1 + sum(len(row.blocks) for row in rows)
        pool = Pool.private(KVLayout((layer.shape,), self.page, self.dtype), blocks, self.device)
        for part in (pool.keys[0], pool.values[0]):
            part.fill_(float("nan"))
            for row in rows:
                position = torch.arange(row.end)
                slots = torch.tensor(row.blocks)[position // self.page] * self.page
                numbers = torch.randn(row.end, *part.shape[2:], generator=dice).to(part)
                part.flatten(0, 1)[(slots + position % self.page).to(self.device)] = numbers
        return pool


def with_triton(
    plain: Runner,
    layout: KVLayout,
    make_recorder: Callable[[], Recorder],
    tuning: Tuning | None = None,
) -> GraphRunner:
    """Triton's attention for recorded steps and for all other forwards. Unsupported if this device or
    this model does not allow it, or the kernels fail the check."""
    device = plain.device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            raise Unsupported("the card is older than compute capability {}.{}".format(*CAPABILITY))
        tuning = tuning or tuned(capability)
    tuning = tuning or Tuning()
    noting = Noting()
    Runner(plain.model, noting.plan).fill(Pool.private(layout, 1, device), [Row([0], 0, [0])])
    Setting(layout.block_size, layout.dtype, device, tuning).check(noting.layers)
    runner = Runner(plain.model, partial(TritonAttention, tuning=tuning))
    runner.backend = f"{plain.backend}, Triton {VERSION}"
    return GraphRunner(runner, TritonSteps(tuning), make_recorder)
