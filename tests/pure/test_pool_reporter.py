"""News of the pool: when there is some, along with other messages if there are any, never in vain."""

from baton.kv.blocks import BlockTable
from decode_worker.pool_reporter import ALONE_INTERVAL_S, INTERVAL_S, PoolReporter


def changed() -> tuple[BlockTable, PoolReporter]:
    """A reporter that told all at 0.0, and one block less since."""
    table = BlockTable("d", "d/0", 8, lease_s=60.0)
    reporter = PoolReporter(table)
    assert reporter.report(0.0, alone=True) is not None
    table.reserve("r#0", 1, now=0.0)
    return table, reporter


def test_it_is_told_once_and_again_when_it_has_changed() -> None:
    table, reporter = changed()
    told = reporter.report(INTERVAL_S, alone=False)
    assert told is not None
    assert told.free == table.free_blocks == 7
    assert reporter.report(9.0, alone=False) is None
    assert reporter.due(9.0) == float("inf")


def test_what_would_go_alone_beside_a_forward_waits_for_longer() -> None:
    _, reporter = changed()
    assert reporter.report(INTERVAL_S, alone=True) is None
    assert reporter.report(ALONE_INTERVAL_S, alone=True) is not None


def test_an_idle_worker_wakes_up_for_it_when_it_may_be_told() -> None:
    _, reporter = changed()
    soon = reporter.due(0.1)
    assert soon == INTERVAL_S - 0.1
    assert reporter.report(0.1 + soon - 0.001, alone=False) is None
    assert reporter.report(0.1 + soon, alone=False) is not None


def test_the_next_router_is_told_what_the_last_one_knew() -> None:
    _, reporter = changed()
    reporter.report(1.0, alone=False)
    reporter.forget()
    assert reporter.due(2.0) == 0.0
    assert reporter.report(2.0, alone=False) is not None
