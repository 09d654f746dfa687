"""Connections of all kinds of clients, on real sockets: each ends, and says why where it can."""

import asyncio
import logging
import os
import resource
import socket
import ssl
import struct
import subprocess
from contextlib import closing, suppress
from pathlib import Path

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.server import accept, connection
from baton.server.accept import Acceptor, reserve_of
from baton.server.connection import check_head
from tests.patience import PATIENCE_S
from tests.pure.listening import HEAD, KEY, POST, answered, serving


async def read_all(client: socket.socket) -> None:
    """Until the server's end."""
    while await asyncio.get_running_loop().sock_recv(client, 100_000):
        pass


BAD_HEADS = {
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two lengths that differ": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "a signed length": POST + b"Content-Length: +5\r\n\r\nhello",
    "a length and chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": POST + b"transfer-encoding:chunked\r\ncontent-length:4\r\n\r\n0\r\n\r\n",
    "another coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding with HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded header": HEAD + b"X: a\r\n b\r\n\r\n",
    "a folded length": POST + b"Content-Length:\r\n 5\r\n\r\nhello",
    "bare line feeds": b"GET / HTTP/1.1\nHost: localhost\n\n",
    "one bare line feed": HEAD + b"A: b\nContent-Length: 5\r\n\r\n",
    "a bare carriage return": HEAD + b"A: b\rContent-Length: 5\r\n\r\n",
    "a space before the colon": HEAD + b"Content-Length : 5\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": HEAD + b"Host: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/3": b"GET / HTTP/3\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40,
    "nothing of HTTP": b"\x00\xff" * 50 + b"\r\n\r\n",
    "a bad chunk": POST + KEY + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a flood of chunks": POST + KEY + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 9000,
}  # fmt: skip


def test_what_is_not_http_is_refused_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with serving("k") as served:
            for name, sent in BAD_HEADS.items():
                answered(await served.ask(sent), 400, "invalid_http", name)
                good = await served.ask(HEAD + KEY + b"Connection: close\r\n\r\n")
                assert b" 200 " in good, f"after {name}"
                assert "Traceback" not in caplog.text, name

    asyncio.run(work())


def test_junk_behind_a_request_is_no_request() -> None:
    async def work() -> None:
        async with serving() as served:
            first, _, rest = (await served.ask(HEAD + b"\r\n" + b"junk junk\r\n\r\n")).partition(
                b"\r\n\r\n"
            )
            assert b" 200 " in first
            answered(rest[rest.index(b"HTTP/1.1") :], 400, "invalid_http")
            assert served.app.asked == ["/"]

    asyncio.run(work())


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Authorization"])
def test_nobody_chooses_the_tenant_he_is(name: str) -> None:
    """Each made-up address would be a share of its own."""

    async def work() -> set[str]:
        async with serving() as served:
            for address in ("10.0.0.1", "10.0.0.2"):
                line = f"{name}: {address}\r\nConnection: close\r\n\r\n"
                assert (await served.ask(HEAD + line.encode())).startswith(b"HTTP/1.1 200 ")
            return served.app.tenants

    assert asyncio.run(work()) == {"127.0.0.1"}


