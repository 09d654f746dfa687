"""Decode steps recorded once and replayed: one order to the GPU instead of hundreds of small ones.

A step in which every sequence has one token does the same operations each time. So it is recorded
over memory that stays in place (ids, positions, slots, contexts, block table, logits), once for each
*bucket*: a number of rows and a width of the block table, powers of two. A batch is padded to it:

    bucket of 4 rows, 4 blocks      a: 7 9 4 0     b: 3 0 0 0     c: 8 6 0 0     spare: 63 0 0 0

A row that nobody needs is one token in the pool's spare block: it reads what it has just written
there, nobody else does, and its logits are dropped. What is no such step (a row of several tokens,
after_layer, more rows or blocks than the largest bucket) runs unrecorded, as without this file.

Recordings are made when a bucket is first needed, and belong to one pool: when another one comes,
all are made anew. How to record is behind `Recorder`: CUDA graphs, or on any device simply again.
"""

import logging
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from baton.engine.attention import AfterLayer, Kernel, PagedForward
from baton.engine.batch import Batch, pack_lists
from baton.engine.errors import NotRecorded
from baton.engine.pool import Pool
from baton.engine.runner import Runner
from baton.kv.row import Logits, Row
from sampler.narrow import greedy

log = logging.getLogger(__name__)

MOST_ROWS = 256
MOST_BLOCKS = 2048  # of one sequence: 32,768 tokens in blocks of 16
WARM_UPS = 2

Replay = Callable[[], None]


class Recorder(Protocol):
    """Makes replays, all for one pool."""

    def record(self, forward: Replay) -> Replay:
        """What does the same as `forward`, over the same memory. `forward` is called a few times
        now, so it must be no matter how often it runs. Raises NotRecorded."""


class Again:
    """The slow sibling: nothing is recorded, the function is called again."""

    def record(self, forward: Replay) -> Replay:
        """See Recorder."""
        forward()
        return forward


class CudaGraphs:
    """All graphs share one memory for what lies between input and logits: they run one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, forward: Replay) -> Replay:
        """See Recorder. Warmed up on the stream it is captured on, as libraries set themselves up
        for each stream at first use, which no graph may hold."""
        current = torch.cuda.current_stream(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    forward()
            current.wait_stream(self._stream)
            with torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ):
                forward()
        except (RuntimeError, ValueError) as error:  # CUDA's errors and out of memory among them
            raise NotRecorded(str(error)) from error
        return graph.replay


class StepAttention(Protocol):
    """Attention that can be recorded."""

    def width(self, blocks: Sequence[int]) -> int | None:
        """Columns of the block table it needs for sequences of so many blocks each; None if this
        step had better not be recorded."""

    def begin(self, rows: Sequence[Row], block_size: int) -> None:
        """Before every step, on the host and never recorded: this is what it is about."""

    def kernel(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """At the head of a forward, recorded with it. The batch says nothing to the host: its
        `starts` and `lengths` are empty."""


class Buffers:
    """The fixed memory of one bucket's input."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows, self.width = rows, width
        self._numbers = torch.zeros(rows * (4 + width), dtype=torch.int64, device=device)
        parts = self._numbers.split([rows] * 4 + [rows * width])
        counted = torch.arange(rows + 1, device=device)
        self.batch = Batch(
            input_ids=parts[0][None],
            position_ids=parts[1][None],
            slots=parts[2],
            query_offsets=counted.int(),
            context_lengths=parts[3],
            block_table=parts[4].view(rows, width),
            logit_rows=counted[:rows],
            table_width=width,
            starts=(),
            lengths=(),
        )

    def load(self, rows: Sequence[Row], block_size: int) -> None:
        """All of it in one transfer, so nothing of an earlier step is left."""
        batch = pack_lists(rows, block_size, self.width)
        flat = [batch.input_ids, batch.position_ids, batch.slots, batch.context_lengths]
        parts = [*flat, batch.block_table]
        numbers = array("q", [number for part in parts for number in part])
        self._numbers.copy_(torch.frombuffer(numbers, dtype=torch.int64))


class GraphRunner:
    """The Forward (see engine/runner.py) that replays decode steps and leaves the rest to `plain`."""

    def __init__(
        self, plain: Runner, attention: StepAttention, make_recorder: Callable[[], Recorder]
    ) -> None:
        self.plain = plain
        self.device = plain.device
        self.backend = plain.backend
        self.failure = ""  # why nothing more is recorded; what has been goes on
        self.replayed = 0  # steps that came from a recording
        self._attention = attention
        self._make_recorder = make_recorder
        self.forget()

    def forget(self) -> None:
        """Let go of the pool and of all that was recorded over it."""
        self._pool: Pool | None = None
        self._recorder: Recorder | None = None
        self._steps: dict[tuple[int, int], tuple[Buffers, Replay]] = {}
        self._logits: dict[int, torch.Tensor] = {}  # by rows: [rows, vocabulary]

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """See Forward."""
        self.plain.fill(pool, rows, after_layer)

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """See Forward."""
        return greedy(self.run(pool, rows))

    @torch.inference_mode()
    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        bucket = None if after_layer is not None else self._bucket(pool, rows)
        if bucket is None:
            return self.plain.run(pool, rows, after_layer)
        if self._pool is not pool:
            self.forget()
            self._pool, self._recorder = pool, self._make_recorder()
        spares = [Row([0], 0, [pool.spare or 0])] * (bucket[0] - len(rows))
        replay = self._ready(pool, [*rows, *spares], bucket)
        if replay is None:
            return self.plain.run(pool, rows)
        replay()
        self.replayed += 1
        return self._logits[bucket[0]][: len(rows)]

    def _ready(self, pool: Pool, rows: Sequence[Row], bucket: tuple[int, int]) -> Replay | None:
        """The bucket's replay, its input in place; None if it cannot be recorded."""
        known = self._steps.get(bucket)
        if known is None and self.failure:
            return None
        buffers = known[0] if known else Buffers(*bucket, self.device)
        buffers.load(rows, pool.layout.block_size)
        self._attention.begin(rows, pool.layout.block_size)
        if known is not None:
            return known[1]
        replay = self._record(pool, buffers)
        if replay is not None:
            self._steps[bucket] = (buffers, replay)
        return replay

    def _bucket(self, pool: Pool, rows: Sequence[Row]) -> tuple[int, int] | None:
        """Rows and width; None if this batch is not for a recording."""
        if any(len(row.token_ids) != 1 or row.logits is Logits.NONE for row in rows):
            return None
        count = power_of_two(len(rows))
        used = [pool.layout.blocks_for(row.end) for row in rows]
        if count > MOST_ROWS or max(used) > MOST_BLOCKS:
            return None
        if pool.spare is None and count != len(rows):
            return None
        width = self._attention.width(used)
        return None if width is None else (count, width)

    def _record(self, pool: Pool, buffers: Buffers) -> Replay | None:
        def forward() -> None:
            kernel = self._attention.kernel(buffers.batch, pool.layout.block_size)
            found = self.plain.logits(PagedForward(pool, buffers.batch, kernel))
            if buffers.rows not in self._logits:  # not what is recorded: one for all widths
                self._logits[buffers.rows] = torch.empty_like(found)
            self._logits[buffers.rows].copy_(found)

        assert self._recorder is not None
        try:
            return self._recorder.record(forward)
        except NotRecorded as error:
            self.failure = (str(error) or "for no reason it gives").splitlines()[0]
            log.warning(
                "from now on decode steps run unrecorded, which is slower: %s", self.failure
            )
            return None


def power_of_two(least: int) -> int:
    """The next one."""
    return 1 << (least - 1).bit_length()
