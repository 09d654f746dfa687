"""Decoding: the decode worker's tensors: its pool, the pool's exports, the forward and the sampler."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import zmq

from baton import failpoint
from baton.engine.boot import Engine
from baton.engine.device import CoreTaker
from baton.engine.errors import within_memory
from baton.engine.pool import spare_blocks
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.kv.row import Row
from baton.transfer.base import Export
from baton.transfer.registry import CurveKeys, let_in, make_exports, shut_out
from baton.transfer.shm import shared_region
from baton.transfer.slabs import Slabs
from baton.wire.records import Logprob
from decode_worker.model import Draw, Drawn
from sampler.logprobs import Chosen
from sampler.sample import SamplingBatch
from sampler.step import step as sample_step


class Decoding:
    """The real DecodeModel (see decode_worker/model.py)."""

    def __init__(
        self,
        engine: Engine,
        slabs: Slabs,
        *,
        kinds: Sequence[str] | str,
        run_dir: Path | None,
        bind_host: str | None,
        keys: CurveKeys | None,
        export: Callable[[str], Export] | None = None,
    ) -> None:
        """`export` makes the pool's only export, for an epoch, and replaces the registry's."""
        self._engine = engine
        self._export = export
        self.slabs = slabs
        region = partial(shared_region, "shm", slabs, "")
        spare = spare_blocks(engine.device) > 0
        self._pool = engine.pools.over(slabs.tensors, slabs.blocks, region, spare=spare)
        self._kinds = kinds
        self._cores = CoreTaker()
        self._run_dir, self._bind_host, self._keys = run_dir, bind_host, keys
        self._exports: list[Export] = []

    def renew_epoch(self, epoch: str) -> tuple[Region, ...]:
        for export in self._exports:
            export.close()
        if self._export is not None:
            self._exports = [self._export(epoch)]
        else:
            self._exports = make_exports(
                self._kinds,
                self.slabs,
                epoch=epoch,
                run_dir=self._run_dir,
                bind_host=self._bind_host,
                keys=self._keys,
            )
        return tuple(export.region for export in self._exports)

    def prepare(self, most_rows: int, most_tokens: int) -> None:
        """Before serving: see Engine.prepare."""
        self._engine.prepare(self._pool, most_rows, most_tokens)

    def expect(self, grant: Grant) -> None:
        for export in self._exports:
            export.expect(grant)

    def poll(self) -> bool:
        return any([export.poll() for export in self._exports])

    def wakeups(self) -> list[zmq.Socket[bytes]]:
        """Sockets at which KV arrives."""
        return [socket for export in self._exports for socket in export.wakeups()]

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        """Two exports may share a transport (frames over ipc and tcp); the KV arrived by one of them."""
        needed = grant.table[len(grant.prefix) : self._engine.layout.blocks_for(tokens)]
        used = [e for e in self._exports if e.region.transport == receipt.transport]
        answers = {export.arrival(grant, receipt, needed) for export in used}
        if Arrival.READY in answers:
            self._engine.pools.arrived(self._pool, needed)
        for answer in (Arrival.READY, Arrival.PENDING, Arrival.LOST):
            if answer in answers:
                return answer
        return Arrival.BAD

    def retire(self, grant: Grant) -> None:
        for export in self._exports:
            export.retire(grant)

    def let_in(self, writer: str) -> None:
        let_in(self._exports, writer)

    def shut_out(self, writer: str) -> None:
        shut_out(self._exports, writer)

    def close(self) -> None:
        """Free sockets and shared memory."""
        for export in self._exports:
            export.close()
        self.slabs.close()

    def use_cores(self, cores: tuple[int, ...]) -> None:
        self._cores.use(cores)

    def clock(self) -> float:
        return time.monotonic()

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        failpoint.hit("decode.step")
        failpoint.hit("decode.kv", lambda: self._pool.keys[0][rows[0].blocks[0]])
        run = partial(self._step, rows, draws)
        return within_memory("a decode step", self._engine.device, run)

    def _step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        failpoint.hit("decode.forward")
        if not draws:
            self._engine.runner.fill(self._pool, rows)
            self._engine.wait()
            return []
        if all(draw.plain and draw.logprobs < 0 for draw in draws):
            greedy = self._engine.runner.greedy(self._pool, rows)
            return [None if token is None else Drawn(token) for token in greedy]
        logits = self._engine.runner.run(self._pool, rows)  # [len(draws), vocabulary], fp32
        batch = SamplingBatch.build(
            [draw.sampling for draw in draws],
            [draw.position for draw in draws],
            [draw.seen for draw in draws],
            "cpu",
            generated=[draw.generated for draw in draws],
            forbidden=[draw.forbidden for draw in draws],
            masks=[draw.mask for draw in draws],
            vocab=logits.shape[-1],
        )
        counts, known = [draw.logprobs for draw in draws], [draw.given for draw in draws]
        return [
            None if drawn is None else Drawn(drawn.token_id, _logprob(drawn.chosen))
            for drawn in sample_step(logits, batch, counts, known)
        ]


def _logprob(chosen: Chosen | None) -> Logprob | None:
    if chosen is None:
        return None
    ids, values = zip(*chosen.top, strict=True) if chosen.top else ((), ())
    return Logprob(chosen.logprob, tuple(ids), tuple(values))
