"""News: one log line for each event of the cluster that a person may look for. What is lost is a warning,
what comes is information (`--log-level info`)."""

import logging

from baton.wire.messages import Attached, Hello

logger = logging.getLogger("router")


def joined(hello: Hello) -> None:
    what = f"{hello.role} worker on {hello.device}, host {hello.host[:12]}, pid {hello.pid}"
    logger.info("%s joined: %s", hello.worker, what)


def refused(worker: str, why: str) -> None:
    logger.warning("%s may not join: %s", worker, why)


def attached(prefill: str, report: Attached, *, back: bool) -> None:
    level = logging.WARNING if back else logging.INFO  # its loss was a warning
    way = f"by {report.transport}" + (f" ({report.why})" if report.why else "")
    again = " again" if back else ""
    logger.log(level, "%s can write to %s%s, %s", prefill, report.worker, again, way)


def way_lost(prefill: str, decode: str, why: str, *, moved: int, again_s: float) -> None:
    fills = f"; {moved:,} fills begin again" if moved else ""
    line = "%s cannot write to %s: %s; tried again in %.1f s%s"
    logger.warning(line, prefill, decode, why, again_s, fills)


def left(worker: str, *, expected: bool, proven: bool, moved: int) -> None:
    runs = f"; {moved:,} requests are moved" if moved else ""
    if expected:
        logger.info("%s has left%s", worker, runs)
    else:
        how = "has died" if proven else "is silent and given up"
        logger.warning("%s %s%s", worker, how, runs)
