"""WebSocket clients of all kinds, on real sockets: each message has an end, or its socket has."""

import asyncio
from collections.abc import Sequence

import pytest
from websockets.frames import Close, Frame, Opcode

from baton.server.admission import Bodies
from baton.server.bodies import MAX_BODY_BYTES
from baton.server.socket_limits import MOST_FRAMES, PIECE, StrictWebSocket
from tests.patience import PATIENCE_S
from tests.pure.listening import HEAD, Served, serving

UPGRADE = HEAD.replace(b"GET /", b"GET /v1/stream") + (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


def frame(data: bytes, opcode: Opcode = Opcode.TEXT, *, last: bool = True) -> bytes:
    return Frame(opcode, data, fin=last).serialize(mask=True)


class Client:
    """One socket, after its handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def next(self) -> tuple[Opcode, bytes]:
        """The next frame. They are all short."""
        async with asyncio.timeout(PATIENCE_S):
            first, length = await self.reader.readexactly(2)
            return Opcode(first & 15), await self.reader.readexactly(length)

    async def close_code(self) -> int:
        """Of the close frame that comes."""
        while (got := await self.next())[0] is not Opcode.CLOSE:
            pass
        return int(Close.parse(got[1]).code)


async def connected(served: Served) -> Client:
    reader, writer = await served.open(UPGRADE + b"\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
    assert answer.startswith(b"HTTP/1.1 101 "), answer
    return Client(reader, writer)


async def nothing_is_left(served: Served) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while served.server.server_state.connections or served.guard.bodies.held:
            await asyncio.sleep(0.01)


def test_messages_of_every_size_arrive_and_nothing_is_kept_of_them() -> None:
    async def work() -> None:
        async with serving() as served:
            client = await connected(served)
            for size in (0, 1, 4095, 4096, 70_000, MAX_BODY_BYTES):
                client.writer.write(frame(b"x" * size))
                assert await client.next() == (Opcode.TEXT, str(size).encode())
            parts = [frame(b"a", last=False)]
            parts += [frame(b"b", Opcode.CONT, last=False)] * (MOST_FRAMES - 2)
            client.writer.write(b"".join([*parts, frame(b"c", Opcode.CONT)]))
            assert await client.next() == (Opcode.TEXT, str(MOST_FRAMES).encode())
            client.writer.write(frame(b"1") * 2000)  # from one read
            for _ in range(2000):
                assert await client.next() == (Opcode.TEXT, b"1")
            assert served.guard.bodies.held == 0
            client.writer.close()
            await nothing_is_left(served)

    asyncio.run(work())


HALF = frame(b"x" * 1000)[:500]


@pytest.mark.parametrize("sent", [[HALF], [frame(b"a", last=False)], [frame(b"1"), HALF]])
@pytest.mark.parametrize("pings", [False, True])
def test_the_rest_of_a_message_is_not_waited_for(
    sent: Sequence[bytes], pings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a ping within a message keep it open."""
    monkeypatch.setattr("baton.server.socket_limits.MESSAGE_S", 0.2)

    async def work() -> None:
        async with serving() as served:
            client = await connected(served)
            client.writer.write(b"".join(sent))

            async def ping() -> None:
                while pings and HALF not in sent:
                    client.writer.write(frame(b"", Opcode.PING))
                    await asyncio.sleep(0.02)

            pinging = asyncio.create_task(ping())
            assert await client.close_code() == 1008
            pinging.cancel()
            client.writer.close()
            await nothing_is_left(served)

    asyncio.run(work())


def test_who_sends_nothing_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.socket_limits.MESSAGE_S", 0.1)

    async def work() -> None:
        async with serving() as served:
            idle, late = await connected(served), await connected(served)
            late.writer.write(HALF)
            assert await late.close_code() == 1008  # in this time the idle one was not closed
            idle.writer.write(frame(b"abc"))
            assert await idle.next() == (Opcode.TEXT, b"3")
            for each in (idle, late):
                each.writer.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(b"", last=False) + frame(b"", Opcode.CONT, last=False) * MOST_FRAMES, 1009),
        (frame(b"x" * (MAX_BODY_BYTES + 1)), 1009),
        (frame(b"\xff"), 1007),
        (b"\xff" * 50, 1002),
    ],
    ids=["frames", "size", "text", "noise"],
)
def test_what_is_too_much_or_no_message_ends_the_socket(
    sent: bytes, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with serving() as served:
            client = await connected(served)
            client.writer.write(sent[:60_000])
            assert await client.close_code() == code
            client.writer.close()
            await nothing_is_left(served)

    asyncio.run(work())
    assert "Traceback" not in caplog.text


def test_unfinished_messages_of_all_clients_together_are_bounded() -> None:
    async def work() -> None:
        async with serving() as served:
            served.guard.bodies = Bodies(90_000, allowance=0)
            clients = [await connected(served) for _ in range(4)]
            for client in clients[:3]:
                client.writer.write(frame(b"x" * 30_000)[:25_000])
            async with asyncio.timeout(PATIENCE_S):
                while served.guard.bodies.held < 75_000:
                    await asyncio.sleep(0.01)
            clients[3].writer.write(frame(b"x" * 30_000)[:25_000])
            assert await clients[3].close_code() == 1013
            clients[0].writer.close()
            async with asyncio.timeout(PATIENCE_S):
                while served.guard.bodies.held > 50_000:
                    await asyncio.sleep(0.01)
            for client in clients:
                client.writer.close()
            await nothing_is_left(served)

    asyncio.run(work())


def test_a_flood_of_the_smallest_frames_leaves_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many have arrived at once: after each piece everybody else has a turn."""
    smallest, handle = frame(b"", Opcode.PING), StrictWebSocket.handle_ping
    handled = [0]  # by turn

    def counted(self: StrictWebSocket) -> None:
        handled[-1] += 1
        handle(self)

    monkeypatch.setattr(StrictWebSocket, "handle_ping", counted)

    async def turns() -> None:
        while True:
            handled.append(0)
            await asyncio.sleep(0)

    async def work() -> None:
        async with serving() as served:
            client = await connected(served)
            counting = asyncio.create_task(turns())
            client.writer.write(smallest * 20_000 + frame(b"abc"))
            pongs = 0
            while (got := await client.next()) != (Opcode.TEXT, b"3"):
                assert got == (Opcode.PONG, b"")
                pongs += 1
            counting.cancel()
            assert pongs == sum(handled) == 20_000
            assert max(handled) <= PIECE // len(smallest) + 1
            client.writer.close()

    asyncio.run(work())
