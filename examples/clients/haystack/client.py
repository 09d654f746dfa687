"""Haystack: a pipeline, a stream, a tool call and its result, structured output, embeddings.

Needs a chat model.
"""

import os

from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from pydantic import BaseModel

MODEL, KEY = os.environ["MODEL"], Secret.from_token("none")
BASE = os.environ["OPENAI_BASE_URL"]


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


def generator(**more: object) -> OpenAIChatGenerator:
    """With greedy answers."""
    settings = {"temperature": 0, "max_tokens": 100} | more.pop("settings", {})
    return OpenAIChatGenerator(
        api_key=KEY, model=MODEL, api_base_url=BASE, generation_kwargs=settings, **more
    )


def main() -> None:
    """All of it."""
    pieces: list[str] = []
    line = Pipeline()
    line.add_component(
        "prompt", ChatPromptBuilder([ChatMessage.from_user("Name the capital of {{ land }}.")])
    )
    line.add_component(
        "answer", generator(streaming_callback=lambda chunk: pieces.append(chunk.content))
    )
    line.connect("prompt.prompt", "answer.messages")
    (reply,) = line.run({"prompt": {"land": "France"}})["answer"]["replies"]
    assert "".join(pieces) == reply.text
    print("pipeline:", reply.text, "in", len(pieces), "pieces")

    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    weather = Tool(
        "weather", "The weather of a city", parameters, lambda city: f"Rain in {city}, 4 degrees."
    )
    question = ChatMessage.from_user("What is the weather in Oslo?")
    (called,) = generator(tools=[weather], settings={"tool_choice": "required"}).run([question])[
        "replies"
    ]
    (call, *_) = called.tool_calls
    result = weather.invoke(**call.arguments)
    print("tool:", call.tool_name, call.arguments, result)
    turns = [
        question,
        called,
        *(ChatMessage.from_tool(result, origin=each) for each in called.tool_calls),
    ]
    print("after the tool:", generator().run(turns)["replies"][0].text[:80])

    shaped = generator(settings={"response_format": City}).run(
        [ChatMessage.from_user("The capital of France?")]
    )
    print("schema:", City.model_validate_json(shaped["replies"][0].text))
    vector = OpenAITextEmbedder(api_key=KEY, model=MODEL, api_base_url=BASE).run("a cat")[
        "embedding"
    ]
    print("embedding:", len(vector))


if __name__ == "__main__":
    main()
