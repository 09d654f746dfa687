"""NIXL: the writer puts KV blocks straight into the owner's pool, over RDMA or tcp, by NVIDIA's transfer
library and UCX. Not encrypted: for private networks, where it is asked for by name.

    writer: each layer's blocks -> registered buffer ==WRITE==> pool          (nixl_link.py)
    finish: all writes are done (in the pool), then Filled with a digest over the blocks
    owner:  the same digest over the pool's blocks; if they are equal, the blocks are stamped

The owner's loop copies nothing: it reads each byte once, for its CRC. Late writes are kept off by
quarantine and by doors (nixl_doors.py), which the owner can close. The digest guards against everything
else.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import zmq

from baton.bounds import Plain
from baton.errors import TransferError
from baton.host import host_id
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.base import Owner
from baton.transfer.block_crcs import block_crc, pack_crcs
from baton.transfer.nixl_doors import Doors
from baton.transfer.nixl_link import NixlLink
from baton.transfer.pieces import block_bytes
from baton.transfer.slabs import Slabs
from baton.transfer.stamps import Digest, Expected, Stamps, lacking, pack_blocks

POLL_BYTES = 8 << 20

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Check:
    """A fill whose digest is being computed."""

    receipt: Receipt
    work: Iterator[int]  # yields the bytes of each step
    verdict: Arrival = Arrival.PENDING


class NixlExport:
    """The owner's side. See base.Export."""

    def __init__(self, slabs: Slabs, owner: Owner) -> None:
        if slabs.device.type != "cpu":
            raise TransferError(f"nixl moves KV between CPUs, the pool is on {slabs.device}")
        self.dropped: Counter[str] = Counter()
        self._layout, self._blocks = slabs.layout, slabs.blocks
        self._memory = [each.numpy().data for each in slabs.tensors[:-1]]
        self._stamps = Stamps(slabs.tensors[-1])
        self._expected = Expected(owner.epoch, slabs.blocks)
        self._checks: dict[int, _Check] = {}
        self._doors = Doors(slabs.tensors[:-1], owner)
        address: Plain = {
            "host": host_id(),
            "epoch": owner.epoch,
            "endpoint": self._doors.endpoint.encode(),
            "server_key": self._doors.server_key,
        }
        self.region = Region("nixl", slabs.layout.fingerprint, slabs.blocks, address)
        logger.warning("KV over NIXL is not encrypted: private networks only")

    def expect(self, grant: Grant) -> None:
        """See base.Export."""
        self._expected.add(grant)
        self._stamps.write(grant.blocks, 0)

    def poll(self) -> bool:
        """Compute digests of the fills that arrival() was called for, over about 8 MiB."""
        left = POLL_BYTES
        for generation, check in self._checks.items():
            left = self._advance(generation, check, left)
        return any(check.verdict is Arrival.PENDING for check in self._checks.values())

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None: the receipt is sent when all has arrived."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """READY or BAD at once for what a poll() can check, otherwise PENDING until it has."""
        if grant not in self._expected:
            return self._bad("unknown")
        check = self._checks.get(grant.generation)
        if check is None:
            filled = [b for b in grant.blocks if needed is None or b in needed]
            check = _Check(receipt, self._work(grant, receipt, filled))
            self._checks[grant.generation] = check
            self._advance(grant.generation, check, POLL_BYTES)
        if check.receipt != receipt:
            return self._bad("receipt")
        if check.verdict is Arrival.READY and lacking(grant, self._stamps.filled(grant), needed):
            return self._bad("unfilled")
        return check.verdict

    def retire(self, grant: Grant) -> None:
        """See base.Export."""
        if grant in self._expected:
            self._expected.drop(grant)
            self._checks.pop(grant.generation, None)

    def let_in(self, writer: str) -> None:
        """See registry.Guarded."""
        self._doors.let_in(writer)

    def shut_out(self, writer: str) -> None:
        """See registry.Guarded."""
        self._doors.shut_out(writer)

    def close(self) -> None:
        """Shut all writers out; the pool stays."""
        self._checks.clear()
        self._doors.close()
        self._memory = []
        del self._stamps

    def _advance(self, generation: int, check: _Check, left: int) -> int:
        """Do some of this check. Returns what is left of so many bytes."""
        while check.verdict is Arrival.PENDING and left > 0:
            left -= next(check.work, 0)
        return left

    def _work(self, grant: Grant, receipt: Receipt, filled: Sequence[int]) -> Iterator[int]:
        """Compare these blocks of the pool with the receipt, and stamp them."""
        digest = Digest(grant, "nixl")
        digest.add(pack_blocks(filled))
        for layer, slab in enumerate(self._memory):
            crcs = [block_crc(slab, self._layout, layer, self._blocks, each) for each in filled]
            digest.add(pack_crcs(layer, crcs))
            yield len(filled) * block_bytes(self._layout, layer)
        check = self._checks[grant.generation]
        if digest.value != receipt.digest:
            check.verdict = self._bad("digest")
        else:
            self._stamps.write(filled, grant.generation)
            check.verdict = Arrival.READY

    def _bad(self, reason: str) -> Arrival:
        self.dropped[reason] += 1
        return Arrival.BAD


export, link = NixlExport, NixlLink  # see baton/kv/transports.py
