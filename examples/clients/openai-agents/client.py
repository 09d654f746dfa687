"""OpenAI's Agents SDK: tools, a handoff, output_type, streams, over Responses and over chat.

Needs a chat model.
"""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
CALLS: list[str] = []


@function_tool(is_enabled=lambda *_: not CALLS)  # a small model would call it again and again
def weather(city: str) -> str:
    """The weather of a city."""
    CALLS.append(city)
    return f"Rain in {city}, 4 degrees."


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


async def main() -> None:
    """The same agents over both APIs."""
    client = AsyncOpenAI()
    for model in (OpenAIResponsesModel(MODEL, client), OpenAIChatCompletionsModel(MODEL, client)):
        name = type(model).__name__
        settings = ModelSettings(temperature=0, max_tokens=150)
        forced = ModelSettings(temperature=0, max_tokens=150, tool_choice="required")
        agent = Agent(name="Forecaster", instructions="Answer in one sentence.", model=model,
                      tools=[weather], model_settings=forced)  # fmt: skip
        CALLS.clear()
        result = await Runner.run(agent, "What is the weather in Oslo?", max_turns=4)
        assert CALLS, "the tool was not called"
        print(name, "tool:", CALLS, "then:", str(result.final_output)[:80])

        CALLS.clear()
        streamed = Runner.run_streamed(agent, "What is the weather in Oslo?", max_turns=4)
        kinds = [event.type async for event in streamed.stream_events()]
        print(name, "streamed:", len(kinds), "events;", str(streamed.final_output)[:60])

        shaped = Agent(name="Geographer", instructions="Name a city.", model=model,
                       output_type=City, model_settings=settings)  # fmt: skip
        found = (await Runner.run(shaped, "The capital of France?")).final_output
        assert isinstance(found, City)
        print(name, "output_type:", found)

        front = Agent(name="Front", instructions="Hand every question over.", model=model,
                      handoffs=[shaped], model_settings=forced)  # fmt: skip
        handed = await Runner.run(front, "The capital of France?", max_turns=4)
        assert handed.last_agent is shaped
        print(name, "handoff to", handed.last_agent.name, handed.final_output)


if __name__ == "__main__":
    asyncio.run(main())
