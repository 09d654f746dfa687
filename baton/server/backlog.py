"""Backlog: news of one request on their way to its client. Bounded, where the client reads as they come.

The router generates for everybody at the same pace, so what a slow client has not read waits here. A
client that reads nothing at all is cut by connection.py after a while; one that reads too little of an
answer with many choices and logprobs would have megabytes waiting.
"""

import asyncio
from collections.abc import Callable

from baton.client.tracker import News, PendingRequest
from baton.wire.messages import Emitted, Failed

BACKLOG = 100_000
"""Tokens and logprobs that may wait for one client: some 10 MB."""
TOO_SLOW = "client_too_slow"

Item = tuple[PendingRequest, News]


class Backlog(asyncio.Queue[Item]):
    """A queue of news. If more than `limit` tokens and logprobs wait in it, they are dropped, the next to
    come is Failed, and `full` is called, once."""

    def __init__(self, full: Callable[[], None]) -> None:
        super().__init__()
        self.limit = float("inf")
        self._full = full
        self._waits = 0
        self._over = False

    def _put(self, item: Item) -> None:
        if self._over:
            return
        pending, news = item
        self._waits += _size(news)
        if self._waits > self.limit:
            self._over = True
            self._queue.clear()  # type: ignore[attr-defined]
            why = (
                f"the client reads its answer too slowly: {self._waits} tokens and logprobs wait, "
                f"{self.limit:g} may; read faster, or ask for fewer choices or logprobs"
            )
            item = pending, Failed(pending.id, TOO_SLOW, why)
            asyncio.get_running_loop().call_soon(self._full)
        super()._put(item)

    def _get(self) -> Item:
        item: Item = super()._get()
        self._waits -= _size(item[1])
        return item


def _size(news: News) -> int:
    """Tokens, and the logprobs of each."""
    if not isinstance(news, Emitted):
        return 0
    return len(news.token_ids) + sum(1 + len(each.top_ids) for each in news.logprobs)
