"""News of the pool: when there is some, along with other messages if there are any, never in vain."""

from baton.kv.blocks import BlockTable
from decode_worker.telling import ALONE_S, TELL_S, Teller


def changed() -> tuple[BlockTable, Teller]:
    """A teller that told all at 0.0, and one block less since."""
    table = BlockTable("d", "d/0", 8, lease_s=60.0)
    teller = Teller(table)
    assert teller.news(0.0, busy=True) is not None
    table.reserve("r#0", 1, now=0.0)
    return table, teller


def test_it_is_told_once_and_again_when_it_has_changed() -> None:
    table, teller = changed()
    told = teller.news(TELL_S, busy=False)
    assert told is not None
    assert told.free == table.free_blocks == 7
    assert teller.news(9.0, busy=False) is None
    assert teller.due(9.0) == float("inf")


def test_what_would_go_alone_beside_a_forward_waits_for_longer() -> None:
    _, teller = changed()
    assert teller.news(TELL_S, busy=True) is None
    assert teller.news(ALONE_S, busy=True) is not None


def test_an_idle_worker_wakes_up_for_it_when_it_may_be_told() -> None:
    _, teller = changed()
    soon = teller.due(0.1)
    assert soon == TELL_S - 0.1
    assert teller.news(0.1 + soon - 0.001, busy=False) is None
    assert teller.news(0.1 + soon, busy=False) is not None


def test_the_next_router_is_told_what_the_last_one_knew() -> None:
    _, teller = changed()
    teller.news(1.0, busy=False)
    teller.forget()
    assert teller.due(2.0) == 0.0
    assert teller.news(2.0, busy=False) is not None
