"""NativeRunner: a Runner (see engine/runner.py) whose forward is one call of native code."""

import time
from array import array
from collections.abc import Sequence

import torch

from baton.engine.attention import AfterLayer
from baton.engine.batch import lay
from baton.engine.cpu import program as native
from baton.engine.cpu.structures import AttentionBatch
from baton.engine.pool import Pool
from baton.kv.row import Row


class NativeRunner:
    """Holds packed weights, no sequence's state. Results are the same bits whatever else is in the
    batch, and however many threads there are."""

    device = torch.device("cpu")
    how = "compiled for this CPU"

    def __init__(self, program: native.Program) -> None:
        self._program = program
        self._arena, self._logits = torch.empty(0), torch.empty(0, program.vocabulary)
        self._room, self._places = (0, 0), (0, 0)  # their lengths, and where they begin
        self._last_layer = program.writes[-1]

    @property
    def weight_bytes(self) -> int:
        """What the mapped program takes: all weights, and the little beside them."""
        return self._program.bytes

    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """As Runner.run: fp32 logits [n, vocabulary], in memory that the next run uses again (new
        pages every step would cost as much as sampling from them)."""
        order = self._order(pool, rows)
        self._go(order, self._program.stages, after_layer)
        return self._logits[: order.picks]

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """As Runner.fill. It ends with the last layer's keys and values: what follows them would
        only serve logits."""
        self._go(self._order(pool, rows), self._last_layer, after_layer)

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """As Runner.greedy, in the same call: each thread looks through the logits that it has just
        computed. torch's own threads would have to be woken for it."""
        order = self._order(pool, rows)
        found = array("q", bytes(8 * order.picks))
        order.likeliest = found.buffer_info()[0]
        self._go(order, self._program.stages, None)
        return [None if each < 0 else each for each in found]

    def timed(self, pool: Pool, rows: Sequence[Row]) -> list[tuple[native.StageInfo, float]]:
        """As run, stage by stage: each and its seconds. For benchmarks."""
        order = self._order(pool, rows)
        found = []
        for number, stage in enumerate(self._program.steps):
            begun = time.perf_counter()
            self._program.run(order, number, number + 1, torch.get_num_threads())
            found.append((stage, time.perf_counter() - begun))
        return found

    def _go(self, order: native.Batch, end: int, after_layer: AfterLayer | None) -> None:
        threads = torch.get_num_threads()
        done = 0
        if after_layer is not None:
            for layer, stage in enumerate(self._program.writes):
                self._program.run(order, done, stage, threads)
                after_layer(layer)
                done = stage
        if done < end:
            self._program.run(order, done, end, threads)

    def _order(self, pool: Pool, rows: Sequence[Row]) -> native.Batch:
        """A batch of pointers. No tensor is touched, if there is room: after a step's weights have
        gone through the caches each operation of torch takes tens of microseconds."""
        laid = lay(rows, pool.layout.block_size)
        tokens, picks = len(laid.ids), len(laid.logit_rows)
        self._make_room(
            tokens * self._program.token_floats + picks * self._program.pick_floats, picks
        )
        longs = [
            array("q", each) for each in (laid.ids, laid.positions, laid.logit_rows, laid.slots)
        ]
        ints = [array("i", each) for each in (laid.offsets, laid.contexts, laid.table)]
        ids, positions, picked, slots = (each.buffer_info()[0] for each in longs)
        keys, values = (each.buffer_info()[0] for each in pool.addresses)
        order = native.Batch(
            *(tokens, picks, ids, positions, picked),
            AttentionBatch(
                *(len(laid.contexts), *(each.buffer_info()[0] for each in ints)),
                *(laid.width, pool.layout.block_size, slots),
            ),
            *(keys, values, *self._places, None),
        )
        order.kept = (pool, longs, ints)  # what the pointers point to
        return order

    def _make_room(self, floats: int, picks: int) -> None:
        """For the values of a forward, and its logits."""
        if floats > self._room[0]:
            self._arena = torch.empty(floats)
        if picks > self._room[1]:
            self._logits = torch.empty(picks, self._program.vocabulary)
        if floats > self._room[0] or picks > self._room[1]:
            self._room = len(self._arena), len(self._logits)
            self._places = self._arena.data_ptr(), self._logits.data_ptr()
