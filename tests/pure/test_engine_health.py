"""When an engine worker is paused, and when it looks at its upstream."""

import pytest

from decode_worker.upstream.health import (
    CHECK_S,
    MISSES,
    MOST_AGAIN_S,
    MOST_BUSY_S,
    Blame,
    Health,
    Look,
    blame,
)

STATUSES = [
    (400, Blame.REQUEST), (413, Blame.REQUEST), (422, Blame.REQUEST),
    (429, Blame.BUSY), (503, Blame.BUSY),
    (401, Blame.SETTING), (403, Blame.SETTING), (404, Blame.SETTING), (301, Blame.SETTING),
    (500, Blame.SERVER), (502, Blame.SERVER), (504, Blame.SERVER),
]  # fmt: skip


@pytest.mark.parametrize(("status", "whose"), STATUSES)
def test_whose_fault_a_status_is(status: int, whose: Blame) -> None:
    assert blame(status) is whose


def test_it_looks_now_and_then_one_look_at_a_time() -> None:
    health = Health()
    assert health.look(0.0) is Look.LIGHT
    assert health.look(99.0) is None
    health.found(Look.LIGHT, 100.0)
    assert health.look(100.0) is None
    assert health.due(100.0) == CHECK_S
    assert health.look(100.0 + CHECK_S) is Look.LIGHT


def test_down_until_a_whole_look_finds_it_as_it_was() -> None:
    health = Health()
    health.found(Look.LIGHT, 0.0)
    health.down("reset", 1.0)
    assert health.why(1.0) == "reset"
    assert health.look(1.0) is Look.WHOLE
    assert not health.missed("refused", 1.0, answered=True)
    assert health.why(1.0) == "refused"
    assert health.look(1.0) is None
    assert health.look(1.0 + health.due(1.0)) is Look.WHOLE
    health.found(Look.WHOLE, 2.0)
    assert health.why(2.0) == ""


def test_a_light_look_that_was_under_way_does_not_bring_it_back() -> None:
    health = Health()
    assert health.look(0.0) is Look.LIGHT
    health.down("reset", 1.0)
    health.found(Look.LIGHT, 1.0)
    assert health.why(1.0) == "reset"
    assert health.look(1.0) is Look.WHOLE


def test_looks_at_what_is_down_become_rarer() -> None:
    health, now, waits = Health(), 0.0, []
    health.down("reset", now)
    for _ in range(12):
        assert health.look(now) is Look.WHOLE
        health.missed("refused", now, answered=True)
        waits.append(health.due(now))
        now += waits[-1]
    assert waits == sorted(waits)
    assert waits[-1] == MOST_AGAIN_S


def test_silence_is_gone_after_some_misses_unless_tokens_come() -> None:
    health = Health()
    for _ in range(MISSES - 1):
        assert health.look(0.0) is Look.LIGHT
        assert not health.missed("no answer", 0.0, answered=False)
    assert health.why(0.0) == ""
    health.heard()
    assert health.look(0.0) is Look.LIGHT
    assert not health.missed("no answer", 0.0, answered=False)
    for last in (False, True):
        assert health.look(0.0) is Look.LIGHT
        assert health.missed("no answer", 0.0, answered=False) is last
    assert health.why(0.0) == "no answer"


def test_busy_for_as_long_as_it_says() -> None:
    health = Health()
    health.busy("429", 7.0, 10.0)
    assert health.why(16.9) == "429"
    assert not health.out_of_order
    assert health.why(17.0) == ""
    health.busy("429", 1e9, 20.0)
    assert health.why(20.0 + MOST_BUSY_S) == ""


def test_busy_longer_and_longer_until_tokens_come() -> None:
    health, ends = Health(), []
    for _ in range(3):
        health.busy("429", None, 0.0)
        ends.append(health._busy_until)
    assert ends == [0.5, 1.0, 2.0]
    health.heard()
    health.busy("429", None, 0.0)
    assert health._busy_until == 0.5


def test_a_run_that_ends_frees_a_busy_one() -> None:
    health = Health()
    health.busy("429", 7.0, 10.0)
    health.freed()
    assert health.why(10.0) == ""
