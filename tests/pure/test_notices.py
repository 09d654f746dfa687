"""What a starting worker tells the user reaches the user."""

import logging
from pathlib import Path

import pytest

from baton.cluster.notices import Notices
from baton.log import NOTICE, set_up_logging


@pytest.mark.parametrize("level", ["debug", "warning"])
def test_notices_are_read_once_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    log = tmp_path / "log"
    log.write_text("2026 decode-0 WARNING baton.notice: of an earlier life\n")
    notices = Notices(log)
    root = logging.getLogger()
    handlers, before = root.handlers[:], root.level
    try:
        with log.open("a") as stderr:
            monkeypatch.setattr("sys.stderr", stderr)
            set_up_logging("decode-0", level)
            NOTICE.warning("compiling %s", "once")
            logging.getLogger("baton.engine").warning("something else")
    finally:
        root.handlers[:] = handlers
        root.setLevel(before)
    assert notices.new() == ["compiling once"]
    assert notices.new() == []
    with log.open("a") as unfinished:
        unfinished.write("x baton.notice: half")
    assert notices.new() == []
    with log.open("a") as rest:
        rest.write(" a line\n")
    assert notices.new() == ["half a line"]


def test_a_log_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert Notices(tmp_path / "log").new() == []
