"""Keeper: the adapters that a worker holds, and those that it is told to. Part of its membership.

UseAdapters -> read what is missing, in a thread of the shelf; drop what is not named
read        -> put it to use between two steps; tell the router
no router   -> keep what is offered and drop the rest: nobody waits for it any more
"""

from collections.abc import Collection, Sequence
from typing import Protocol

from baton.adapters.changes import Entry
from baton.errors import BatonError
from baton.wire import messages as msg
from baton.wire.adapter_messages import NotHeld
from baton.wire.messages import Hello
from baton.wire.node import ROUTER, Effect, To

POLL_S = 0.005
"""Between two looks at what is being read."""
CLOSED = "this worker loads no adapters while it runs: start it with --allow-lora-updates FOLDER"


class Reading(Protocol):
    """An adapter that is being read."""

    @property
    def done(self) -> bool:
        """add() does not wait."""

    def add(self) -> None:
        """Forwards can name it from now on. Raises ModelError, OutOfMemory: also those of reading."""

    def give_up(self) -> None:
        """It is not wanted any more."""


class Shelf(Protocol):
    """The adapters beside a worker's model, by digest. baton/engine/lora/shelf.py implements it."""

    def read(self, entry: Entry) -> Reading:
        """Begin to read an adapter; its digest must be that of its content."""

    def drop(self, digest: str) -> None:
        """Free its memory. No row of a later forward names it."""


class Keeper:
    """Decides what is read and dropped. Of a worker without a shelf: it holds what it began with."""

    def __init__(self, hello: Hello, shelf: Shelf | None) -> None:
        self._own = hello.adapters
        self._shelf = shelf
        self.changes = hello.changes
        self._number = 0
        self._wanted = {each.digest: Entry(each) for each in self._own}
        self._held = dict.fromkeys(self._wanted)
        self._reading: dict[str, Reading] = {}
        self._failed: dict[str, str] = {}

    @property
    def held(self) -> Collection[str]:
        """Digests of what a forward can be given."""
        return self._held.keys()

    @property
    def waits(self) -> bool:
        """step() may have news soon."""
        return bool(self._reading)

    def use(self, order: msg.UseAdapters) -> list[Effect]:
        """Hold exactly these from now on."""
        self._number, self.changes = order.number, order.changes
        self._want(order.adapters)
        return [self._told()]

    def start_anew(self) -> None:
        """There is no router that waits for what it does not offer."""
        self._number = 0
        self._want((*self.changes.offered(self._own), *self.changes.leaving))

    def step(self) -> list[Effect]:
        """Put to use what has been read."""
        done = [digest for digest, reading in self._reading.items() if reading.done]
        for digest in done:
            try:
                self._reading.pop(digest).add()
                self._held[digest] = None
            except BatonError as error:
                self._failed[digest] = str(error)
        return [self._told()] if done else []

    def _want(self, entries: Sequence[Entry]) -> None:
        self._wanted = {each.adapter.digest: each for each in entries}
        self._failed = {d: why for d, why in self._failed.items() if d in self._wanted}
        for digest in [each for each in self._reading if each not in self._wanted]:
            self._reading.pop(digest).give_up()
        if self._shelf is None:
            lacking = self._wanted.keys() - self._held.keys()
            self._failed = dict.fromkeys(sorted(lacking), CLOSED)
            return
        for digest in [each for each in self._held if each not in self._wanted]:
            del self._held[digest]
            self._shelf.drop(digest)
        known = self._held.keys() | self._reading.keys() | self._failed.keys()
        for digest, entry in self._wanted.items():
            if digest not in known:
                self._reading[digest] = self._shelf.read(entry)

    def _told(self) -> To:
        failed = tuple(NotHeld(digest, why) for digest, why in self._failed.items())
        return To(ROUTER, msg.AdaptersHeld(self._number, tuple(self._held), failed))
