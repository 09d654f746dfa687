"""Sealing: frames between hosts are encrypted with AES-256-GCM, under keys that CURVE has handed over.

    writer                                           owner
    ------                                           -----
    Ask(lanes) ------- tcp, CURVE (gate.py) ------>  issue(): a ticket for each lane
               <------ tickets --------------------
    name, secret ----- tcp, a lane --------------->  admit(): once; whoever has no ticket is refused
    sealed frames ==== tcp, a lane ==============>   seals(): opened, or dropped as forged
               <====== sealed Acks ===============

CURVE authenticates both sides by their key files and agrees on fresh keys for each connection. A ticket
travels inside it, so its keys are secret; they last as long as its lane. AES runs in the CPU's own
instructions: docs/decisions/0007-sealed-frames.md has the figures.

A ticket has one key for each direction. Headers are sealed in the order in which they are sent, under a
nonce that counts them: one that a stranger on the network has changed, left out, repeated or moved does
not open, and the way is given up. Payloads are sealed in a count of their own, straight out of the pool
of their writer, and before it is known when they are sent. Their header names the number, and they are
opened straight into the owner's pool. The login can be read by strangers: it keeps out who has not seen
it, and what comes by it still has to open.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
SEAL_BYTES = 16  # added to each part
NAME_BYTES = 16
MAX_TICKETS = 4096
"""Tickets that are not used yet; the oldest go."""

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Ticket:
    """What lets one lane in, once: a login in hexadecimal digits, and a key of KEY_BYTES for each
    direction."""

    name: bytes
    secret: bytes = field(repr=False)
    to_owner: bytes = field(repr=False)
    to_writer: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """ValueError for a ticket that issue() cannot have made."""
        lengths = [len(each) for each in (self.name, self.secret, self.to_owner, self.to_writer)]
        if lengths != [2 * NAME_BYTES, 2 * NAME_BYTES, KEY_BYTES, KEY_BYTES]:
            raise ValueError(f"a ticket's parts have other lengths: {lengths}")


class Seal:
    """One direction of one lane. Headers are for one thread, payloads for one thread, perhaps another."""

    def __init__(self, key: bytes) -> None:
        self._headers, self._payloads = AESGCM(key), AESGCM(key)
        self._next_header = self._next_payload = 0
        self._taking = threading.Lock()

    def close(self, header: Part, parts: int) -> bytes:
        """The next header, of a message of so many parts."""
        number, self._next_header = self._next_header, self._next_header + 1
        return self._headers.encrypt(_nonce(b"h", number), header, bytes([parts]))

    def open(self, sealed: Part, parts: int) -> bytes | None:
        """The next header; None unless it is what the other side sealed next."""
        try:
            nonce = _nonce(b"h", self._next_header)
            header = self._headers.decrypt(nonce, sealed, bytes([parts]))
        except InvalidTag:
            return None
        self._next_header += 1
        return header

    def close_into(self, pieces: Sequence[Part], out: memoryview) -> int:
        """Seal these one after the other, each with SEAL_BYTES more. Returns the number of the first."""
        with self._taking:  # of numbers: no two pieces may have one
            first, start = self._next_payload, 0
            self._next_payload += len(pieces)
        for number, piece in enumerate(pieces, first):
            end = start + len(piece) + SEAL_BYTES
            self._payloads.encrypt_into(_nonce(b"p", number), piece, None, out[start:end])
            start = end
        return first

    def open_into(self, first: int, sealed: memoryview, pieces: Sequence[memoryview]) -> bool:
        """Open what close_into() sealed from this number on, into these places. False: it is forged,
        and the places hold anything."""
        start = 0
        try:
            for number, piece in enumerate(pieces, first):
                end = start + len(piece) + SEAL_BYTES
                self._payloads.decrypt_into(_nonce(b"p", number), sealed[start:end], None, piece)
                start = end
        except InvalidTag:
            return False
        return True


def _nonce(kind: bytes, number: int) -> bytes:
    return kind + number.to_bytes(11, "big")


@dataclass(frozen=True, slots=True)
class Seals:
    """Both directions of one lane, as one of its sides uses them."""

    sends: Seal
    receives: Seal

    @classmethod
    def of_writer(cls, ticket: Ticket) -> "Seals":
        """As the writer uses them."""
        return cls(Seal(ticket.to_owner), Seal(ticket.to_writer))

    @classmethod
    def of_owner(cls, ticket: Ticket) -> "Seals":
        """As the owner uses them."""
        return cls(Seal(ticket.to_writer), Seal(ticket.to_owner))


class Tickets:
    """The owner's: those that are not used yet, and those that let a lane in. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: OrderedDict[bytes, Ticket] = OrderedDict()
        self._used: OrderedDict[bytes, Ticket] = OrderedDict()

    def issue(self, count: int) -> list[Ticket]:
        """New tickets."""
        fresh = [
            Ticket(
                secrets.token_hex(NAME_BYTES).encode(),
                secrets.token_hex(NAME_BYTES).encode(),
                secrets.token_bytes(KEY_BYTES),
                secrets.token_bytes(KEY_BYTES),
            )
            for _ in range(count)
        ]
        with self._lock:
            self._unused.update((each.name, each) for each in fresh)
            _shorten(self._unused)
        return fresh

    def admit(self, name: bytes, secret: bytes) -> bool:
        """Whether this login lets a lane in, now and never again."""
        with self._lock:
            ticket = self._unused.get(name)
            if ticket is None or not secrets.compare_digest(ticket.secret, secret):
                return False
            self._used[name] = self._unused.pop(name)
            _shorten(self._used)
            return True

    def seals(self, name: bytes) -> Seals | None:
        """Those of a lane that was let in, for its first message; None if there is none by this name."""
        with self._lock:
            ticket = self._used.pop(name, None)
        return None if ticket is None else Seals.of_owner(ticket)


def _shorten(tickets: OrderedDict[bytes, Ticket]) -> None:
    while len(tickets) > MAX_TICKETS:
        tickets.popitem(last=False)
