"""Clock: the source of time. Nodes never read it; the loop does, and passes `now`."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a monotonic scale with an arbitrary start. Tests pass their own."""

monotonic: Clock = time.monotonic
