"""Records decode steps once and replays them: one launch on the GPU instead of hundreds of kernels.

A step in which every sequence has one token runs the same operations each time. It is recorded over
fixed memory (ids, positions, slots, contexts, block table, logits), once for each *bucket*: a number
of rows and a width of the block table, both powers of two. A batch is padded to its bucket:

    bucket of 4 rows, 4 blocks      a: 7 9 4 0     b: 3 0 0 0     c: 8 6 0 0     spare: 63 0 0 0

A padding row is one token in the pool's spare block. It reads only what it has just written there,
and its logits are dropped. Other steps (a row of several tokens, after_layer, more rows or blocks
than the largest bucket) run unrecorded.

`prepare` records a ladder of buckets over a worker's pool before it serves. From then on nothing is
recorded, because that takes 0.2 to 1 s in which every stream waits: a step takes the smallest recorded
bucket that it fits, or runs unrecorded, and so do steps over other pools. Without `prepare` a bucket is
recorded when it is first needed, and discarded when another pool is used. `Recorder` abstracts the
recording: CUDA graphs, or plain repetition on any device, for tests.
"""

import logging
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch

from baton.engine.attention import AfterLayer, Kernel, PagedForward
from baton.engine.batch import Batch, pack_lists
from baton.engine.errors import NotRecorded
from baton.engine.gather import GPU_KEYS, GatherAttention, Group
from baton.engine.pool import Pool
from baton.engine.runner import Runner
from baton.kv.row import Logits, Row
from sampler.copies import pinned
from sampler.narrow import greedy

log = logging.getLogger(__name__)

MOST_ROWS = 256
MOST_BLOCKS = 2048  # of one sequence: 32,768 tokens in blocks of 16
WARM_UPS = 2
NARROWEST = 4  # blocks per table row
CHEAP = 4096  # blocks that may be gathered even if few of them are needed
WASTE = 4  # beyond CHEAP, how many blocks may be gathered per needed block
WIDER = 4  # the next table width of the ladder, as a multiple
FEW_ROWS = 4
"""A row of several tokens leaves the graph, and its attention is computed by itself in every layer."""

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records forwards over one pool."""

    def record(self, forward: Replay) -> Replay:
        """A function that repeats `forward` over the same memory. `forward` is called a few times
        for it, so it must be idempotent. Raises NotRecorded."""


class Again:
    """Records nothing: the replay is the function itself. For tests on any device."""

    def record(self, forward: Replay) -> Replay:
        """See Recorder."""
        forward()
        return forward


class CudaGraphs:
    """CUDA graphs. They run one at a time, so all share one memory pool for intermediate results."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, forward: Replay) -> Replay:
        """See Recorder. The warm-up runs on the capture stream: libraries initialise themselves per
        stream at first use, which must not be captured."""
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
        except (RuntimeError, ValueError) as error:  # includes CUDA errors and out of memory
            self._leave(current)
            raise NotRecorded(str(error)) from error
        return graph.replay

    def _leave(self, stream: torch.cuda.Stream) -> None:
        """Go on with this stream and with the usual memory. After a capture that fails torch does
        neither: what comes next would be launched on the capture's stream, and allocated in its pool
        (pytorch#195513)."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # it was closed, or not opened yet
            torch._C._cuda_endAllocateToPool(stream.device.index, self._memory)


class StepAttention(Protocol):
    """Attention for recorded steps: its shapes do not depend on the sequences."""

    def width(self, blocks: Sequence[int]) -> int | None:
        """Columns of the block table for sequences of so many blocks each; None if recording this
        step would be slower."""

    def begin(self, rows: Sequence[Row], block_size: int) -> None:
        """Called on the host before every step, outside the recording, with its rows."""

    def kernel(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """The kernel of one forward; creating it is recorded too. All data of the batch is on the
        device: its `starts` and `lengths` are empty."""


class StaticAttention:
    """The StepAttention of any model and device: gather attention over fixed shapes. It reads the whole
    width of the block table, not only what a sequence has."""

    def width(self, blocks: Sequence[int]) -> int | None:
        """None for one long sequence among many short ones, which gather.py groups better."""
        width = max(NARROWEST, power_of_two(max(blocks)))
        gathered = width * power_of_two(len(blocks))
        return width if gathered <= max(CHEAP, WASTE * sum(blocks)) else None

    def begin(self, rows: Sequence[Row], block_size: int) -> None:
        """Does nothing: all it needs is in the batch's memory."""

    def kernel(self, batch: Batch[torch.Tensor], block_size: int) -> Kernel:
        """See StepAttention."""
        return GatherAttention(batch, block_size, static_groups)


