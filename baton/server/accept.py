"""Accept: connections from the listening socket, as many as there are file descriptors for.

asyncio's own loop logs a traceback for each of up to `backlog` attempts a second once descriptors are
exhausted. This one pauses: clients wait in the kernel's queue until other connections have ended.
"""

import asyncio
import errno
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress

PAUSE_S = 1.0
AT_ONCE = 64
"""Connections accepted before other events get their turn."""
RESERVE = 16
"""Descriptors kept for the router's connection, files, threads, where so many are free at start."""
LOG_S = 60.0
TLS_S = 10.0
SEND_BUFFER = 256 << 10
"""Bytes of the kernel's send buffer. By default it grows to megabytes, in which a whole answer would hide
from the check whether its client reads."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

logger = logging.getLogger(__name__)


def reserve_of(limit: int, following: int) -> int:
    """How many descriptors to keep when the process may have `limit`, and the next will be `following`:
    RESERVE, but no more than half of those that are left. Somebody is served under any limit."""
    return RESERVE if limit < 0 else min(RESERVE, (limit - following) // 2)


def spare_descriptors() -> tuple[int, int]:
    """How many more files this process may open (negative: no limit), and how many of them are kept."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    following = os.open(os.devnull, os.O_RDONLY)
    os.close(following)
    return limit if limit < 0 else limit - following, reserve_of(limit, following)


class Acceptor:
    """Accepts inside the running event loop until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`listener` listens and does not block; closing it is the caller's."""
        self._listener, self._protocol, self._tls = listener, protocol, tls
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        self._resume: asyncio.TimerHandle | None = None
        self._logged = float("-inf")
        self._closed = False
        self._reserve = 0
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError):
            self._reserve = reserve_of(limit, self._following())
        self._start()

    def _start(self) -> None:
        self._resume = None
        if (why := self._why_not()) is not None:
            self._pause(why)
        else:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _why_not(self) -> str | None:
        """Why no connection may be accepted now: its descriptor would be one of the reserve."""
        try:
            following = self._following()
        except OSError as error:
            return error.strerror
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = following + self._reserve < limit or limit < 0
        return None if spare else f"the limit is {limit} file descriptors"

    def _following(self) -> int:
        """The next descriptor. Raises OSError if there is none."""
        following = os.dup(self._listener.fileno())
        os.close(following)
        return following

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._pause(error.strerror)
                return  # or no client waits, or one has left
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            if (why := self._why_not()) is not None:
                self._pause(why)
                return

    async def _open(self, connection: socket.socket) -> None:
        patience = TLS_S if self._tls is not None else None
        try:
            await self._loop.connect_accepted_socket(
                self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=patience
            )
        except OSError as error:  # no TLS, or the client has left
            logger.debug("a connection was not opened: %s", error)
            connection.close()

    def _pause(self, why: str | None) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._resume = self._loop.call_later(PAUSE_S, self._start)
        if time.monotonic() >= self._logged + LOG_S:
            self._logged = time.monotonic()
            logger.warning("no more connections for now: %s; those that are open go on", why)

    def close(self) -> None:
        """Accept no more. Open connections go on."""
        if self._closed:
            return
        self._closed = True
        if self._resume is not None:
            self._resume.cancel()
        else:
            self._loop.remove_reader(self._listener.fileno())
        for task in self._opening:
            task.cancel()

    async def wait_closed(self) -> None:
        """Until no connection is being opened."""
        await asyncio.gather(*self._opening, return_exceptions=True)
