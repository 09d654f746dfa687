"""Pydantic AI: text, streams, tools, output_type by tool and native, Responses, Anthropic.

Needs a chat model.
"""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, RunContext, ToolDefinition, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

MODEL = os.environ["MODEL"]
SETTINGS = {"temperature": 0, "max_tokens": 200}


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


async def main() -> None:
    """The same agents over three APIs."""
    for model in (OpenAIChatModel(MODEL), OpenAIResponsesModel(MODEL), AnthropicModel(MODEL)):
        name = type(model).__name__
        plain = Agent(model, instructions="Answer in one sentence.", model_settings=SETTINGS)
        result = await plain.run("Name the capital of France.")
        print(name, "text:", result.output)
        again = await plain.run("And of Italy?", message_history=result.all_messages())
        print(name, "history:", again.output)
        async with plain.run_stream("Name the capital of France.") as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        assert "".join(pieces) == result.output
        print(name, "streamed:", len(pieces), "pieces")
        kinds = [ToolOutput(City), NativeOutput(City)]
        if name == "AnthropicModel":
            kinds.pop()  # it knows which models of Anthropic can do that
        for kind in kinds:
            shaped = Agent(model, output_type=kind, model_settings=SETTINGS)
            found = (await shaped.run("The capital of France?")).output
            assert isinstance(found, City)
            print(name, type(kind).__name__, found)

    asked: list[str] = []

    async def once(ctx: RunContext[None], offered: ToolDefinition) -> ToolDefinition | None:
        """Not again: a small model would call it for ever."""
        return None if asked else offered

    agent = Agent(OpenAIChatModel(MODEL), output_type=City, model_settings=SETTINGS)

    @agent.tool_plain(prepare=once)
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return f"Rain in {city}, 4 degrees."

    answer = (await agent.run("Call weather with the city Oslo.")).output
    assert isinstance(answer, City)
    print("a tool, then the output:", asked, answer)


if __name__ == "__main__":
    asyncio.run(main())
