"""LangChain: invoke, stream, three methods of structured output, bind_tools, embeddings, ChatAnthropic.

Needs a chat model.
"""

import os

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
ASK = "Name the capital of France."


class City(BaseModel):
    """A city and its country."""

    name: str = Field(description="the city", max_length=30)
    country: str = Field(max_length=30)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}, 4 degrees."


def main() -> None:
    """All of it."""
    model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=100)
    whole = model.invoke(ASK)
    print("invoke:", whole.content, whole.usage_metadata["total_tokens"], "tokens")
    assert "".join(chunk.text for chunk in model.stream(ASK)) == whole.content
    print("batch:", [len(each.content) > 0 for each in model.batch(["Hi", "Hello", "Good day"])])
    for method in ("function_calling", "json_mode", "json_schema"):
        question = ASK + " Answer in JSON with the keys name and country."
        found = model.with_structured_output(City, method=method, include_raw=True).invoke(question)
        if method == "json_mode":  # promises JSON, not the schema
            print(method, found["raw"].content.strip()[:80])
            continue
        assert isinstance(found["parsed"], City), found
        print(method, found["parsed"])

    for choice in ("any", "weather"):
        forced = model.bind_tools([weather], tool_choice=choice).invoke("The weather in Oslo?")
        assert forced.tool_calls, forced
        print("bind_tools", choice, forced.tool_calls[0]["args"])
    turns = [HumanMessage("The weather in Oslo?"), forced]
    turns += [
        ToolMessage(weather.invoke(each["args"]), tool_call_id=each["id"])
        for each in forced.tool_calls
    ]
    print("after the tool:", model.bind_tools([weather]).invoke(turns).text[:80])
    gathered = None
    for chunk in model.bind_tools([weather], tool_choice="any").stream("The weather in Oslo?"):
        gathered = chunk if gathered is None else gathered + chunk
    assert gathered.tool_calls[0]["args"] == forced.tool_calls[0]["args"]

    by_responses = ChatOpenAI(model=MODEL, temperature=0, max_tokens=100, use_responses_api=True)
    print("Responses:", by_responses.invoke(ASK).text)
    print("Responses, json_schema:", by_responses.with_structured_output(City).invoke(ASK))

    vectors = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False).embed_documents(
        ["a cat", "a dog"]
    )
    print("embeddings:", len(vectors), "of", len(vectors[0]))

    claude = ChatAnthropic(model=MODEL, temperature=0, max_tokens=100)
    print("ChatAnthropic:", claude.invoke(ASK).text)
    print(
        "ChatAnthropic, tool:",
        claude.bind_tools([weather], tool_choice="any")
        .invoke("The weather in Oslo?")
        .tool_calls[0]["args"],
    )


if __name__ == "__main__":
    main()
