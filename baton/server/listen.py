"""The listening socket. It is bound before anything is loaded, so that a port in use is known at once."""

import errno
import socket
from contextlib import suppress

from baton.errors import InputError

BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be bound."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(
            f"--host {host} is not an address of this machine: {error.strerror}"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use by another process: stop that one, or use --port"
            ) from error
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}, port {port}: {why}") from error
    listener.setblocking(False)
    return listener


def adopt(descriptor: int) -> socket.socket:
    """The listening socket inherited from the parent. Raises InputError."""
    with suppress(OSError):
        listener = socket.socket(fileno=descriptor)
        listener.setblocking(False)
        return listener
    raise InputError(f"--fd {descriptor} is not a socket")