def static_groups(batch: Batch[torch.Tensor], block_size: int, window: int | None) -> list[Group]:
    """Groups of all rows, with at most GPU_KEYS keys each. Positions past a sequence's end, or in the
    padding of its table, read its first key and are masked: unwritten memory may hold NaN."""
    count, width = batch.block_table.shape
    keys = width * block_size if window is None else min(width * block_size, window)
    context = batch.context_lengths[:, None]  # [rows, 1]
    first = (context - keys).clamp_min(0)
    position = first + torch.arange(keys, device=context.device)  # [rows, keys]
    seen = position < context
    inside = torch.where(seen, position, first)
    block = batch.block_table.gather(1, inside // block_size)
    slots = block * block_size + inside % block_size
    tokens = torch.arange(count, device=context.device)
    step = max(1, GPU_KEYS // keys)
    return [
        Group(
            rows=min(step, count - i),
            tokens=tokens[i : i + step],
            slots=slots[i : i + step].flatten(),
            mask=seen[i : i + step, None, None],
            causal=False,
        )
        for i in range(0, count, step)
    ]


class Buffers:
    """The fixed input memory of one bucket."""

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
        """Overwrite all input in one transfer, for which the host does not wait."""
        batch = pack_lists(rows, block_size, self.width)
        flat = [batch.input_ids, batch.position_ids, batch.slots, batch.context_lengths]
        parts = [*flat, batch.block_table]
        numbers = array("q", [number for part in parts for number in part])
        given = torch.frombuffer(numbers, dtype=torch.int64)
        self._numbers.copy_(pinned(given), non_blocking=True)


class GraphRunner:
    """The Forward (engine/runner.py) that replays decode steps and runs all others by `plain`."""

    def __init__(
        self, plain: Runner, attention: StepAttention, make_recorder: Callable[[], Recorder]
    ) -> None:
        self.plain = plain
        self.device = plain.device
        self.backend = plain.backend
        self.failure = ""  # why recording stopped; existing recordings stay in use
        self.replayed = 0  # number of replayed steps
        self.draft_rows: int | None = (
            FEW_ROWS  # with more sequences drafts cost more than they save
        )
        self._attention = attention
        self._make_recorder = make_recorder
        self.forget()

    def forget(self) -> None:
        """Release the pool and all recordings over it."""
        self._pool: Pool | None = None
        self._prepared = False
        self._recorder: Recorder | None = None
        self._steps: dict[tuple[int, int], tuple[Buffers, Replay]] = {}
        self._logits: dict[int, torch.Tensor] = {}  # by rows: [rows, vocabulary]

    @torch.inference_mode()
    def prepare(self, pool: Pool, most_rows: int, most_tokens: int) -> None:
        """Record every bucket that steps over this pool need: of 1, 2, 4 ... `most_rows` sequences with
        `most_tokens` tokens at most. The largest comes first, so the others find its memory. A
        step that cannot be recorded is one that runs unrecorded."""
        self.forget()
        self._pool, self._recorder = pool, self._make_recorder()
        most_blocks = min(pool.layout.blocks_for(most_tokens), MOST_BLOCKS)
        for count, width in ladder(self._attention, most_rows, most_blocks, pool.blocks):
            rows = [Row([0], 0, [pool.spare or 0], Logits.LAST)] * count
            if self._ready(pool, rows, (count, width)) is None:
                break
        self._prepared = True

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """See Forward."""
        self.plain.fill(pool, rows, after_layer)

    def hidden(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        return self.plain.hidden(pool, rows, after_layer)

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
            if self._prepared:
                return self.plain.run(pool, rows)
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
        """Load the input and return the bucket's replay; None if it cannot be recorded."""
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
        """Rows and table width; None if this batch cannot use a recording."""
        if any(len(row.token_ids) != 1 or row.logits is Logits.NONE for row in rows):
            return None
        count = power_of_two(len(rows))
        used = [pool.layout.blocks_for(row.end) for row in rows]
        if count > MOST_ROWS or max(used) > MOST_BLOCKS:
            return None
        if pool.spare is None and count != len(rows):
            return None
        width = self._attention.width(used)
        if width is None or not self._prepared:
            return None if width is None else (count, width)
        rows_of = {count} if pool.spare is None else range(count, MOST_ROWS + 1)
        fitting = [b for b in self._steps if b[0] in rows_of and b[1] >= width]
        return min(fitting, default=None)  # fewer rows before a narrower table

    def _record(self, pool: Pool, buffers: Buffers) -> Replay | None:
        def forward() -> None:
            kernel = self._attention.kernel(buffers.batch, pool.layout.block_size)
            found = self.plain.logits(PagedForward(pool, buffers.batch, kernel))
            if (
                buffers.rows not in self._logits
            ):  # allocated before the capture, shared by all widths
                self._logits[buffers.rows] = torch.empty_like(found)
            self._logits[buffers.rows].copy_(found)

        assert self._recorder is not None
        try:
            return self._recorder.record(forward)
        except NotRecorded as error:
            self.failure = (str(error) or "no reason given").splitlines()[0]
            log.warning("decode steps are no longer recorded, which is slower: %s", self.failure)
            return None


def ladder(
    attention: StepAttention, most_rows: int, most_blocks: int, pool_blocks: int
) -> list[tuple[int, int]]:
    """The buckets to record, largest first: rows by powers of two, table widths by powers of WIDER. A
    bucket that would gather many times what the whole pool holds is left out."""
    lengths = [NARROWEST]
    while lengths[-1] < most_blocks:
        lengths.append(min(WIDER * lengths[-1], most_blocks))
    widths = {attention.width([length]) for length in lengths} - {None}
    largest = min(power_of_two(most_rows), MOST_ROWS)
    return [
        (1 << bit, width)
        for bit in reversed(range(largest.bit_length()))
        for width in sorted((each for each in widths if each is not None), reverse=True)
        if width << bit <= max(CHEAP, WASTE * pool_blocks)
    ]


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()
