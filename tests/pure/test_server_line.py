"""What a client of the server sees of a request whose router died and was asked again: nothing."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from baton.params import GenerationParams
from baton.server.line import Box, Flight, News
from baton.wire.messages import Accepted, Emitted, Failed, Finished, Submit
from baton.wire.records import Logprob, Timings

SUBMIT = Submit("r", (1, 2), GenerationParams(20))


def told(flight: Flight) -> list[News]:
    found = []
    while not flight.box.empty():
        found.append(flight.box.get_nowait()[1])
    return found


def emissions(text: list[str], cuts: list[int]) -> list[Emitted]:
    """One token for each piece of text, some pieces held back to come with a later token."""
    news, held = [], ""
    for token, piece in enumerate(text):
        held += piece
        hold = token in cuts and token < len(text) - 1
        news.append(Emitted("r", (token,), "" if hold else held, (Logprob(-float(token)),)))
        held = held if hold else ""
    return news


@given(
    st.lists(st.text(max_size=3), min_size=1, max_size=12),
    st.lists(st.integers(0, 11), max_size=4),
    st.lists(st.integers(0, 11), max_size=4),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_tokens_and_text_come_once_whenever_the_router_dies(
    text: list[str], cuts: list[int], other_cuts: list[int], deaths: list[int]
) -> None:
    flight = Flight(SUBMIT, Box())
    flight.put(Accepted("r", 2, 0.0))
    for number, death in enumerate(deaths):
        for each in emissions(text, cuts if number % 2 else other_cuts)[:death]:
            flight.put(each)
        flight.again()
        flight.put(Accepted(flight.name, 2, 0.0))
    for each in emissions(text, cuts):
        flight.put(each)
    flight.put(Finished("r", "length", Timings()))
    news = told(flight)
    emitted = [each for each in news if isinstance(each, Emitted)]
    assert [token for each in emitted for token in each.token_ids] == list(range(len(text)))
    assert "".join(each.text for each in emitted) == "".join(text)
    assert [each.value for one in emitted for each in one.logprobs] == [
        -float(i) for i in range(len(text))
    ]
    assert sum(isinstance(each, Accepted) for each in news) == 1
    assert isinstance(news[-1], Finished)
    assert flight.ended


def test_each_attempt_has_a_name_of_its_own() -> None:
    flight = Flight(SUBMIT, asyncio.Queue())
    names = [flight.name]
    for _ in range(2):
        flight.again()
        names.append(flight.name)
    assert names == ["r", "r.1", "r.2"]
    flight.put(Failed(flight.name, "worker_lost", "gone"))
    assert flight.ended
