"""OpenAI's Python package: sync, async, streams, parse, tools, Responses, embeddings.

Needs a chat model.
"""

import asyncio
import json
import os

import openai
from pydantic import BaseModel

MODEL = os.environ["MODEL"]


class City(BaseModel):
    """What parse() fills."""

    name: str
    country: str


class Weather(BaseModel):
    """The weather of a city."""

    city: str


ASK = [{"role": "user", "content": "Name the capital of France."}]


def chats(client: openai.OpenAI) -> None:
    """Whole and streamed, a schema, and tools with the turn after them."""
    whole = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=40)
    assert whole.choices[0].message.content
    print("chat:", whole.choices[0].message.content, "|", whole.usage.total_tokens, "tokens")
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    print("streamed: the same text in", len(chunks), "chunks")

    parsed = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=City, temperature=0, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    print("parse:", parsed.choices[0].message.parsed)

    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    turns = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = {"model": MODEL, "tools": tools, "temperature": 0, "max_tokens": 100}
    call = client.chat.completions.create(**asked, messages=turns, tool_choice="required")
    assert call.choices[0].finish_reason == "tool_calls"
    message = call.choices[0].message
    arguments = json.loads(message.tool_calls[0].function.arguments)
    print("tool:", message.tool_calls[0].function.name, Weather(**arguments))
    with client.chat.completions.stream(
        **asked, messages=turns, tool_choice={"type": "function", "function": {"name": "weather"}}
    ) as events:
        final = events.get_final_completion().choices[0].message
    assert isinstance(final.tool_calls[0].function.parsed_arguments, Weather)
    print("tool, streamed:", final.tool_calls[0].function.parsed_arguments)
    turns += [message.model_dump(exclude_none=True)] + [
        {"role": "tool", "tool_call_id": each.id, "content": "Rain, 4 degrees."}
        for each in message.tool_calls
    ]
    after = client.chat.completions.create(**asked, messages=turns, tool_choice="none")
    print("after the tool:", after.choices[0].message.content)


def responses(client: openai.OpenAI) -> None:
    """The Responses API: two turns, a stream, a schema, a tool."""
    first = client.responses.create(
        model=MODEL, input="Name the capital of France.", temperature=0, max_output_tokens=40
    )
    second = client.responses.create(
        model=MODEL, input="And of Italy?", previous_response_id=first.id, temperature=0,
        max_output_tokens=40,
    )  # fmt: skip
    print("responses:", first.output_text, "|", second.output_text)
    with client.responses.stream(
        model=MODEL, input="Name the capital of France.", temperature=0, max_output_tokens=40
    ) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == first.output_text
    print("responses, streamed:", len(kinds), "events, the last", kinds[-1])
    parsed = client.responses.parse(
        model=MODEL, input="Name the capital of France.", text_format=City, temperature=0,
        max_output_tokens=100,
    )  # fmt: skip
    assert isinstance(parsed.output_parsed, City)
    print("responses, parse:", parsed.output_parsed)
    called = client.responses.create(
        model=MODEL, input="What is the weather in Oslo?", temperature=0, max_output_tokens=100,
        tools=[openai.pydantic_function_tool(Weather, name="weather")["function"] | {"type": "function"}],
        tool_choice="required",
    )  # fmt: skip
    print("responses, tool:", Weather(**json.loads(called.output[0].arguments)))


async def at_once() -> None:
    """Sixteen at the same time, by the asynchronous client."""
    async with openai.AsyncOpenAI() as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(model=MODEL, prompt=f"Story {i}:", max_tokens=16, seed=i)
                for i in range(16)
            )
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=ASK, temperature=0, max_tokens=40, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    print(
        "async:",
        len(answers),
        "answers,",
        sum(a.usage.completion_tokens for a in answers),
        "tokens;",
        text,
    )


def others(client: openai.OpenAI) -> None:
    """JSON by a field of ours, embeddings, logprobs, n, and an error."""
    guided = client.completions.create(
        model=MODEL, prompt="A city:", max_tokens=60, temperature=0,
        extra_body={"guided_json": City.model_json_schema()},
    )  # fmt: skip
    print("guided_json:", City.model_validate_json(guided.choices[0].text))
    vectors = client.embeddings.create(model=MODEL, input=["a cat", "a dog"]).data
    print("embeddings:", len(vectors), "of", len(vectors[0].embedding), "numbers")
    several = client.chat.completions.create(
        model=MODEL, messages=ASK, n=2, seed=1, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert len(several.choices) == 2
    assert len(several.choices[0].logprobs.content[0].top_logprobs) == 2
    try:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=3)
    except openai.BadRequestError as error:
        print("an error:", error.body["message"])
    else:
        raise AssertionError("temperature 3 is an error")


if __name__ == "__main__":
    with openai.OpenAI() as only:
        print("model:", only.models.list().data[0].id)
        chats(only)
        responses(only)
        others(only)
    asyncio.run(at_once())
