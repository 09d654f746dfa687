"""instructor: TOOLS, JSON_SCHEMA, PARALLEL_TOOLS, lists, partial objects, Responses.

Needs a chat model.
"""

import os
from collections.abc import Iterable
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
ASK = [{"role": "user", "content": "Anna is 30 years old and lives in Oslo."}]


class Person(BaseModel):
    """A person that a text tells of."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    mood: Literal["glad", "sad", "unknown"]


class Weather(BaseModel):
    """The weather of a city."""

    location: str = Field(max_length=20)
    units: Literal["imperial", "metric"]


class GoogleSearch(BaseModel):
    """Look something up."""

    query: str = Field(max_length=30)


def main() -> None:
    """The modes whose schema the server enforces; in JSON and MD_JSON the model must know it."""
    modes = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS)
    for mode in modes:
        client = instructor.from_openai(OpenAI(), mode=mode)
        limit = "max_output_tokens" if "responses" in mode.value else "max_tokens"
        found = client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            response_model=Person,
            max_retries=0,
            temperature=0,
            **{limit: 200},
        )
        assert isinstance(found, Person)
        print(mode.name, found)

    client = instructor.from_openai(OpenAI(), mode=instructor.Mode.TOOLS)
    *_, last = client.chat.completions.create_partial(
        model=MODEL, messages=ASK, response_model=Person, temperature=0, max_tokens=200
    )
    Person(**last.model_dump())
    print("partial", last)
    several = client.chat.completions.create_iterable(
        model=MODEL, messages=ASK, response_model=Person, temperature=0, max_tokens=400
    )
    print("iterable", [str(each) for each, _ in zip(several, range(3), strict=False)])

    parallel = instructor.from_openai(OpenAI(), mode=instructor.Mode.PARALLEL_TOOLS)
    calls = parallel.chat.completions.create(
        model=MODEL, temperature=0, max_tokens=600, response_model=Iterable[Weather | GoogleSearch],
        extra_body={"tool_choice": "required"},  # instructor says auto; a small model then talks
        messages=[
            {"role": "system", "content": "You must always use tools"},
            {"role": "user", "content": "The weather in Toronto and Dallas, and who won the Super Bowl?"},
        ],
    )  # fmt: skip
    found = list(calls)
    assert all(isinstance(each, Weather | GoogleSearch) for each in found)
    print("PARALLEL_TOOLS", found)


if __name__ == "__main__":
    main()
