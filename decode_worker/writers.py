"""Writers: the prefill workers that can write into this pool, and when what they wrote can be no danger
any more."""

from dataclasses import dataclass

from baton.kv.blocks import BlockTable
from baton.kv.transports import writes_by_itself
from baton.wire.messages import WriterJoined
from baton.wire.node import Effect, Watch
from decode_worker.model import DecodeModel


@dataclass(slots=True)
class Writers:
    """Tells the block table and the exports. `host`: this worker's."""

    table: BlockTable
    model: DecodeModel
    host: str

    def joined(self, order: WriterJoined) -> list[Effect]:
        """A writer has attached, and has ended what it wrote before."""
        writer = order.writer
        self.table.writer_clear(writer)
        if not writes_by_itself(order.transport):  # late bytes are dropped: no quarantine
            return []
        self.model.let_in(writer)
        self.table.writer_joined(writer)
        return [Watch(writer, order.pid)] if order.host == self.host else []

    def clear(self, writer: str) -> None:
        """A writer is dead, has restarted, or has lost its way. What it has sent may still be on the way:
        first it is shut out, then its blocks are free."""
        self.model.shut_out(writer)
        self.table.writer_clear(writer)
