"""Tracing: the lives of a job's requests, as a file that Perfetto opens (--trace-file)."""

import json
import time
from pathlib import Path

from baton.client.blocking import Client
from baton.errors import InputError
from baton.offline.outputs import checked_target, write_whole
from baton.timeline import Timeline
from baton.trace import chrome_trace
from baton.wire.messages import Observed

LAST_S = 0.5
"""The router tells what happened every tenth of a second: so long is waited for the last of it."""


class Tracing:
    """Collects what happens. Use `observe` as the link's."""

    def __init__(self, file: Path) -> None:
        """Raises InputError if the file cannot be written."""
        try:
            self._target = checked_target(file)
        except InputError as error:
            raise InputError(str(error).replace("-o ", "--trace-file ", 1)) from error
        self._timeline = Timeline(remembered=1_000_000)
        self._open = 0

    def observe(self, observed: Observed) -> None:
        """Something happened."""
        self._timeline.add(observed.moments)
        started = sum(moment.state == "queued" and not moment.note for moment in observed.moments)
        self._open += started - len(observed.ended)

    def write(self, client: Client, model: str) -> None:
        """Wait for the last moments, then put the file in place."""
        deadline = time.monotonic() + LAST_S
        while self._open > 0 and time.monotonic() < deadline:
            client.poll(0.05)
        trace = json.dumps(chrome_trace(self._timeline, model=model))
        write_whole(self._target, iter((trace,)), saved="the answers are safe")
