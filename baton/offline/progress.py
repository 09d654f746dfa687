"""Progress: what the job prints to stderr while it runs. A broken stderr does not stop the job."""

import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from baton.clock import Clock, monotonic

REFRESH_S = 0.5


class Progress:
    """Lines of text, and a progress bar below them if stderr is a terminal."""

    def __init__(self, *, quiet: bool, clock: Clock = monotonic) -> None:
        self._quiet = quiet
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._begun = clock()
        self._tokens = 0
        self._retries = 0
        self._states = ""
        self._refreshed = 0.0

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._quiet:
            return
        with suppress(OSError, ValueError):  # stderr is closed or full: the job goes on
            if self._bar is None:
                print(text, file=sys.stderr, flush=True)
            else:
                tqdm.write(text, file=sys.stderr)

    def begin(self, *, total: int, done: int) -> None:
        """Start; `done` of the `total` answers exist already."""
        self._begun = self._clock()
        if self._quiet or not _is_terminal():
            return
        with suppress(OSError, ValueError):
            self._bar = tqdm(total=total, initial=done, unit="answer", file=sys.stderr, leave=False)

    def tokens(self, count: int) -> None:
        """Count new tokens."""
        self._tokens += count
        self._refresh()

    def answer(self, *, retries: int) -> None:
        """Count a finished request and its retries."""
        self._retries += retries
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.update()
        self._refresh()

    def workers(self, states: str) -> None:
        """Show the state of the workers."""
        self._states = states
        self._refresh()

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None

    def _refresh(self) -> None:
        now = self._clock()
        if self._bar is None or now - self._refreshed < REFRESH_S:
            return
        self._refreshed = now
        speed = f"{self._tokens / max(now - self._begun, 1e-9):,.0f} tok/s"
        retried = f", {self._retries} retries" if self._retries else ""
        states = f", {self._states}" if self._states else ""
        with suppress(OSError, ValueError):
            self._bar.set_postfix_str(speed + retried + states, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        return False
