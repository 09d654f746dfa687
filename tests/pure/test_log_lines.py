"""One event is one line of the log, whatever a client sent."""

import logging
from io import StringIO

import pytest

from baton.log import printable, set_up_logging


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        ("/a\n2026-01-01 server ERROR forged", r"/a\n2026-01-01 server ERROR forged"),
        ("/a\r\x1b[31m\x07\x00\x9b2J", r"/a\r\x1b[31m\x07\x00\x9b2J"),
        ("\u2028\u202e\ud800", r"\u2028\u202e\ud800"),
        ("/café 中 \\n", "/café 中 \\n"),
    ],
)
def test_characters_that_nobody_sees_are_shown(sent: str, logged: str) -> None:
    assert printable(sent) == logged


def test_a_message_stays_on_its_line_and_a_traceback_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, said = logging.getLogger(), StringIO()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr(logging, "raiseExceptions", True)  # it is set; restored afterwards
    try:
        set_up_logging("server", "info")
        logging.getLogger("a").info("GET %s", "/\n/b")
        try:
            raise ValueError("bad")
        except ValueError as error:
            logging.getLogger("a").error("oh", exc_info=error)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = said.getvalue().splitlines()
    assert lines[0].endswith(r" server INFO a: GET /\n/b")
    assert lines[1].endswith(" server ERROR a: oh")
    assert lines[2].startswith("Traceback")
    assert lines[-1] == "ValueError: bad"
