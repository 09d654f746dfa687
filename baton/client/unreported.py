"""Unreported: requests that a router has accepted and whose end it has not told its observers yet. Pure.

    Accepted r1 -> {r1}     Finished r1     Observed(ended r1) -> {}

The news of an end come at once, the events up to a tenth of a second later, and only they have the times
of its stages. A server that leaves waits for them, or its last requests would be in no trace.
"""

from baton.wire.messages import Accepted, Message, Observed, Unreachable


class Unreported:
    """Of a client that observes. A router that is lost reports nothing more."""

    def __init__(self) -> None:
        self._requests: set[str] = set()

    def received(self, message: Message) -> None:
        """Take in a message of the router, in the order in which they come."""
        match message:
            case Accepted(request):
                self._requests.add(request)
            case Observed():
                self._requests.difference_update(each.request for each in message.ended)
            case Unreachable():
                self.lost()

    def lost(self) -> None:
        """There is no router any more that could report."""
        self._requests.clear()

    def __len__(self) -> int:
        return len(self._requests)
