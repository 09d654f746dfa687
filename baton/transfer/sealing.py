"""Sealing: frames between hosts are encrypted with AES-256-GCM, under keys that were handed over by CURVE.

    writer                                           owner
    ------                                           -----
    Ask(lanes) ------- tcp, CURVE (gate.py) ------>  issue(): a ticket for each lane
               <------ tickets --------------------
    name, secret ----- tcp, a lane --------------->  admit(): once; whoever has no ticket is refused
    sealed messages == tcp, a lane ==============>   seals(): opened, or dropped as forged
               <====== sealed Acks ===============

CURVE authenticates both sides by their key files and agrees on fresh keys for each connection; a ticket
travels inside it, so its keys are secret and last as long as its lane. AES runs in the CPU's own
instructions: docs/decisions/0007-sealed-frames.md has the figures.

A ticket has one key for each direction. The nonce counts messages and parts, so what is changed, left out,
repeated, moved or cut short by a stranger on the network does not open. The login itself is readable: it
keeps out who did not see it, and what it lets in still has to open.
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
    """One direction of one lane: seals messages, or opens them in the same order. For one thread."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._messages = 0

    def close(self, parts: Sequence[Part]) -> list[Part]:
        """The next message, each part sealed."""
        sealed: list[Part] = [
            self._cipher.encrypt(self._nonce(index), part, bytes([len(parts)]))
            for index, part in enumerate(parts)
        ]
        self._messages += 1
        return sealed

    def open(self, parts: Sequence[Part], room: bytearray) -> list[Part] | None:
        """The next message, in `room`; None unless it is what the other side sealed next."""
        opened: list[Part] = []
        view, end, about = memoryview(room), 0, bytes([len(parts)])
        for index, part in enumerate(parts):
            start, end = end, end + len(part) - SEAL_BYTES
            if not start <= end <= len(room):
                return None
            try:
                self._cipher.decrypt_into(self._nonce(index), part, about, view[start:end])
            except InvalidTag:
                return None
            opened.append(view[start:end])
        self._messages += 1
        return opened

    def _nonce(self, part: int) -> bytes:
        return self._messages.to_bytes(11, "big") + bytes([part])


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
