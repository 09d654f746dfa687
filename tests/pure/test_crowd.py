"""Places for connections: fair by address, and a resting one gives way."""

import asyncio
import socket
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from baton.server.crowd import CONNECTIONS, FRESH_S, REFUSED, Crowd, Member, places
from tests.pure.listening import HEAD, PATIENCE_S, Served, answered, serving

UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"


class Town:
    """Members that keep what became of them. Who is reset leaves at once, and so does who is closed,
    unless it is one of the slow."""

    now = 0.0

    def __init__(self, limit: int, refused: int = REFUSED, *, apart_s: float = FRESH_S) -> None:
        """`apart_s`: between two arrivals."""
        self.crowd = Crowd(limit, refused, lambda: self.now)
        self.apart_s = apart_s
        self.gone: list[Member] = []
        self.slow = False  # those who come now: their last bytes are not read

    def came(self, address: str, *, works: bool = False) -> Member:
        slow = self.slow
        member = Member(
            address, lambda: None if slow else self.leaves(member), lambda: self.leaves(member)
        )
        self.now += self.apart_s
        self.crowd.came(member)
        if works:
            self.crowd.works(member)
        return member

    def leaves(self, member: Member) -> None:
        self.gone.append(member)
        self.crowd.left(member)


def test_one_address_that_rests_keeps_nobody_out() -> None:
    town = Town(2048)
    many = [town.came("a") for _ in range(10_000)]
    assert not any(each.refused for each in many)
    assert town.gone == many[: len(town.gone)], "those that rested longest"
    held = len(many) - len(town.gone)
    assert 1800 < held < 2048
    assert not any(town.came("b", works=True).refused for _ in range(200))
    assert all(each.address == "a" for each in town.gone)


def test_one_that_has_just_come_does_not_give_way() -> None:
    """Its request is on its way, and would get no answer."""
    town = Town(9, apart_s=0.0)
    burst = [town.came("a") for _ in range(20)]
    assert [each.refused for each in burst] == [False] * 8 + [True] * 12
    assert not town.gone
    town.crowd.works(burst[1])
    town.crowd.rests(burst[1])
    assert not town.came("a").refused
    assert town.gone == [burst[1]], "it had its answer"
    town.now += FRESH_S
    assert not town.came("a").refused
    assert town.gone == burst[1::-1]


def test_few_of_those_that_gave_way_are_open_still() -> None:
    """Their clients read nothing, or do not say farewell (TLS)."""
    town = Town(9, refused=2)
    town.slow = True
    many = [town.came("a") for _ in range(20)]
    assert not any(each.refused for each in many)
    assert town.gone == many[:10], "those that gave way first"
    for each in many[10:12]:
        town.crowd.rests(each)  # what it sent before comes late
        town.leaves(each)
    assert [town.came("a").refused for _ in range(2)] == [False, False]
    assert town.gone == many[:12]


def test_an_address_without_any_gets_one_of_the_largest_that_has_one_to_give() -> None:
    town = Town(3, apart_s=0.0)
    old = town.came("b")
    town.now += FRESH_S
    town.came("a")
    town.came("a")
    assert not town.came("c").refused
    assert town.gone == [old]
    assert town.came("d").refused


def test_one_address_that_works_keeps_nobody_out() -> None:
    town = Town(2048)
    many = [town.came("a", works=True) for _ in range(10_000)]
    refused = [each for each in many if each.refused]
    assert town.gone == refused[:-REFUSED], "nobody that works was closed"
    assert not any(town.came(f"b{each}", works=True).refused for each in range(100))


def test_one_that_works_and_rests_again_is_the_last_to_give_way() -> None:
    town = Town(9)
    first, second, *others = [town.came("a") for _ in range(8)]
    town.now += FRESH_S
    town.crowd.works(first)
    town.crowd.rests(first)
    for each in others:
        town.crowd.rests(each)  # more of a head has come: it has rested all the while
    assert not town.came("a").refused
    assert town.gone == [second]
    for _ in range(7):
        town.came("a")
    assert town.gone == [second, *others, first]


