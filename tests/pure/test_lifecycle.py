"""The table of states: what can happen, what cannot, and the drawing of it in the documents."""

from itertools import product
from pathlib import Path

import pytest

from baton.lifecycle import (
    LIVE,
    PLACED,
    TRANSITIONS,
    Event,
    IllegalTransition,
    State,
    advance,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def test_every_state_can_be_reached_from_the_queue() -> None:
    reached = {State.QUEUED}
    while more := {t for (s, _), t in TRANSITIONS.items() if s in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_finished_is_the_end() -> None:
    for event in Event:
        with pytest.raises(IllegalTransition):
            advance(State.FINISHED, event)


@pytest.mark.parametrize("state", LIVE)
def test_whatever_is_live_can_be_ended(state: State) -> None:
    assert advance(state, Event.FINISH) is State.FINISHED


def test_live_is_everything_but_finished_and_placed_all_but_the_queue() -> None:
    assert set(LIVE) == set(State) - {State.FINISHED}
    assert set(PLACED) == set(LIVE) - {State.QUEUED}


@pytest.mark.parametrize("event", [Event.LOST, Event.RETRY])
def test_a_lost_or_spoilt_request_is_queued_again_wherever_it_was_placed(event: Event) -> None:
    for state in PLACED:
        assert advance(state, event) is State.QUEUED


@pytest.mark.parametrize("event", [Event.LOST, Event.RETRY])
def test_a_queued_request_is_on_no_worker_and_cannot_be_lost(event: Event) -> None:
    with pytest.raises(IllegalTransition, match=f"{event.value} cannot happen to a queued"):
        advance(State.QUEUED, event)


def test_tokens_come_while_decoding_only() -> None:
    assert [s for s, e in TRANSITIONS if e is Event.TOKEN] == [State.DECODING]


def test_what_is_not_in_the_table_is_a_bug_of_ours() -> None:
    for state, event in product(State, Event):
        if (state, event) not in TRANSITIONS:
            with pytest.raises(IllegalTransition):
                advance(state, event)


def test_every_event_is_of_some_use() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)


def as_mermaid() -> str:
    """The table as a Mermaid state diagram: docs/architecture.md holds exactly this text."""
    lines = ["stateDiagram-v2", "    [*] --> queued: submit"]
    arrows: dict[tuple[State, State], list[str]] = {}
    for (source, event), target in TRANSITIONS.items():
        arrows.setdefault((source, target), []).append(event.value)
    lines += [
        f"    {source.value} --> {target.value}: {', '.join(events)}"
        for (source, target), events in arrows.items()
    ]
    return "\n".join([*lines, "    finished --> [*]"])


def test_the_drawing_shows_every_transition() -> None:
    drawn = as_mermaid()
    for (source, event), target in TRANSITIONS.items():
        arrow = next(
            line for line in drawn.splitlines() if f"{source.value} --> {target.value}:" in line
        )
        assert event.value in arrow.partition(": ")[2].split(", ")


def test_the_document_holds_the_drawing_of_today() -> None:
    assert as_mermaid() in DOCUMENT.read_text(encoding="utf-8")
