"""Where answers begin and end, through the whole server: chats end at the tokenizer's own end, too."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer

from tests.pure.town_app import TownClient, pretend_files, pretend_tokenizer, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
RENDERED = "<user>Hello\n<assistant>"


async def said(client: TownClient, path: str, asked: Mapping[str, Any]) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    choice = (await client.ask(path, asked, submits=1)).json["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"]


async def streamed(client: TownClient, asked: Mapping[str, Any]) -> str:
    """The text of an answer that is streamed."""
    lines = (
        (await client.ask(CHAT, asked | {"stream": True}, submits=1)).body.decode().split("\n\n")
    )
    deltas = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    return "".join(each["choices"][0]["delta"].get("content", "") for each in deltas)


@pytest.mark.parametrize("eos", [(0,), ()])
def test_a_chat_ends_at_the_tokenizers_end_and_a_completion_goes_on(
    eos: tuple[int, ...], tmp_path: Path
) -> None:
    async def work() -> None:
        async with serving() as client:
            words, reason = await said(client, CHAT, HELLO)
            assert reason == "length"
            ids = pretend_tokenizer().encode(words, special=False)
            assert len(ids) == 5
        fast = FastTokenizer.from_file(str(pretend_files().tokenizer_file))
        fast.save(str(tmp_path / "tokenizer.json"))
        about = {"eos_token": fast.id_to_token(ids[2])}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
        files = replace(
            pretend_files(), tokenizer_file=tmp_path / "tokenizer.json", eos_token_ids=eos
        )
        begin = pretend_tokenizer().decode(ids[:2])
        async with serving(files=files) as client:
            assert await said(client, CHAT, HELLO) == (begin, "stop")
            client.fresh()
            assert await streamed(client, HELLO) == begin
            client.fresh()
            assert await said(client, CHAT, HELLO | {"ignore_eos": True}) == (words, "length")
            client.fresh()
            asked = {"prompt": RENDERED, "max_tokens": 5}
            assert await said(client, COMPLETIONS, asked) == (words, "length")

    asyncio.run(work())


def test_an_echo_and_its_answer_share_the_character_between_them() -> None:
    async def work() -> None:
        ids = pretend_tokenizer().encode("a🙂", special=False)
        async with serving() as client:
            for cut in range(1, len(ids) + 1):
                asked = {"prompt": ids[:cut], "max_tokens": 2, "echo": True, "logprobs": 0}
                choice = (await client.ask(COMPLETIONS, asked, submits=1)).json["choices"][0]
                words = choice["logprobs"]["tokens"][cut:]
                assert choice["text"] == pretend_tokenizer().decode(ids[:cut]) + "".join(words)
                alone = asked | {"max_tokens": 0}
                choice = (await client.ask(COMPLETIONS, alone, submits=1)).json["choices"][0]
                assert choice["text"] == pretend_tokenizer().decode(ids[:cut])

    asyncio.run(work())
