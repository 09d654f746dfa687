"""NativeRunner: a Runner (see engine/runner.py) whose forward is one call of native code."""

import time
from collections.abc import Sequence

import torch

from baton.engine.attention import AfterLayer
from baton.engine.batch import Batch, pack
from baton.engine.fast import program as native
from baton.engine.fast.structures import AttentionBatch
from baton.engine.pool import Pool
from baton.kv.row import Row


class NativeRunner:
    """Holds packed weights, no sequence's state. Results are the same bits whatever else is in the
    batch, and however many threads there are."""

    device = torch.device("cpu")
    how = "compiled for this CPU"

    def __init__(self, program: native.Program) -> None:
        self._program = program
        self._arena = torch.empty(0)
        self._logits = torch.empty(0)
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
        batch = pack(rows, pool.layout.block_size, self.device)
        logits = self._room_for(len(batch.logit_rows))
        self._go(pool, batch, logits, self._program.stages, after_layer)
        return logits

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """As Runner.fill. It ends with the last layer's keys and values: what follows them would
        only serve logits."""
        batch = pack(rows, pool.layout.block_size, self.device)
        self._go(pool, batch, torch.empty(0), self._last_layer, after_layer)

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Forward. By the threads of the forward, which are still awake: torch's own would have
        to be woken, for more than this takes."""
        return self._program.likeliest(logits, torch.get_num_threads())

    def timed(self, pool: Pool, rows: Sequence[Row]) -> list[tuple[native.StageInfo, float]]:
        """As run, stage by stage: each and its seconds. For benchmarks."""
        batch = pack(rows, pool.layout.block_size, self.device)
        order = self._order(
            pool, batch, torch.empty(len(batch.logit_rows), self._program.vocabulary)
        )
        found = []
        for number, stage in enumerate(self._program.steps):
            begun = time.perf_counter()
            self._program.run(order, number, number + 1, torch.get_num_threads())
            found.append((stage, time.perf_counter() - begun))
        return found

    def _room_for(self, rows: int) -> torch.Tensor:
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self._program.vocabulary)
        return self._logits[:rows]

    def _go(
        self,
        pool: Pool,
        batch: Batch,
        logits: torch.Tensor,
        end: int,
        after_layer: AfterLayer | None,
    ) -> None:
        order = self._order(pool, batch, logits)
        threads = torch.get_num_threads()
        done = 0
        if after_layer is not None:
            for layer, stage in enumerate(self._program.writes):
                self._program.run(order, done, stage, threads)
                after_layer(layer)
                done = stage
        if done < end:
            self._program.run(order, done, end, threads)

    def _order(self, pool: Pool, batch: Batch, logits: torch.Tensor) -> native.Batch:
        tokens, picks = batch.slots.shape[0], batch.logit_rows.shape[0]
        floats = tokens * self._program.token_floats + picks * self._program.pick_floats
        if len(self._arena) < floats:
            self._arena = torch.empty(floats)
        order = native.Batch(
            *(tokens, picks, batch.input_ids.data_ptr(), batch.position_ids.data_ptr()),
            batch.logit_rows.data_ptr(),
            AttentionBatch(
                *(len(batch.starts), batch.query_offsets.data_ptr()),
                *(batch.context_lengths.data_ptr(), batch.block_table.data_ptr()),
                *(batch.block_table.shape[1], pool.layout.block_size, batch.slots.data_ptr()),
            ),
            *(native.addresses(pool.keys), native.addresses(pool.values)),
            *(self._arena.data_ptr(), logits.data_ptr()),
        )
        order.kept = (pool, batch, logits)  # what the pointers point to
        return order
