"""Logging for every process: one line per event on stderr, as text for people or JSON for programs.

A line about a request names it: by REQUEST in code that handles one request at a time (the HTTP server),
else in its first word: `log.info("%s: filled in %.3f s", run, seconds)`. Prompts are never logged.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

LEVELS = ("debug", "info", "warning", "error")
REQUEST: ContextVar[str] = ContextVar("request", default="")
"""The id of the current request."""
NOTICE = logging.getLogger("baton.notice")
"""For what the user should see while a worker starts; the supervisor passes it on."""


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "process": self._process,
            "level": record.levelname.lower(),
            "logger": record.name,
            "request": REQUEST.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request = REQUEST.get()
        text = super().format(record)
        return text.replace(": ", f": {request}: ", 1) if request else text

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Without the traceback, which has lines of its own."""
        return printable(super().formatMessage(record))


def printable(text: str) -> str:
    """With escapes for line ends and other characters that nobody sees. A message may quote what a client
    sent: it must not begin a line that looks like another event, or reach the terminal as a command."""
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])


def set_up_logging(process: str, level: str = "warning", *, json_lines: bool = False) -> None:
    """Log to stderr under the process name `process`, e.g. decode-0. A command calls this once. A stderr
    that is closed or full raises no error."""
    if level not in LEVELS:
        raise ValueError(f"log level must be one of {', '.join(LEVELS)}, got {level!r}")
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    text = f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(JsonLines(process) if json_lines else _Text(text))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
