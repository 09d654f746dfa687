"""Fake: moves nothing and says READY. For tests of the control plane with a pretend model only."""

from collections import Counter
from collections.abc import Sequence

import torch
import zmq

from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.base import Owner, Writer
from baton.transfer.pieces import digest_of_blocks
from baton.transfer.slabs import Slabs
from baton.transfer.stamps import Expected


class FakeExport:
    """Believes every receipt that is about a grant it knows."""

    def __init__(self, slabs: Slabs, *, epoch: str) -> None:
        self.region = Region("fake", slabs.layout.fingerprint, slabs.blocks, {"epoch": epoch})
        self.dropped: Counter[str] = Counter()
        self._expected = Expected(epoch, slabs.blocks)

    def expect(self, grant: Grant) -> None:
        """Remembered."""
        self._expected.add(grant)

    def poll(self) -> bool:
        """Nothing ever arrives."""
        return False

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """READY, if the grant is ours."""
        if grant in self._expected:
            return Arrival.READY
        self.dropped["unknown"] += 1
        return Arrival.BAD

    def retire(self, grant: Grant) -> None:
        """Forgotten."""
        self._expected.drop(grant)

    def close(self) -> None:
        """Nothing to close."""


class FakeLink:
    """Takes everything, moves nothing."""

    transport = "fake"
    slabs: Sequence[torch.Tensor] | None = None

    def __init__(self, region: Region) -> None:
        self.why = ""

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Nowhere."""

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """As if it were there."""
        return Receipt(0, digest_of_blocks(grant, "fake", blocks), 0.0, "fake")

    def abandon(self, grant: Grant) -> None:
        """Nothing was written anyway."""

    def probe(self) -> float:
        """Nothing moves."""
        return 0.0

    def close(self) -> None:
        """Nothing to close."""


def export(slabs: Slabs, owner: Owner) -> FakeExport:
    """See baton/kv/transports.py."""
    return FakeExport(slabs, epoch=owner.epoch)


def link(region: Region, layout: KVLayout, writer: Writer) -> FakeLink:
    """See baton/kv/transports.py."""
    return FakeLink(region)
