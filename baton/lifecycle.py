"""Lifecycle: the states of a request and all transitions between them, as one table.

Only the router's ledger applies the table. Nothing here depends on a clock, a socket or a worker.

A request returns to QUEUED when one of its workers is lost, when its KV arrived damaged, when the pool
had no room, when its blocks went to an older request, or when it outgrew its KV. It keeps the tokens
already sent, and continues where it stopped.
"""

from enum import StrEnum


class State(StrEnum):
    """State of a request."""

    QUEUED = "queued"  # in the ledger, on no worker
    RESERVING = "reserving"  # a decode worker was asked for blocks
    RESERVED = "reserved"  # blocks are granted; waiting for a Fill batch
    FILLING = "filling"  # a prefill worker computes its KV
    DECODING = "decoding"  # a decode worker samples
    FINISHED = "finished"  # ended, once: length, stop, abort or error


class Event(StrEnum):
    """Cause of a transition."""

    RESERVE = "reserve"  # Reserve was sent
    GRANTED = "granted"  # Reserved came
    DEFERRED = "deferred"  # no room now
    FILL = "fill"  # Fill was sent
    START = "start"  # Start was sent: KV is filled, or decode fills it itself; an engine needs no blocks
    TOKEN = "token"  # one more token
    PREEMPTED = "preempted"  # its blocks went to an older request
    OUTGROWN = "outgrown"  # at its length all its KV is computed again (baton/rope.py)
    RETRY = "retry"  # the KV is not usable: fill again
    LOST = "lost"  # a worker it was on is gone
    FINISH = "finish"  # ended, for any reason


LIVE = (State.QUEUED, State.RESERVING, State.RESERVED, State.FILLING, State.DECODING)
PLACED = LIVE[1:]
"""States in which a decode worker holds blocks for the request."""

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.RESERVE): State.RESERVING,
    (State.QUEUED, Event.START): State.DECODING,
    (State.RESERVING, Event.GRANTED): State.RESERVED,
    (State.RESERVING, Event.DEFERRED): State.QUEUED,
    (State.RESERVED, Event.FILL): State.FILLING,
    (State.RESERVED, Event.START): State.DECODING,
    (State.FILLING, Event.START): State.DECODING,
    (State.DECODING, Event.TOKEN): State.DECODING,
    (State.DECODING, Event.PREEMPTED): State.QUEUED,
    (State.DECODING, Event.OUTGROWN): State.QUEUED,
    **{(state, Event.RETRY): State.QUEUED for state in PLACED},
    **{(state, Event.LOST): State.QUEUED for state in PLACED},
    **{(state, Event.FINISH): State.FINISHED for state in LIVE},
}


class IllegalTransition(AssertionError):
    """A bug: the event cannot happen in this state."""


def advance(state: State, event: Event) -> State:
    """The state after the event, or IllegalTransition."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.value} cannot happen to a {state.value} request") from None
