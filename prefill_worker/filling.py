"""Filling: the prefill worker's tensors. Where memory is shared it computes KV straight into the decode
pool; elsewhere into its own scratch pool, pushed layer by layer while the next layer computes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from baton import failpoint
from baton.engine.boot import Engine
from baton.engine.device import CoreTaker
from baton.engine.pool import Pool
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.kv.row import Row
from baton.transfer.base import Link
from baton.transfer.registry import CurveKeys, open_link
from baton.wire.messages import Attached
from prefill_worker.scratch import Scratch
from prefill_worker.worker import Chunk

OpenLink = Callable[[str, str, Sequence[Region]], Link]
"""Decode worker, its epoch, its pool's regions -> a link. TransferError if no transport works."""


class Filling:
    """The real PrefillModel (see prefill_worker/worker.py)."""

    def __init__(
        self,
        engine: Engine,
        *,
        writer: str,
        transport: str,
        scratch_tokens: int,
        keys: CurveKeys | None,
        open_link: OpenLink | None = None,
    ) -> None:
        """`open_link` replaces the registry's choice of a transport."""
        self._engine = engine
        self._open_link = open_link
        self._writer = writer
        self._wanted = transport
        self._scratch_tokens = scratch_tokens
        self._keys = keys
        self._links: dict[str, Link] = {}
        self._pools: dict[str, Pool] = {}  # decode pools in shared memory
        self._scratch: Scratch | None = None
        self._cores = CoreTaker()

    # ---- links to the pools

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> Attached:
        self.detach(worker)
        engine = self._engine
        if self._open_link is not None:
            link = self._open_link(worker, epoch, regions)
        else:
            link = open_link(
                regions,
                engine.layout,
                device=engine.device,
                writer=self._writer,
                wanted=self._wanted,
                keys=self._keys,
            )
        self._links[worker] = link
        if link.slabs is not None:
            blocks = next(r.blocks for r in regions if r.transport == link.transport)
            self._pools[worker] = Pool.over(engine.layout, blocks, link.slabs)
        elif self._scratch is None:
            blocks = engine.layout.blocks_for(self._scratch_tokens)
            self._scratch = Scratch(Pool.private(engine.layout, blocks, engine.device))
        return Attached(worker, epoch, link.transport, link.probe(), link.why)

    def detach(self, worker: str) -> None:
        self._pools.pop(worker, None)
        link = self._links.pop(worker, None)
        if link is not None:
            link.close()

    # ---- filling

    def admit(self, grant: Grant, tokens: int) -> bool:
        self._link(grant)
        if grant.worker in self._pools:
            return True
        assert self._scratch is not None
        blocks = self._engine.layout.blocks_for(tokens)
        if blocks > self._scratch.pool.blocks:
            raise TransferError(
                f"{tokens} tokens need {blocks} blocks, this worker's own pool has "
                f"{self._scratch.pool.blocks}; start it with a larger --max-model-len"
            )
        return self._scratch.take(grant.run, blocks)

    def known(self, grant: Grant) -> int:
        """Only a prefix in shared memory can be read in place. Elsewhere it is computed again: fetching
        it takes about as long, and would need a protocol of its own."""
        shared = grant.worker in self._pools
        return len(grant.prefix) * self._engine.layout.block_size if shared else 0

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        shared = self._pools.get(worker)
        if shared is not None:
            rows = [_row(chunk, chunk.grant.table) for chunk in chunks]
            self._engine.runner.fill(shared, rows)
            self._engine.wait()
            return
        scratch, link = self._scratch, self._link(chunks[0].grant)
        assert scratch is not None
        held = [scratch.held[chunk.grant.run] for chunk in chunks]
        rows = [_row(chunk, blocks) for chunk, blocks in zip(chunks, held, strict=True)]

        def push(layer: int) -> None:
            failpoint.hit("prefill.layer")
            for row, chunk, blocks in zip(rows, chunks, held, strict=True):
                touched = self._touched(row, len(chunk.grant.prefix))
                source, target = blocks[touched], chunk.grant.table[touched]
                if target:
                    link.push(chunk.grant, layer, scratch.pool.slabs[layer], source, target)

        self._engine.runner.fill(scratch.pool, rows, after_layer=push)
        self._engine.wait()

    def finish(self, grant: Grant, tokens: int) -> Receipt:
        link = self._link(grant)
        filled = grant.table[len(grant.prefix) : self._engine.layout.blocks_for(tokens)]
        receipt = replace(link.finish(grant, filled), transport=link.transport)
        if self._scratch is not None:
            self._scratch.give_back(grant.run)
        return receipt

    def abandon(self, grant: Grant) -> None:
        link = self._links.get(grant.worker)
        if link is not None:
            link.abandon(grant)
        if self._scratch is not None:
            self._scratch.give_back(grant.run)

    def use_cores(self, cores: tuple[int, ...]) -> None:
        self._cores.use(cores)

    def clock(self) -> float:
        return time.monotonic()

    def _link(self, grant: Grant) -> Link:
        link = self._links.get(grant.worker)
        if link is None:
            raise TransferError(
                f"there is no link to {grant.worker}: it is gone, or was never attached"
            )
        return link

    def _touched(self, row: Row, prefix: int) -> slice:
        """Indices of the blocks that this row writes, after the cached prefix. The last may be partly
        full; then the next row pushes it again."""
        first = row.start // self._engine.layout.block_size
        return slice(max(first, prefix), self._engine.layout.blocks_for(row.end))


def _row(chunk: Chunk, blocks: Sequence[int]) -> Row:
    return Row(chunk.token_ids, chunk.start, blocks, rope_floor=chunk.rope_floor)
