"""A job says what it waits for: not at once, not too often, and again if it takes long."""

from baton.offline.waiting import WaitingLines


def said(texts: list[tuple[float, str]]) -> list[float]:
    lines = WaitingLines()
    return [at for at, text in texts if lines.line(text, at) is not None]


def test_a_cluster_that_is_soon_ready_is_not_talked_about() -> None:
    assert said([(0.0, "a"), (9.9, "a")]) == []


def test_a_change_is_said_and_a_long_wait_is_said_again() -> None:
    assert said([(10.0, "a"), (11.0, "b"), (14.9, "b"), (15.0, "b"), (74.9, "b"), (75.0, "b")]) == [
        10.0, 15.0, 75.0
    ]  # fmt: skip


def test_the_line_names_what_is_missing() -> None:
    line = WaitingLines().line("no decode worker has joined", 12.3)
    assert line == "the cluster is not ready after 12 s: no decode worker has joined"
