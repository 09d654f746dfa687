"""Filling: the prefill worker's tensors. Where memory is shared it computes KV straight into the decode
pool; elsewhere into its own scratch pool, pushed layer by layer while the next layer computes."""

import time
from collections.abc import Sequence
from functools import partial

from baton import failpoint
from baton.engine.boot import Engine
from baton.engine.device import CoreTaker
from baton.engine.errors import within_memory
from baton.engine.pool import Pool
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.kv.row import Logits, Row
from baton.transfer.base import Link
from baton.transfer.registry import Courier, CurveKeys, open_way
from baton.wire.messages import Attached
from prefill_worker.model import Chunk, News
from prefill_worker.own_pool import keep_finite, own_pool
from prefill_worker.pooled import Embeddings
from prefill_worker.resend import Resend
from prefill_worker.scratch import Scratch
from prefill_worker.ways import OpenWay, Ways


class Filling:
    """The real PrefillModel (see prefill_worker/model.py)."""

    def __init__(
        self,
        engine: Engine,
        *,
        writer: str,
        transport: str,
        scratch_tokens: int,
        keys: CurveKeys | None,
        open_link: OpenWay | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """`open_link` replaces the registry's choice of a transport. `cache_bytes`: see own_pool()."""
        self._engine = engine
        self._writer = writer
        self._wanted = transport
        self._scratch_tokens, self._cache_bytes = scratch_tokens, cache_bytes
        self._keys = keys
        self._ways = Ways(open_link or self._open_way)
        self._pools: dict[str, Pool] = {}  # decode pools in shared memory
        self._scratch: Scratch | None = None
        self._own: Pool | None = None  # the scratch's
        self._resend = Resend()
        self._cores = CoreTaker()
        self._embeddings = Embeddings()

    # ---- ways to the pools

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> Attached | None:
        self.detach(worker)
        attached = self._ways.attach(worker, epoch, regions)
        engine, link = self._engine, self._ways.get(worker)
        if link is not None and not isinstance(link, Courier) and link.slabs is not None:
            region = next(r for r in regions if r.transport == link.transport)
            self._pools[worker] = engine.pools.over(link.slabs, region.blocks, lambda: region)
        elif self._scratch is None:
            self._own, self._scratch = own_pool(engine, self._scratch_tokens, self._cache_bytes)
        return attached

    def _open_way(self, worker: str, epoch: str, regions: Sequence[Region]) -> Link | Courier:
        return open_way(
            regions,
            self._engine.layout,
            epoch=epoch,
            device=self._engine.pools.memory,
            writer=self._writer,
            wanted=self._wanted,
            keys=self._keys,
        )

    def detach(self, worker: str) -> None:
        if (pool := self._pools.pop(worker, None)) is not None:
            self._engine.pools.drop(pool)
        self._ways.detach(worker)

    def close(self) -> None:
        """Close the ways."""
        self._pools.clear()
        self._ways.close()

    def poll(self) -> list[News]:
        news = self._ways.poll()
        if self._own is not None:
            self._resend.step(self._ways, self._own)
        return news

    def takes(self, worker: str) -> bool:
        return self._ways.takes(worker) and not self._resend.waits(worker)

    @property
    def waits(self) -> bool:
        return self._ways.busy

    # ---- filling

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        self._ways.to(grant.worker)
        if grant.worker in self._pools:
            return True
        assert self._scratch is not None
        blocks = self._engine.layout.blocks_for(tokens)
        if blocks > self._scratch.blocks:
            raise TransferError(
                f"{tokens} tokens need {blocks} blocks, this worker's own pool has "
                f"{self._scratch.blocks}; start it with a larger --max-model-len"
            )
        most = (tokens - 1) // self._engine.layout.block_size  # one token is left for a forward
        if self._scratch.take(grant.run, blocks, block_hashes, most):
            lacking = slice(len(grant.prefix), self._scratch.known(grant.run))
            source, target = self._scratch.held[grant.run][lacking], grant.table[lacking]
            self._resend.add(grant, source, target)
            return True
        self._ways.make_room()
        return False

    def known(self, grant: Grant) -> int:
        """A prefix in shared memory is read in place, elsewhere what was kept of it."""
        scratch, known = self._scratch, len(grant.prefix)
        if grant.worker not in self._pools:
            assert scratch is not None
            known = scratch.known(grant.run)
        return known * self._engine.layout.block_size

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        run = partial(self._fill, worker, chunks)
        within_memory("a chunk of a prompt", self._engine.device, run)

    def _fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        failpoint.hit("prefill.forward")
        shared = self._pools.get(worker)
        if shared is not None:
            rows = [_row(chunk, chunk.grant.table) for chunk in chunks]
            self._embeddings.fill(self._engine.runner, shared, chunks, rows)
            self._engine.wait()
            return
        own, scratch, link = self._own, self._scratch, self._ways.to(worker)
        assert own is not None
        assert scratch is not None
        for chunk in chunks:
            self._resend.check(chunk.grant.run)
        held = [scratch.held[chunk.grant.run] for chunk in chunks]
        rows = [_row(chunk, blocks) for chunk, blocks in zip(chunks, held, strict=True)]

        def push(layer: int) -> None:
            failpoint.hit("prefill.layer")
            for row, chunk, blocks in zip(rows, chunks, held, strict=True):
                if chunk.pooling:
                    continue
                touched = self._touched(row, len(chunk.grant.prefix))
                source, target = blocks[touched], chunk.grant.table[touched]
                if target:
                    link.push(chunk.grant, layer, own.slabs[layer], source, target)

        self._embeddings.fill(self._engine.runner, own, chunks, rows, push)
        self._engine.wait()

    def embedded(self, grant: Grant) -> bytes:
        vector = self._embeddings.vector(grant.run)
        self.abandon(grant)
        return vector

    def finish(self, grant: Grant, tokens: int) -> Receipt | None:
        link = self._ways.to(grant.worker)
        filled = grant.table[len(grant.prefix) : self._engine.layout.blocks_for(tokens)]
        receipt = link.finish(grant, filled)
        if self._own and self._scratch and grant.run in self._scratch.held:  # a courier has copies
            keep_finite(self._own, self._scratch, grant.run)
            self._give_back(grant.run)
        return receipt

    def abandon(self, grant: Grant) -> bool:
        self._embeddings.drop(grant.run)
        self._give_back(grant.run)
        link = self._ways.get(grant.worker)
        return bool(link is not None and link.abandon(grant))  # a link itself has stopped

    def _give_back(self, run: str) -> None:
        self._resend.drop(run)
        if self._scratch is not None:
            self._scratch.give_back(run)

    def use_cores(self, cores: tuple[int, ...]) -> None:
        self._cores.use(cores)

    def clock(self) -> float:
        return time.monotonic()

    def _touched(self, row: Row, prefix: int) -> slice:
        """Indices of the blocks that this row writes, after the cached prefix. The last may be partly
        full; then the next row pushes it again."""
        first = row.start // self._engine.layout.block_size
        return slice(max(first, prefix), self._engine.layout.blocks_for(row.end))


def _row(chunk: Chunk, blocks: Sequence[int]) -> Row:
    return Row(chunk.token_ids, chunk.start, blocks, Logits.NONE, chunk.rope_floor, chunk.adapter)
