"""Resend: a prefix that this prefill worker has kept and the decode worker lacks is sent from here.

It may be long, and nothing of it has to be computed. So it goes in portions, as the way takes them: what
waits in a courier stays bounded, and the worker's loop goes on between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.engine.pool import Pool
from baton.errors import TransferError
from baton.kv.grant import Grant
from prefill_worker.ways import Ways

PORTION_BYTES = 8 << 20


@dataclass(slots=True)
class _Rest:
    grant: Grant
    source: Sequence[int]
    target: Sequence[int]
    sent: int = 0
    failed: TransferError | None = None

    @property
    def left(self) -> bool:
        return self.failed is None and self.sent < len(self.source)


class Resend:
    """What is still to be sent, by run."""

    def __init__(self) -> None:
        self._rests: dict[str, _Rest] = {}

    def add(self, grant: Grant, source: Sequence[int], target: Sequence[int]) -> None:
        """Blocks of the worker's own pool, and the granted ones into which they go."""
        self._rests[grant.run] = _Rest(grant, source, target)

    def step(self, ways: Ways, pool: Pool) -> None:
        """Send one portion of each, where its way takes it."""
        count = max(1, PORTION_BYTES // pool.layout.block_bytes)
        for rest in self._rests.values():
            worker = rest.grant.worker
            link = ways.get(worker)
            if link is None or not rest.left or not ways.takes(worker):
                continue
            part = slice(rest.sent, rest.sent + count)
            try:
                for layer, slab in enumerate(pool.slabs[:-1]):
                    link.push(rest.grant, layer, slab, rest.source[part], rest.target[part])
            except TransferError as error:
                rest.failed = error
            rest.sent += count

    def waits(self, worker: str) -> bool:
        """Something is still to be sent to this decode worker."""
        return any(r.left and r.grant.worker == worker for r in self._rests.values())

    def check(self, run: str) -> None:
        """Raises the TransferError that ended the run's sending, if one did."""
        rest = self._rests.get(run)
        if rest is not None and rest.failed is not None:
            raise rest.failed

    def drop(self, run: str) -> None:
        """The run is over, or had nothing to send."""
        self._rests.pop(run, None)
