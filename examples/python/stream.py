"""Text as it is generated: one stream in a loop, then three at once in an event loop."""

import asyncio

from baton import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0)
PROMPTS = ["In the future", "Once upon a time", "A good cook"]


async def follow(llm: LLM, prompt: str) -> str:
    text = prompt
    async for piece in llm.astream(prompt, GREEDY, max_new_tokens=30):
        text += piece
    return text


async def follow_all(llm: LLM) -> None:
    for text in await asyncio.gather(*(follow(llm, prompt) for prompt in PROMPTS)):
        print(text)


with LLM("demo") as llm:
    for piece in llm.stream("The best way to learn is", GREEDY, max_new_tokens=30):
        print(piece, end="", flush=True)
    print()
    asyncio.run(follow_all(llm))
