"""The Forward (engine/runner.py) of a compiled program: one call of native code."""

import time
from array import array
from collections.abc import Sequence

import torch

from baton.engine.attention import AfterLayer
from baton.engine.batch import pack_lists
from baton.engine.cpu import program as native
from baton.engine.cpu.structures import AttentionBatch, ForwardArgs
from baton.engine.pool import Pool
from baton.kv.row import Logits, Row


class NativeRunner:
    """Holds packed weights and no state of sequences. A row's results have the same bits whatever the
    rest of the batch and the number of threads."""

    device = torch.device("cpu")
    backend = "compiled for this CPU"

    def __init__(self, program: native.Program) -> None:
        self._program = program
        self._arena, self._logits = torch.empty(0), torch.empty(0, program.vocabulary)
        self._capacity, self._places = (0, 0), (0, 0)  # their lengths and addresses
        self._last_layer = program.writes[-1]

    @property
    def weight_bytes(self) -> int:
        """The size of the mapped program, nearly all of it weights."""
        return self._program.bytes

    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward: fp32 logits [n, vocabulary]. The next run reuses their memory, because new pages
        for each step would cost as much as sampling."""
        args = self._args(pool, rows)
        self._go(args, self._program.stages, after_layer)
        return self._logits[: args.logit_count]

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """See Forward. Stops after the last layer's keys and values."""
        self._go(self._args(pool, rows), self._last_layer, after_layer)

    def hidden(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward: what the lm_head would multiply. It is not run, so its logits need no memory."""
        wanted = [row._replace(logits=Logits.ALL) for row in rows]
        args = self._args(pool, wanted, logits=False)
        self._go(args, self._program.head, after_layer)
        start, stride, count = self._program.hidden(args.tokens, args.logit_count)
        return self._arena[start:].as_strided((count, self._program.width), (stride, 1))

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """See Forward. Each thread takes the argmax of the logits that it has just computed, which
        saves waking torch's threads."""
        args = self._args(pool, rows)
        found = array("q", bytes(8 * args.logit_count))
        args.argmax = found.buffer_info()[0]
        self._go(args, self._program.stages, None)
        return [None if each < 0 else each for each in found]

    def timed(self, pool: Pool, rows: Sequence[Row]) -> list[tuple[native.StageInfo, float]]:
        """Run stage by stage and return each with its seconds. For benchmarks."""
        args = self._args(pool, rows)
        found = []
        for number, stage in enumerate(self._program.steps):
            begun = time.perf_counter()
            self._program.run(args, number, number + 1, torch.get_num_threads())
            found.append((stage, time.perf_counter() - begun))
        return found

    def _go(self, args: ForwardArgs, end: int, after_layer: AfterLayer | None) -> None:
        threads = torch.get_num_threads()
        done = 0
        if after_layer is not None:
            for layer, stage in enumerate(self._program.writes):
                self._program.run(args, done, stage, threads)
                after_layer(layer)
                done = stage
        if done < end:
            self._program.run(args, done, end, threads)

    def _args(self, pool: Pool, rows: Sequence[Row], *, logits: bool = True) -> ForwardArgs:
        """The arguments of a forward, as pointers. Avoids tensors where it can: once a step's weights
        have displaced the caches, each torch operation takes tens of microseconds."""
        batch = pack_lists(rows, pool.layout.block_size)
        tokens, logit_count = len(batch.input_ids), len(batch.logit_rows)
        self._reserve(
            tokens * self._program.token_floats + logit_count * self._program.logit_row_floats,
            logit_count if logits else 0,
        )
        longs = [
            array("q", each)
            for each in (batch.input_ids, batch.position_ids, batch.logit_rows, batch.slots)
        ]
        ints = [
            array("i", each)
            for each in (batch.query_offsets, batch.context_lengths, batch.block_table)
        ]
        ids, positions, logit_rows, slots = (each.buffer_info()[0] for each in longs)
        keys, values = (each.buffer_info()[0] for each in pool.addresses)
        args = ForwardArgs(
            *(tokens, logit_count, ids, positions, logit_rows),
            AttentionBatch(
                *(len(batch.context_lengths), *(each.buffer_info()[0] for each in ints)),
                *(batch.table_width, pool.layout.block_size, slots),
            ),
            *(keys, values, *self._places, None),
        )
        args.kept = (pool, longs, ints)  # keeps the memory behind the pointers alive
        return args

    def _reserve(self, floats: int, logit_count: int) -> None:
        """Grow the memory for the values of a forward, in floats, and for its logits."""
        if floats > self._capacity[0]:
            self._arena = torch.empty(floats)
        if logit_count > self._capacity[1]:
            self._logits = torch.empty(logit_count, self._program.vocabulary)
        if floats > self._capacity[0] or logit_count > self._capacity[1]:
            self._capacity = len(self._arena), len(self._logits)
            self._places = self._arena.data_ptr(), self._logits.data_ptr()
