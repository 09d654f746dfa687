"""/v1/embeddings over HTTP, in a town whose prefill workers embed a prompt as its token ids."""

import asyncio
import base64
from array import array
from typing import Any

from openai.types import CreateEmbeddingResponse

from tests.pure.town_app import CONTEXT, TownClient, serving

EMBEDDINGS = "/v1/embeddings"


def test_every_form_of_input_is_embedded_and_counted() -> None:
    async def work() -> None:
        async with serving(pooling="last") as client:
            ids = (await client.ask("/tokenize", {"prompt": "In the future"})).json["tokens"]
            other = (await client.ask("/tokenize", {"prompt": "The end"})).json["tokens"]
            forms: list[tuple[Any, list[list[int]]]] = [
                ("In the future", [ids]),
                (["In the future", "The end"], [ids, other]),
                (ids, [ids]),
                ([ids, other, ids], [ids, other, ids]),
            ]
            for given, expected in forms:
                asked = {"input": given, "model": "pretend"}
                answer = await client.ask(EMBEDDINGS, asked, submits=len(expected))
                found = CreateEmbeddingResponse.model_validate(answer.json)
                assert [each.embedding for each in found.data] == expected
                assert [each.index for each in found.data] == [*range(len(expected))]
                tokens = sum(map(len, expected))
                assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
                assert answer.json["model"] == "pretend"
                packed = await client.ask(
                    EMBEDDINGS, asked | {"encoding_format": "base64"}, submits=len(expected)
                )
                data = [base64.b64decode(each["embedding"]) for each in packed.json["data"]]
                assert [array("f", each).tolist() for each in data] == expected

    asyncio.run(work())


def test_what_cannot_be_done_is_refused_by_name() -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"dimensions": 3}, "dimensions", "one size"),
        ({"input": ""}, "input", ""),
        ({"input": []}, "input", ""),
        ({"input": [[]]}, "input", ""),
        ({"input": 3}, "input", "text"),
        ({"input": ["a"] * 257}, "input", "256"),
        ({"input": [300] * CONTEXT}, "input", str(CONTEXT)),
        ({"encoding_format": "int8"}, "encoding_format", "base64"),
        ({"pooling": "cls"}, "pooling", "mean"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "use input"),
        ({"normalize": False}, "normalize", ""),
        ({"model": "gpt-9"}, "model", "pretend"),
    ]

    async def ask(client: TownClient, body: dict[str, Any], param: str, word: str) -> None:
        answer = await client.ask(EMBEDDINGS, {"input": "Hello"} | body)
        assert answer.status in (400, 404), body
        assert answer.json["error"]["param"] == param
        assert word in answer.json["error"]["message"]

    async def work() -> None:
        async with serving() as client:
            for body, param, word in wrong:
                await ask(client, body, param, word)

    asyncio.run(work())


def test_it_has_no_parameters_of_a_generation_in_the_metrics() -> None:
    async def work() -> None:
        async with serving() as client:
            answer = await client.ask(EMBEDDINGS, {"input": "Hello"}, submits=1)
            assert answer.status == 200
            lines = (await client.ask("/metrics")).body.decode().splitlines()
        for name in ("params_n", "params_max_tokens", "max_num_generation_tokens"):
            assert f'baton:request_{name}_count{{model_name="pretend"}} 0.0' in lines

    asyncio.run(work())


def test_it_counts_against_the_quota_of_its_key() -> None:
    async def work() -> None:
        async with serving(tokens_per_key=1000, api_keys=("secret",)) as client:
            own = {"authorization": "Bearer secret"}
            asked = {"input": [300, 301, 302]}
            answer = await client.ask(EMBEDDINGS, asked, submits=1, headers=own)
            assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
            assert [*client.service.quotas.used.values()] == [3]

    asyncio.run(work())
