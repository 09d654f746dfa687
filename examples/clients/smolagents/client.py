"""smolagents: a model, a stream, and an agent that calls tools, results and a final answer.

Needs a chat model.
"""

import os

from smolagents import OpenAIModel, Tool, ToolCallingAgent

ASKED: list[str] = []


class Weather(Tool):
    """A tool as the package wants it."""

    name = "weather"
    description = "The weather of a city"
    inputs = {"city": {"type": "string", "description": "its name"}}  # noqa: RUF012
    output_type = "string"

    def forward(self, city: str) -> str:
        """Rain, always."""
        ASKED.append(city)
        return f"Rain in {city}, 4 degrees."


def main() -> None:
    """The agent's turns are limited: a small model seldom knows when it is done."""
    model = OpenAIModel(
        os.environ["MODEL"],
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key="none",
        temperature=0,
        max_tokens=100,
    )
    ask = [{"role": "user", "content": [{"type": "text", "text": "Name the capital of France."}]}]
    whole = model.generate(ask).content
    assert "".join(delta.content or "" for delta in model.generate_stream(ask)) == whole
    print("model:", whole)
    agent = ToolCallingAgent(tools=[Weather()], model=model, max_steps=2, verbosity_level=0)
    answer = agent.run("Call weather with the city Oslo.")
    calls = [
        call.name for step in agent.memory.steps for call in getattr(step, "tool_calls", None) or ()
    ]
    assert calls, "no tool was called"
    print("calls:", calls, "weather of:", ASKED)
    print("answer:", str(answer)[:120])


if __name__ == "__main__":
    main()
