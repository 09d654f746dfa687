"""Anthropic's Python package: whole, streamed, tools and their results, counting, errors, async.

Needs a chat model.
"""

import asyncio
import os

import anthropic

MODEL = os.environ["MODEL"]
ASKED = {
    "model": MODEL,
    "max_tokens": 60,
    "extra_body": {"temperature": 0},
}  # the package has no such field any more
ADA = [{"role": "user", "content": "Who was Ada Lovelace? Answer in one sentence."}]
TOOL = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def main(client: anthropic.Anthropic) -> None:
    """All of it but async."""
    whole = client.messages.create(**ASKED, messages=ADA, system="You are a historian.")
    print("whole:", whole.content[0].text, whole.stop_reason, whole.usage.output_tokens)
    with client.messages.stream(**ASKED, messages=ADA, system="You are a historian.") as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    assert text == whole.content[0].text
    print("streamed: the same text")
    print("counted:", client.messages.count_tokens(model=MODEL, messages=ADA).input_tokens)

    turns = [{"role": "user", "content": "What is the weather in Oslo?"}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        call = client.messages.create(**ASKED, messages=turns, tools=[TOOL], tool_choice=choice)
        assert call.stop_reason == "tool_use"
        (block,) = [each for each in call.content if each.type == "tool_use"][:1]
        assert set(block.input) == {"city"}
        print("tool:", choice["type"], block.name, block.input)
    with client.messages.stream(
        **ASKED, messages=turns, tools=[TOOL], tool_choice={"type": "any"}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    print("tool, streamed:", len(kinds), "events,", kinds.count("input_json"), "of them JSON")
    turns += [
        {"role": "assistant", "content": call.content},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": each.id, "content": "Rain, 4 degrees."}
            for each in call.content if each.type == "tool_use"
        ]},
    ]  # fmt: skip
    after = client.messages.create(
        **ASKED, messages=turns, tools=[TOOL], tool_choice={"type": "none"}
    )
    print("after the tool:", after.content[0].text)
    begun = [*ADA, {"role": "assistant", "content": "Ada Lovelace was"}]
    print(
        "continued: Ada Lovelace was",
        client.messages.create(**ASKED, messages=begun).content[0].text,
    )
    try:
        client.messages.create(model="another", max_tokens=9, messages=ADA)
    except anthropic.NotFoundError as error:
        print("an error:", error.body["error"])
    else:
        raise AssertionError("another model is an error")


async def at_once() -> None:
    """Eight at the same time."""
    async with anthropic.AsyncAnthropic() as client:
        answers = await asyncio.gather(
            *(client.messages.create(**ASKED, messages=ADA) for _ in range(8))
        )
    assert len({answer.content[0].text for answer in answers}) == 1
    print("async:", len(answers), "equal answers")


if __name__ == "__main__":
    with anthropic.Anthropic() as only:
        main(only)
    asyncio.run(at_once())
