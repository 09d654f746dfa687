"""Clock: where time comes from. Nodes never read one; the loop reads it once a turn and passes `now`."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a monotonic scale with an arbitrary start. Tests pass their own."""

monotonic: Clock = time.monotonic
