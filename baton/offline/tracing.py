"""Tracing: the stages of a job's requests, in a file for ui.perfetto.dev (--trace-file)."""

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
"""How long to wait for the last events; the router sends them every 0.1 s."""


class Tracing:
    """Collects the router's events; pass `observe` to the link."""

    def __init__(self, file: Path) -> None:
        """Raises InputError if the file cannot be written."""
        try:
            self._target = checked_target(file)
        except InputError as error:
            raise InputError(str(error).replace("-o ", "--trace-file ", 1)) from error
        self._timeline = Timeline(remembered=1_000_000)
        self._open = 0

    def observe(self, observed: Observed) -> None:
        """Add events."""
        self._timeline.add(observed.moments)
        started = sum(moment.state == "queued" and not moment.note for moment in observed.moments)
        self._open += started - len(observed.ended)

    def write(self, client: Client, model: str) -> None:
        """Wait for the last events, then write the file."""
        deadline = time.monotonic() + LAST_S
        while self._open > 0 and time.monotonic() < deadline:
            client.poll(0.05)
        trace = json.dumps(chrome_trace(self._timeline, model=model))
        write_whole(self._target, iter((trace,)), saved="the answers are safe")
