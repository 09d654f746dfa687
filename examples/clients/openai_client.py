"""The openai package against a server of ours: whole, streamed, many at once, JSON by a schema.

python examples/clients/openai_client.py [URL]
"""

import asyncio
import sys

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def one_by_one(model: str) -> None:
    """Whole, and streamed."""
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        whole = client.completions.create(model=model, prompt="In the future", max_tokens=20)
        print("whole:", whole.choices[0].text, whole.usage)
        print("streamed:", end="")
        for chunk in client.completions.create(
            model=model, prompt="On a distant planet", max_tokens=20, stream=True
        ):
            print(chunk.choices[0].text, end="", flush=True)
        print()
        fits = client.completions.create(
            model=model, prompt="A person:", max_tokens=60, extra_body={"guided_json": SCHEMA}
        )
        print("JSON:", fits.choices[0].text)


def in_turns(model: str) -> None:
    """The Responses API, which keeps the conversation."""
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        first = client.responses.create(model=model, input="Who was Ada?", max_output_tokens=40)
        print("response:", first.output_text)
        print("and then: ", end="")
        for event in client.responses.create(
            model=model,
            input="And then?",
            previous_response_id=first.id,
            max_output_tokens=40,
            stream=True,
        ):
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
        print()


async def at_once(model: str) -> None:
    """Sixteen at the same time."""
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(model=model, prompt=f"Story {i}:", max_tokens=30)
                for i in range(16)
            )
        )
    print(len(answers), "answers,", sum(a.usage.completion_tokens for a in answers), "tokens")


if __name__ == "__main__":
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none") as first:
        known = first.models.list().data[0]
    name = known.id
    one_by_one(name)
    if known.model_extra and known.model_extra.get("chat"):
        in_turns(name)
    asyncio.run(at_once(name))