def test_with_no_place_left_an_address_without_any_gets_one_of_the_largest() -> None:
    town = Town(3)
    a = [town.came("a"), town.came("a")]
    town.came("b")
    assert not town.came("c").refused
    assert town.gone == a[:1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.sampled_from(["came", "slow", "works", "rests", "left"])
        )
    ),
    st.sampled_from([0.0, FRESH_S / 4, FRESH_S]),
)
def test_places_are_counted_right(steps: list[tuple[str, str]], apart_s: float) -> None:
    town = Town(7, refused=2, apart_s=apart_s)
    here: list[Member] = []
    for address, step in steps:
        own = [each for each in here if each.address == address and each not in town.gone]
        if step in ("came", "slow"):
            town.slow = step == "slow"
            here.append(town.came(address))
        elif own and step == "left":
            town.leaves(own[0])
        elif own:
            getattr(town.crowd, step)(own[0])
        now = [each for each in here if each not in town.gone]
        placed = [each for each in now if not each.refused and not each.leaves]
        assert len(placed) == town.crowd._shares.total <= 7
        assert sum(each.refused for each in now) <= 2
        assert sum(each.leaves for each in now) <= 2
    assert len(town.gone) == len(set(town.gone))


def test_places_fit_the_descriptors() -> None:
    assert places(-1, 16) == places(20_000, 16) == (CONNECTIONS, REFUSED)
    assert places(990, 16) == (846, 64)
    assert places(34, 16) == (14, 2)
    assert places(0, 0) == (1, 1)


def test_idle_connections_of_one_address_keep_no_other_out() -> None:
    async def work() -> None:
        times = count(0.0, FRESH_S)  # all that have come could have asked
        async with serving(connections=20, clock=lambda: next(times)) as served:
            others = [await served.open(HEAD) for _ in range(60)]
            assert b" 200 " in await served.ask(HEAD + b"Connection: close\r\n\r\n")
            assert b" 200 " in await from_address(served, "127.0.0.2")
            ended = await asyncio.wait_for(others[0][0].read(), PATIENCE_S)
            assert ended == b""
            for _, writer in others:
                writer.close()

    asyncio.run(work())


def test_each_of_a_burst_of_connections_of_one_address_gets_an_answer() -> None:
    async def work() -> None:
        async with serving(connections=9, clock=lambda: 0.0) as served:
            burst = [await served.open() for _ in range(30)]
            for _, writer in burst:
                writer.write(HEAD + b"Connection: close\r\n\r\n")
            answers = [await asyncio.wait_for(reader.read(), PATIENCE_S) for reader, _ in burst]
            assert {each[9:12] for each in answers} == {b"200", b"503"}
            for _, writer in burst:
                writer.close()

    asyncio.run(work())


def test_busy_connections_of_one_address_are_told_so_and_keep_no_other_out() -> None:
    async def work() -> None:
        async with serving(connections=9) as served:
            flood = HEAD.replace(b"/ ", b"/flood ", 1) + b"\r\n"
            others = [await served.open(flood) for _ in range(8)]
            for reader, _ in others:
                await asyncio.wait_for(reader.readexactly(1000), PATIENCE_S)
            last = b"Connection: close\r\n\r\n"
            for sent in (HEAD + last, HEAD + UPGRADE + KEY + b"\r\n"):
                assert answered(await served.ask(sent), 503, "overloaded")["retry-after"]
            assert b" 200 " in await from_address(served, "127.0.0.2")
            for _, writer in others:
                writer.close()

    asyncio.run(work())


async def from_address(served: Served, address: str) -> bytes:
    """All that comes, to a client with this address."""
    link = socket.socket()
    link.bind((address, 0))
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, ("127.0.0.1", served.port))
    reader, writer = await asyncio.open_connection(sock=link)
    writer.write(HEAD + b"Connection: close\r\n\r\n")
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    finally:
        writer.close()
