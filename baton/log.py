"""Logging for every process: text on stderr, one line an event, who speaks first.

A line about a request begins with the request's id: `log.info("%s: filled in %.3f s", run, seconds)`.
"""

import logging

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(who: str, level: str = "warning") -> None:
    """Log lines of this process go to stderr under the name `who`, e.g. decode-0.

    Called once, by a command. A stderr that is closed or full never stops the work.
    """
    if level not in LEVELS:
        raise ValueError(f"log level must be one of {', '.join(LEVELS)}, got {level!r}")
    logging.raiseExceptions = False
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