def test_a_head_that_is_too_long_is_refused() -> None:
    async def work() -> None:
        async with serving() as served:
            for long in (b"A: " + b"x" * 200_000 + b"\r\n", b"A: b\r\n" * 40_000):
                answered(await served.ask(HEAD + long + b"\r\n"), 431, "invalid_http")
            for size, status in ((16_000, 200), (17_000, 431), (60_000, 431)):  # in one read
                head = HEAD + b"Connection: close\r\nA: " + b"x" * size + b"\r\n\r\n"
                assert int((await served.ask(head)).split()[1]) == status

    asyncio.run(work())


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (POST + b"Content-Length: 4000000\r\n\r\n", 401, "invalid_api_key"),
        (POST + KEY + b"Content-Length: 5000000\r\n\r\n", 413, "body_too_large"),
        (POST + KEY + b"Content-Length: 4000000\r\n\r\n", 408, "request_timeout"),
        (POST + KEY + b"Transfer-Encoding: chunked\r\n\r\n", 408, "request_timeout"),
        (HEAD + b"Content-Length: 4000000\r\n\r\n", 401, "invalid_api_key"),
    ],
)
def test_a_client_that_goes_on_sending_gets_its_answer_and_an_end(
    sent: bytes, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly it sends: what trickles in keeps nothing open."""
    monkeypatch.setattr("baton.server.guard.BODY_S", 0.3)
    monkeypatch.setattr("baton.server.connection.LINGER_S", 0.3)
    trickle = b"1\r\n \r\n" if b"chunked" in sent else b" "

    async def work() -> None:
        async with serving("k") as served:
            reader, writer = await served.open(sent.replace(b"GET / ", b"GET /v1/models "))

            async def drip() -> None:
                while True:
                    writer.write(trickle)
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            try:
                answered(await asyncio.wait_for(reader.read(), PATIENCE_S), status, code)
                async with asyncio.timeout(PATIENCE_S):
                    while served.server.server_state.connections:
                        await asyncio.sleep(0.01)
            finally:
                dripping.cancel()
                writer.close()

    asyncio.run(work())


def test_a_body_nobody_reads_is_not_read() -> None:
    """GET /x with a body: the answer comes before the body does, and the connection ends."""

    async def work() -> None:
        async with serving() as served:
            sent = await served.ask(HEAD + b"Content-Length: 3000000\r\n\r\nabc")
            assert sent.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in sent.lower()
            assert sent.endswith(b"0\r\n\r\n")

    asyncio.run(work())


HALVES = (b"", b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nA: b\r\n", b"G", b"GET /\r\n")


def test_half_a_head_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.connection.HEAD_S", 1.0)  # far longer than a whole head takes

    async def work() -> None:
        async with serving() as served:
            second = [served.ask(HEAD + b"\r\n" + sent) for sent in HALVES]  # on its connection
            told = await asyncio.gather(*map(served.ask, HALVES), *second)
            assert told[: len(HALVES)] == [b""] * len(HALVES)
            assert all(each.startswith(b"HTTP/1.1 200 ") for each in told[len(HALVES) :])

    asyncio.run(work())


@pytest.mark.parametrize("path", [b"/flood", b"/big"])
@pytest.mark.parametrize("drops", [0, 100])
def test_who_does_not_read_is_cut_off(
    path: bytes, drops: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that reads a few bytes now and then. One line is logged, and the request is cancelled."""
    monkeypatch.setattr("baton.server.connection.WRITE_S", 0.4)

    async def work() -> None:
        async with serving() as served:
            loop = asyncio.get_running_loop()
            with closing(socket.socket()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", served.port))
                await loop.sock_sendall(client, HEAD.replace(b"/ ", path + b" ", 1) + b"\r\n")
                async with asyncio.timeout(PATIENCE_S):
                    while not served.app.asked or served.server.server_state.connections:
                        if drops:
                            with suppress(OSError):
                                client.recv(1)
                        await asyncio.sleep(0.02)
                    if path == b"/flood":
                        await served.app.ended.wait()
                    with pytest.raises(ConnectionResetError):
                        await read_all(client)

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    told = [each.getMessage() for each in caplog.records if "read nothing" in each.getMessage()]
    assert len(told) == 1


def test_who_reads_slowly_but_reads_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.connection.WRITE_S", 2.0)

    async def work() -> None:
        async with serving() as served:
            reader, writer = await served.open(HEAD.replace(b"/ ", b"/big ", 1) + b"\r\n")
            size, began = 0, asyncio.get_running_loop().time()
            while size < 20_000_000:
                part = await asyncio.wait_for(reader.read(400_000), PATIENCE_S)
                assert part, f"cut off after {size} bytes"
                size += len(part)
                await asyncio.sleep(0.05)
            assert asyncio.get_running_loop().time() > began + 2.0, "too fast to prove anything"
            writer.close()

    asyncio.run(work())


def test_under_a_low_limit_half_of_the_descriptors_are_for_connections() -> None:
    assert reserve_of(-1, 30) == reserve_of(1024, 30) == reserve_of(62, 30) == 16
    assert [reserve_of(limit, 30) for limit in (50, 40, 32, 31)] == [10, 5, 1, 0]


def test_without_descriptors_it_waits_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("baton.server.accept.PAUSE_S", 0.05)
    monkeypatch.setattr("baton.server.accept.RESERVE", 4)
    pauses, pause = [], Acceptor._pause

    def counted(self: Acceptor, why: str | None) -> None:
        pauses.append(why)
        pause(self, why)

    monkeypatch.setattr(Acceptor, "_pause", counted)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def work() -> None:
        async with serving() as served:
            clients = []
            for _ in range(40):
                clients.append(socket.socket())
                clients[-1].setblocking(False)
            highest = max(int(each) for each in os.listdir("/proc/self/fd"))
            fillers = [os.dup(0)]
            while fillers[-1] < highest:  # no lower descriptor is free
                fillers.append(os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 15, before[1]))
            try:
                for client in clients:
                    client.connect_ex(("127.0.0.1", served.port))
                async with asyncio.timeout(PATIENCE_S):
                    while len(pauses) < 12:  # at each one less than none is left
                        await asyncio.sleep(0.01)
                    assert "no more connections" in caplog.text
                    assert len(served.server.server_state.connections) < 40
                    for each in [os.dup(0) for _ in range(4)]:  # the reserve is still there
                        os.close(each)
                    for client in clients[:-1]:
                        client.close()
                    loop = asyncio.get_running_loop()
                    await loop.sock_sendall(clients[-1], HEAD + b"Connection: close\r\n\r\n")
                    assert b" 200 " in await loop.sock_recv(clients[-1], 1000)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                clients[-1].close()
                for each in fillers:
                    os.close(each)

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert caplog.text.count("no more connections") == 1
    assert "out of system resource" not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-days", "2", "-keyout", str(path), "-out", f"{path}.crt"],
        check=True, capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_over_https_connections_end_too(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Good ones, junk, plain HTTP, a body that does not come, and one that does not read."""
    monkeypatch.setattr("baton.server.guard.BODY_S", 0.3)
    monkeypatch.setattr("baton.server.connection.WRITE_S", 0.4)
    trust = ssl.create_default_context(cafile=str(certificate))

    async def work() -> None:
        async with serving(certificate=certificate) as served:

            async def https(sent: bytes) -> bytes:
                reader, writer = await asyncio.open_connection(
                    "localhost", served.port, family=socket.AF_INET, ssl=trust
                )
                writer.write(sent)
                try:
                    return await asyncio.wait_for(reader.read(), PATIENCE_S)
                finally:
                    writer.close()

            body = POST + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}"
            assert (await https(body)).startswith(b"HTTP/1.1 200 ")
            answered(await https(b"junk\r\n\r\n"), 400, "invalid_http")
            late = POST + b"Content-Length: 9\r\n\r\n{}"
            answered(await https(late), 408, "request_timeout")
            assert b"HTTP" not in await served.ask(HEAD + b"\r\n")
            _, lazy = await asyncio.open_connection(
                "localhost", served.port, family=socket.AF_INET, ssl=trust, limit=1000
            )
            lazy.write(HEAD.replace(b"/ ", b"/big ", 1) + b"\r\n")
            async with asyncio.timeout(PATIENCE_S):
                while "/big" not in served.app.asked or served.server.server_state.connections:
                    await asyncio.sleep(0.01)
            lazy.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert "read nothing" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_reset_leaves_nothing_behind() -> None:
    async def work() -> None:
        async with serving() as served:
            flood = HEAD.replace(b"/ ", b"/flood ", 1) + b"\r\n"
            body = POST + b"Content-Length: 9\r\n\r\n"
            for sent in (b"", HEAD, HEAD + b"\r\n", body, flood):
                _, writer = await served.open(sent)
                await asyncio.sleep(0.02)
                own = writer.get_extra_info("socket")
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                while served.server.server_state.connections or served.server.server_state.tasks:
                    await asyncio.sleep(0.01)

    asyncio.run(work())


NAMES = st.sampled_from([b"Host", b"Content-Length", b"Transfer-Encoding", b"X", b" X", b"\tX"])
VALUES = st.sampled_from([b"5", b"chunked", b"5, 5", b" 7", b"a"])
LINE = st.tuples(NAMES, VALUES, st.sampled_from([b"\r\n", b"\n"]))


@given(st.lists(LINE, max_size=5))
def test_what_passes_has_one_length_at_most(lines: list[tuple[bytes, bytes, bytes]]) -> None:
    head = b"POST / HTTP/1.1\r\n" + b"".join(n + b": " + v + e for n, v, e in lines) + b"\r\n"
    lengths = sum(name.strip() == b"Content-Length" for name, _, _ in lines)
    coded = any(name.strip() == b"Transfer-Encoding" for name, _, _ in lines)
    bad = lengths + coded > 1 or any(n[:1] in b" \t" or e == b"\n" for n, _, e in lines)
    for cut in range(len(head) - 2):
        check_head(head[:cut])  # half a head is no error
    if bad:
        with pytest.raises(h11.RemoteProtocolError):
            check_head(head)
    elif not lengths:
        check_head(head)


def test_limits_are_those_that_are_documented() -> None:
    assert (connection.HEAD_S, connection.LINGER_S, connection.WRITE_S) == (10, 2, 30)
    assert accept.PAUSE_S == 1
    assert ssl.SSLError in OSError.__subclasses__()  # Acceptor expects it
