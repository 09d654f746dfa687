"""A link that misbehaves on demand, for tests.

    flip        one bit of the fill is turned over          truncate   the end of it is missing
    duplicate   it is sent twice                            drop_end   finish() is not announced
    stall       from the next push on, nothing arrives any more

On frames and NIXL the fault is on the wire; NIXL has no end to drop, so there half of each write is
missing. On the others it is in the shared memory, after finish(); in place
only the stamps can be checked, so there the flip is in a stamp.
"""

import ctypes
import random
from collections.abc import Sequence
from enum import StrEnum

import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.transfer.base import Link
from baton.transfer.frames_link import FramesLink, Parts
from baton.transfer.in_place import InPlaceLink
from baton.transfer.nixl_agent import Memory
from baton.transfer.nixl_link import NixlLink
from baton.transfer.pinned import PinnedLink


class Fault(StrEnum):
    """What goes wrong."""

    FLIP = "flip"
    TRUNCATE = "truncate"
    DUPLICATE = "duplicate"
    DROP_END = "drop_end"
    STALL = "stall"


class FaultyLink:
    """Wraps a link; every fill has the fault, at a place chosen by `seed`, while `fault` is set."""

    def __init__(self, link: Link, fault: Fault | None, *, seed: int = 0) -> None:
        self._link, self.fault, self._random = link, fault, random.Random(seed)
        self.transport, self.why, self.slabs = link.transport, link.why, link.slabs
        self._flipped = False
        if isinstance(link, FramesLink):
            self._send, link.send = link.send, self._send_badly
        elif isinstance(link, NixlLink):
            self._write, link.write = link.write, self._write_badly
        elif not isinstance(link, PinnedLink | InPlaceLink):
            raise TransferError(f"no faults are known for {link.transport}")

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """As the link does it."""
        self._link.push(grant, layer, slab, source, target)

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """As the link does it; then the memory is spoilt."""
        receipt = self._link.finish(grant, blocks)
        if isinstance(self._link, InPlaceLink):
            assert self.slabs is not None
            self._spoil_stamps(self.slabs[-1].view(torch.int64), blocks)
        elif isinstance(self._link, PinnedLink):
            self._spoil_mirror(self._link, blocks)
        return receipt

    def abandon(self, grant: Grant) -> None:
        """As the link does it."""
        self._link.abandon(grant)

    def probe(self) -> float:
        """As the link does it."""
        return self._link.probe()

    def close(self) -> None:
        """As the link does it."""
        self._link.close()

    def _send_badly(self, parts: Parts, lane: int) -> None:
        ends = len(parts) == 1
        match self.fault:
            case Fault.FLIP if not self._flipped and (ends or self._random.random() < 0.3):
                self._flipped = True
                which = self._random.randrange(len(parts))
                self._send([self._flip(p) if i == which else p for i, p in enumerate(parts)], lane)
            case Fault.TRUNCATE if not ends:
                cut = self._random.randrange(len(parts[1]))
                self._send([parts[0], parts[1][:cut]], lane)
            case Fault.DUPLICATE:
                self._send(parts, lane)
                self._send(parts, lane)
            case Fault.DROP_END if ends:
                pass
            case Fault.STALL:
                pass
            case _:
                self._send(parts, lane)
        if ends:
            self._flipped = False

    def _write_badly(self, source: Sequence[Memory], target: Sequence[Memory]) -> int:
        match self.fault:
            case Fault.FLIP:  # what is written differs from what was hashed
                address, size = self._random.choice(list(source))
                byte = ctypes.c_ubyte.from_address(address + self._random.randrange(size))
                byte.value ^= 1 << self._random.randrange(8)
            case Fault.DUPLICATE:
                self._write(source, target)
            case Fault.TRUNCATE:
                source = [(address, size - 1) for address, size in source]
                target = [(address, size - 1) for address, size in target]
            case Fault.DROP_END | Fault.STALL:
                source, target = source[:1], target[:1]
        return self._write(source, target)

    def _flip(self, part: bytes | memoryview) -> bytes:
        spoilt = bytearray(part)
        spoilt[self._random.randrange(len(spoilt))] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)

    def _spoil_stamps(self, stamps: torch.Tensor, blocks: Sequence[int]) -> None:
        block = self._random.choice(list(blocks))
        match self.fault:
            case Fault.FLIP:
                stamps[block] ^= 1 << self._random.randrange(62)
            case Fault.TRUNCATE:
                stamps[block] = 0
            case Fault.DROP_END | Fault.STALL:
                stamps[list(blocks)] = 0

    def _spoil_mirror(self, link: PinnedLink, blocks: Sequence[int]) -> None:
        row = self._random.choice(link.rows).keys[self._random.choice(list(blocks))]
        start = self._random.randrange(row.numel())
        match self.fault:
            case Fault.FLIP:
                row[start] ^= 1 << self._random.randrange(8)
            case Fault.TRUNCATE:
                row[start:] ^= 255
            case Fault.DROP_END | Fault.STALL:
                link.mirror[-1].view(torch.int64)[list(blocks)] = 0
