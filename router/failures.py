"""Failures: what a client is told about a request that the router gives up. Code and message. Pure."""

from baton.bounds import short
from baton.lifecycle import State
from router.ledger import Entry


def worker_lost(entry: Entry) -> tuple[str, str]:
    """Its workers died too often at one place. `entry` is still in the state of the last death."""
    return "worker_lost", (
        f"{entry.tries.deaths} workers in a row died at the same place of this request, "
        f"{_place(entry)}, so it is not tried again; {_sent(entry)}"
    )


def engine_failed(entry: Entry, why: str) -> tuple[str, str]:
    """Engine workers returned it too often at one place. `entry` is still in its last state."""
    return "worker_lost", (
        f"{entry.tries.deaths} tries in a row ended at the same place of this request, "
        f"{_place(entry)}, so it is not tried again; the last: {short(why)}; {_sent(entry)}"
    )


def fill_failed(entry: Entry, why: str) -> tuple[str, str]:
    """Not even decode could fill its prompt."""
    return "fill_failed", (
        f"the KV cache could not be filled in {entry.tries.refills} tries, the last ones by the decode "
        f"worker itself; the last: {short(why)}; {_sent(entry)}"
    )


def tokens_lost(entry: Entry, why: str) -> tuple[str, str]:
    """Its tokens do not reach the router."""
    return "tokens_lost", f"{why} {entry.tries.gaps} times in a row; {_sent(entry)}"


def deadline_exceeded(entry: Entry) -> tuple[str, str]:
    """Its time is over."""
    why = f"the request did not end within {entry.timeout_s:g} s; {_sent(entry)}"
    return "deadline_exceeded", why


def queue_timeout(entry: Entry, lacking: str) -> tuple[str, str]:
    """It waited too long for a worker. `lacking`: why none took it."""
    again = " again" if State.RESERVED in entry.spent else ""  # it was placed before
    return "queue_timeout", (
        f"no worker took the request{again} within {entry.queue_timeout_s:g} s: {lacking}; "
        f"{_sent(entry)}; send it again later"
    )


def _place(entry: Entry) -> str:
    """Where a request was when its worker died."""
    if entry.emitted:
        return f"after {_tokens(entry)}"
    if entry.state in (State.RESERVING, State.RESERVED):
        return "while its blocks were reserved"
    filled = entry.state is State.DECODING and entry.receipt is not None
    return "before its first token" if filled else "while its prompt was filled"


def _sent(entry: Entry) -> str:
    return f"{_tokens(entry)} {'was' if len(entry.emitted) == 1 else 'were'} sent"


def _tokens(entry: Entry) -> str:
    count = len(entry.emitted)
    return f"{count} token" if count == 1 else f"{count} tokens"
