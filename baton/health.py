"""Health: /livez and /readyz of a router or worker over HTTP, for Kubernetes and other supervisors.

    /livez    200 while the loop turns; 503 when it has not turned for as long as no honest step takes
    /readyz   200 while it takes work, too; 503 with the reason otherwise

The answer comes from a thread, so a worker in a long forward still answers. The loop itself calls beat():
a process whose loop is stuck shows that, although its threads still run. The port is bound when the loop
starts, so a process that still loads its model refuses connections.
"""

import socket
import threading
from contextlib import suppress

from baton.clock import Clock, monotonic
from baton.errors import InputError

REQUEST_S = 1.0  # for a client to send its request line
REQUEST_BYTES = 4096
BACKLOG = 16
REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


class Health:
    """What one process says about itself."""

    def __init__(self, silence_s: float, clock: Clock = monotonic) -> None:
        """`silence_s`: the longest time between two turns of a loop that works."""
        self._silence_s = silence_s
        self._clock = clock
        self._seen = clock()
        self._not_ready = "starting"

    def beat(self, not_ready: str = "") -> None:
        """Called in each turn of the loop. `not_ready`: why it takes no work; empty if it does."""
        self._seen, self._not_ready = self._clock(), not_ready

    def answer(self, request: bytes) -> tuple[int, str]:
        """Status and text for the beginning of an HTTP request."""
        method, _, rest = request.split(b"\n", 1)[0].partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return 405, "GET /livez or /readyz"
        path = rest.split(b" ")[0].split(b"?")[0].strip()
        if path not in (b"/livez", b"/readyz"):
            return 404, "GET /livez or /readyz"
        silent_s = self._clock() - self._seen
        if silent_s >= self._silence_s:
            return 503, f"the loop has not turned for {silent_s:.0f} s"
        if path == b"/readyz" and self._not_ready:
            return 503, self._not_ready
        return 200, "ok"


class HealthServer:
    """Answers with a Health, in a thread of its own, until it is closed."""

    def __init__(self, address: str, health: Health) -> None:
        """`address`: HOST:PORT. Raises InputError if it cannot be listened on."""
        host, port = parse_address(address)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise InputError(f"--health {address}: cannot listen there: {error.strerror}") from None
        self._health = health
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="health", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError):
                connection.settimeout(REQUEST_S)
                request = b""
                while b"\n" not in request and len(request) < REQUEST_BYTES:
                    if not (more := connection.recv(REQUEST_BYTES)):
                        break
                    request += more
                connection.sendall(_response(*self._health.answer(request)))

    def close(self) -> None:
        """No more answers."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._listener.close()
        self._thread.join(REQUEST_S)


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host stands in brackets. Raises InputError."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--health must be HOST:PORT, such as 127.0.0.1:8081, got {address!r}")
    return host, int(port)


def _response(status: int, text: str) -> bytes:
    body = f"{text}\n".encode()
    head = (
        f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
