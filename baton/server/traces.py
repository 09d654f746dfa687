"""Traces: the history of requests as JSON for Perfetto, made beside the event loop, once for many.

Of 10,000 requests it is 18 MB, and a second of work in which nobody else would be served. So a thread
makes it, those who ask meanwhile share it, and it is given again for WORTH times as long as that took:
whoever asks for it all the time takes a tenth of a core, and clients that do not read it hold few.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from baton.clock import monotonic
from baton.server.sse import json_of
from baton.timeline import Timeline
from baton.trace import chrome_trace

WORTH = 10
AT_ONCE = 1000
"""Events that are encoded in one call, in which no other thread has its turn: 4 ms."""
NO_EVENTS = '"traceEvents":[]'


class Traces:
    """Of one timeline. `model`: its name, at the time."""

    def __init__(self, timeline: Timeline, model: Callable[[], str]) -> None:
        self._timeline, self._model = timeline, model
        self._making: asyncio.Task[bytes] | None = None
        self._last, self._until = b"", 0.0

    async def text(self) -> bytes:
        """The trace as JSON."""
        if self._last and monotonic() < self._until:
            return self._last
        if self._making is None:
            self._making = asyncio.create_task(self._make())
        return await asyncio.shield(self._making)  # one who leaves does not end it for others

    async def _make(self) -> bytes:
        begun = monotonic()
        try:
            copy, model = self._timeline.copy(), self._model()
            self._last = await asyncio.to_thread(lambda: encoded(chrome_trace(copy, model=model)))
            self._until = monotonic() + WORTH * (monotonic() - begun)
        finally:
            self._making = None
        return self._last


def encoded(trace: dict[str, Any]) -> bytes:
    """A trace as JSON, in many short calls."""
    events = trace["traceEvents"]
    before, after = json_of(trace | {"traceEvents": []}).split(NO_EVENTS)
    return f'{before}"traceEvents":[{",".join(_parts(events))}]{after}'.encode()


def _parts(events: list[dict[str, Any]]) -> Iterator[str]:
    for start in range(0, len(events), AT_ONCE):
        yield json_of(events[start : start + AT_ONCE])[1:-1]
