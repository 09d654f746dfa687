"""Writers: the prefill workers that can write into this pool, and when what they wrote can be no danger
any more."""

from dataclasses import dataclass, field

from baton.kv.blocks import BlockTable
from baton.kv.transports import shuts_out, writes_by_itself
from baton.wire.messages import WriterJoined
from baton.wire.node import Effect, Watch
from decode_worker.model import DecodeModel


@dataclass(slots=True)
class Writers:
    """Tells the block table and the exports. `host`: this worker's."""

    table: BlockTable
    model: DecodeModel
    host: str
    _doors: set[str] = field(default_factory=set)  # writers that this worker can shut out

    def joined(self, order: WriterJoined) -> list[Effect]:
        """A writer has attached, and has ended what it wrote before."""
        writer = order.writer
        self.table.writer_clear(writer)
        if not writes_by_itself(order.transport):  # late bytes are dropped: no quarantine
            return []
        self.model.let_in(writer)
        self._doors = (
            self._doors | {writer} if shuts_out(order.transport) else self._doors - {writer}
        )
        self.table.writer_joined(writer)
        return [Watch(writer, order.pid)] if order.host == self.host else []

    def clear(self, writer: str) -> None:
        """A writer is dead, has restarted, or has lost its way. What it has sent may still be on the way:
        first it is shut out, then its blocks are free."""
        self.model.shut_out(writer)
        self._doors.discard(writer)
        self.table.writer_clear(writer)

    def all_shut_out(self) -> None:
        """A new epoch closed every door. Perhaps nobody will say of these writers that they are gone: the
        router that knew them may be gone too, and nobody here watches a process of another host."""
        for writer in self._doors:
            self.table.writer_clear(writer)
        self._doors.clear()
