"""In place: writer and owner are one process, so the writer computes into the owner's own tensors.

Nothing is copied and nothing is mapped, on a CPU and on a GPU alike. Who has the owner's Slabs makes
the link; no other process can, so the registry does not offer this transport.
"""

import time
from collections import Counter
from collections.abc import Sequence

import torch
import zmq

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.pieces import check_in_place, check_push, digest_of_blocks, in_order
from baton.transfer.slabs import Slabs
from baton.transfer.stamps import Expected, Stamps, judge

NAME = "in_place"


class InPlaceExport:
    """The owner's side. See base.py."""

    def __init__(self, slabs: Slabs, *, epoch: str) -> None:
        self.region = Region(NAME, slabs.layout.fingerprint, slabs.blocks, {"epoch": epoch})
        self.dropped: Counter[str] = Counter()
        self._stamps = Stamps(slabs.tensors[-1])
        self._expected = Expected(epoch, slabs.blocks)

    def expect(self, grant: Grant) -> None:
        """The grant's blocks count as not filled from now on."""
        self._expected.add(grant)
        self._stamps.write(grant.blocks, 0)

    def poll(self) -> bool:
        """Stores of this process are visible at once: there is nothing to take in."""
        return False

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """READY or BAD, never PENDING."""
        wrong: str | None = "unknown"
        if grant in self._expected:
            wrong = judge(self._stamps, grant, receipt, transport=NAME, needed=needed)
        if wrong is None:
            return Arrival.READY
        self.dropped[wrong] += 1
        return Arrival.BAD

    def retire(self, grant: Grant) -> None:
        """The grant is over."""
        self._expected.drop(grant)

    def close(self) -> None:
        """The memory is the pool's."""


class InPlaceLink:
    """The writer's side. See base.py."""

    transport = NAME
    why = ""

    def __init__(self, slabs: Slabs, *, epoch: str) -> None:
        self.slabs: Sequence[torch.Tensor] | None = slabs.tensors
        self._layout = slabs.layout
        self._epoch = epoch
        self._stamps = Stamps(slabs.tensors[-1])

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Nothing to move; TransferError if the caller computed elsewhere than in `slabs`."""
        check_push(grant, self._layout, layer, source, target)
        check_in_place(self._open()[layer], slab, source, target)

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Stamp the blocks. The caller has waited for the device that computed them."""
        started = time.perf_counter()
        self._open()
        if grant.epoch != self._epoch:
            raise TransferError(f"{grant.run}: granted in another life of {grant.worker}")
        ordered = in_order(grant, blocks)
        self._stamps.write(ordered, grant.generation)
        digest = digest_of_blocks(grant, NAME, ordered)
        return Receipt(0, digest, time.perf_counter() - started, NAME)

    def abandon(self, grant: Grant) -> None:
        """Without stamps the blocks count as not filled."""

    def probe(self) -> float:
        """Nothing has to be moved."""
        return 0.0

    def close(self) -> None:
        """The memory is the owner's."""
        self.slabs = None

    def _open(self) -> Sequence[torch.Tensor]:
        if self.slabs is None:
            raise TransferError("this link is closed")
        return self.slabs
