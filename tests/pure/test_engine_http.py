"""The sockets of an engine worker against servers that answer well, badly, half, late and not at all."""

import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from baton.errors import InputError
from decode_worker.upstream.health import Look
from decode_worker.upstream.http import Address, HttpUpstream
from decode_worker.upstream.node import Broken, Ended, Events, Heard, Looked, Refused
from decode_worker.upstream.survey import Expected, Unready
from tests.patience import PATIENCE_S

EXPECTED = Expected("auto", "", 8, 100, (1, 2, 3))
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
SILENCE_S = (
    0.8  # longer than a busy machine takes to answer at once, and no longer than a test may wait
)
CHUNKED = SSE + b"Transfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"token_ids":[5]}]}\n\n'
PART = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)

Script = Callable[[socket.socket], None]


class Server:
    """Reads a request, then does what the script says; then closes the connection."""

    def __init__(self) -> None:
        self.script: Script = lambda connection: None
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(65536)
            self.requests.append(head + b"\r\n\r\n" + body)
            self.script(connection)

    def close(self) -> None:
        self._listener.close()


def says(*parts: bytes) -> Script:
    return lambda connection: connection.sendall(b"".join(parts))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def connected(port: int, *, silence_s: float = PATIENCE_S, key: str = "") -> HttpUpstream:
    address = Address.parse(f"http://127.0.0.1:{port}/base/v1")
    return HttpUpstream(address, EXPECTED, key=key, silence_s=silence_s)


@pytest.fixture
def upstream(server: Server) -> Iterator[HttpUpstream]:
    made = connected(server.port, key="secret")
    yield made
    made.shut()


def heard(
    upstream: HttpUpstream, enough: Callable[[list[Heard]], bool] | None = None
) -> list[Heard]:
    """What is heard, until the end of a call."""
    (socket_,), found = upstream.wakeups(), list[Heard]()
    enough = enough or (lambda news: any(not isinstance(each, Events) for each in news))
    while not enough(found):
        assert select.select([socket_.fileno()], [], [], PATIENCE_S)[0] or upstream.poll(), found
        found += upstream.poll()
    return found


def ask(upstream: HttpUpstream, server: Server, script: Script) -> list[Heard]:
    server.script = script
    upstream.ask(1, "/v1/completions", {"prompt": [1, 2]})
    return heard(upstream)


def test_a_stream_of_events(server: Server, upstream: HttpUpstream) -> None:
    news = ask(upstream, server, says(CHUNKED, PART, PART, b"0\r\n\r\n"))
    assert [data for each in news[:-1] for data in each.data] == [EVENT.decode()[6:-2]] * 2  # type: ignore[union-attr]
    assert news[-1] == Ended(1)
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret" in head
    assert json.loads(body) == {"prompt": [1, 2]}


def test_a_reply_that_is_not_streamed(server: Server, upstream: HttpUpstream) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n"
    assert ask(upstream, server, says(head, b'{"a": 1}')) == [Events(1, ('{"a": 1}',)), Ended(1)]


REFUSALS = [
    (b"429 Too Many\r\nRetry-After: 7\r\n", Refused(1, 429, "slow down", 7.0)),
    (b"503 Busy\r\nRetry-After: Mon, 30 Nov 2026 09:00:00 GMT\r\n", Refused(1, 503, "slow down")),
    (b"400 Bad\r\n", Refused(1, 400, "slow down")),
]


@pytest.mark.parametrize(("line", "refused"), REFUSALS)
def test_a_status(server: Server, upstream: HttpUpstream, line: bytes, refused: Refused) -> None:
    body = b'{"error":{"message":"slow\\ndown"}}'
    head = b"HTTP/1.1 " + line + b"Content-Length: %d\r\n\r\n" % len(body)
    assert ask(upstream, server, says(head, body)) == [refused]


HALF: list[tuple[bytes, str]] = [
    (CHUNKED + PART, "complete message body"),
    (CHUNKED + PART[:-9], "complete message body"),
    (b"HTTP/1.1 200 OK\r\nContent-Ty", ""),
    (b"", ""),
    (b"SSH-2.0-OpenSSH\r\n\r\n", ""),
    (CHUNKED + b"zz\r\n", ""),
    (SSE + b"Content-Length: 9\r\n\r\ndata: \xff\n\n", ""),
    # closed in the middle of a character, by HTTP's rules at the end of the reply, or not
    (SSE + b'Connection: close\r\n\r\ndata: {"choices":[{"text":"\xe6\x97', "utf-8"),
    (CHUNKED + b'16\r\ndata: {"choices":"\xe6\x97\xa5', ""),
]


@pytest.mark.parametrize(("sent", "words"), HALF)
def test_half_a_reply_and_what_is_none(
    server: Server, upstream: HttpUpstream, sent: bytes, words: str
) -> None:
    last = ask(upstream, server, says(sent))[-1]
    assert isinstance(last, Broken)
    assert last.begun
    assert words in last.why
    assert last.why


def test_silence_in_the_middle_ends_the_call(server: Server) -> None:
    upstream, over = connected(server.port, silence_s=SILENCE_S), threading.Event()

    def stall(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + PART)
        over.wait(PATIENCE_S)

    news = ask(upstream, server, stall)
    over.set()
    assert news[-1] == Broken(1, f"it sent nothing for {SILENCE_S} s", begun=True)
    upstream.shut()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ALIVE: list[tuple[bytes, bytes, str]] = [
    (CHUNKED + PART, chunk(b": keep-alive\n\n"), f"it sent nothing but comments for {SILENCE_S} s"),
    (CHUNKED + PART, b"1", f"it sent nothing for {SILENCE_S} s"),  # a chunk's size that never ends
    (CHUNKED, chunk(b":"), f"it sent nothing but comments for {SILENCE_S} s"),
    (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", f"it sent nothing for {SILENCE_S} s"),
    (b"", b"HTTP/1.1 102 Processing\r\n\r\n", f"it sent nothing for {SILENCE_S} s"),
]


@pytest.mark.parametrize(("first", "again", "why"), ALIVE)
def test_what_only_keeps_a_connection_alive_is_silence(
    server: Server, first: bytes, again: bytes, why: str
) -> None:
    """It is sent far more often than the silence lasts, until the connection is closed."""
    upstream = connected(server.port, silence_s=SILENCE_S)

    def drip(connection: socket.socket) -> None:
        connection.sendall(first + again)
        connection.settimeout(0.02)
        with suppress(ConnectionError):
            while True:
                connection.sendall(again)
                with suppress(TimeoutError):
                    if not connection.recv(1):
                        return

    news = ask(upstream, server, drip)
    upstream.shut()
    assert news[-1] == Broken(1, why, begun=True)
    assert len(news) == 1 + (PART in first)


def test_a_refusal_whose_body_does_not_end_is_told(server: Server) -> None:
    """One that drips is told after half the silence, one that rushes when it is too large."""

    def drip(connection: socket.socket, part: bytes) -> None:
        head = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + chunk(part))
        connection.settimeout(0.02 if len(part) == 1 else None)
        with suppress(ConnectionError):
            while True:
                connection.sendall(chunk(part))
                with suppress(TimeoutError):
                    if len(part) == 1 and not connection.recv(1):
                        return

    for part, silence_s in ((b"x", SILENCE_S), (b"x" * 100_000, PATIENCE_S)):
        upstream = connected(server.port, silence_s=silence_s)
        (refused,) = ask(upstream, server, partial(drip, part=part))
        upstream.shut()
        assert isinstance(refused, Refused)
        assert refused.status == 503
        assert refused.why.startswith("x")


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    upstream = connected(port)
    upstream.ask(1, "/v1/completions", {})
    assert heard(upstream) == [Broken(1, "connection refused", begun=False)]
    upstream.look(Look.LIGHT)
    assert heard(upstream) == [Looked(Look.LIGHT, "connection refused")]
    with pytest.raises(Unready, match="connection refused"):
        upstream.survey()
    upstream.shut()


def test_closing_a_call_closes_its_connection(server: Server, upstream: HttpUpstream) -> None:
    closed = threading.Event()

    def stream(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + PART)
        try:
            if not connection.recv(1):
                closed.set()
        except ConnectionResetError:
            closed.set()

    server.script = stream
    upstream.ask(1, "/v1/completions", {})
    heard(upstream, bool)
    upstream.close(1)
    assert closed.wait(PATIENCE_S)
    upstream.close(1)
    upstream.close(99)
    assert upstream.poll() == []


def test_shutting_it_closes_everything(server: Server) -> None:
    upstream, closed = connected(server.port), threading.Event()

    def stream(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + PART)
        with suppress(ConnectionResetError):
            connection.recv(1)
        closed.set()

    server.script = stream
    upstream.ask(1, "/v1/completions", {})
    heard(upstream, bool)
    upstream.shut()
    assert closed.wait(PATIENCE_S)


LOOKS: list[tuple[bytes, str]] = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ""),
    (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", ""),  # it has no such path: it answers
    (b"HTTP/1.1 500 Dead\r\nContent-Length: 4\r\n\r\ndead", "answered 500: dead"),
    (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "answered 401"),
]


@pytest.mark.parametrize(("sent", "why"), LOOKS)
def test_a_look(server: Server, upstream: HttpUpstream, sent: bytes, why: str) -> None:
    server.script = says(sent)
    upstream.look(Look.LIGHT)
    (looked,) = heard(upstream)
    assert isinstance(looked, Looked)
    assert why in looked.why
    assert bool(why) == bool(looked.why)


def test_a_look_sees_another_model(server: Server, upstream: HttpUpstream) -> None:
    """Started again with another one while nothing ran there."""
    served = ["a"]

    def answer(connection: socket.socket) -> None:
        path = server.requests[-1].split(b" ")[1]
        event = b'data: {"choices":[{"token_ids":[5]}]}\n\n'
        listed = b'{"data":[{"id":"%s"}]}' % served[0].encode()
        body = event if path.endswith(b"/completions") else listed
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    server.script = answer
    assert upstream.survey().model == "a"
    for model, why in (("a", ""), ("b", "it serves 'b' now")):
        served[0] = model
        upstream.look(Look.LIGHT)
        assert heard(upstream) == [Looked(Look.LIGHT, why)]


ADDRESSES = [
    ("http://gpu7:8000", "http://gpu7:8000"),
    ("http://gpu7:8000/", "http://gpu7:8000"),
    ("http://gpu7:8000/v1", "http://gpu7:8000"),
    ("http://gpu7:8000/llm/v1/", "http://gpu7:8000/llm"),
    ("https://gpu7", "https://gpu7:443"),
    ("http://[::1]:80", "http://[::1]:80"),
]


@pytest.mark.parametrize(("url", "normal"), ADDRESSES)
def test_an_address(url: str, normal: str) -> None:
    assert Address.parse(url).url == normal


@pytest.mark.parametrize(
    "url", ["gpu7:8000", "ftp://gpu7", "http://", "http://gpu7:http", "http://gpu7:99999",
            "http://user:key@gpu7", "http://gpu7?key=1", "http://gpu7/a b",
            "http://gpu7/\n", "http://gpü7", "http://gpu7#x", ""],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match="--upstream"):
        Address.parse(url)
