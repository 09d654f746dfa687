"""Adapters over HTTP: a request's `model` names one, on every route, and /v1/models lists them."""

import asyncio
from typing import Any

import pytest

from baton.adapters.identity import Adapter
from baton.cluster.options import ClusterOptions
from baton.errors import InputError
from baton.server.options import ServerSettings
from baton.server.serve import check_names
from baton.topology import Topology
from tests.pure.town_app import WordyTown, serving

ADAPTERS = (Adapter("law", "22"), Adapter("teams/sql", "11"))
TEXT = "In the future"


def adapted_town() -> WordyTown:
    return WordyTown(adapters=ADAPTERS)


def test_a_request_is_answered_by_the_adapter_that_its_model_names() -> None:
    async def work() -> None:
        async with serving(adapted_town()) as client:
            listed = (await client.ask("/v1/models")).json["data"]
            assert [each["id"] for each in listed] == ["pretend", "law", "teams/sql"]
            assert [each.get("parent") for each in listed] == [None, "pretend", "pretend"]
            assert (await client.ask("/v1/models/teams/sql")).json == listed[2]
            texts = {}
            for model in ("pretend", "law", "teams/sql"):
                asked: dict[str, Any] = {"model": model, "prompt": TEXT, "max_tokens": 6}
                answer = await client.ask("/v1/completions", asked, submits=1)
                assert answer.json["model"] == model
                texts[model] = answer.json["choices"][0]["text"]
            assert len(set(texts.values())) == 3
            turns = [{"role": "user", "content": TEXT}]
            for path, body in (
                ("/v1/chat/completions", {"messages": turns}),
                ("/v1/messages", {"messages": turns}),
                ("/v1/responses", {"input": TEXT}),
            ):
                said = set()
                for model in ("pretend", "law"):
                    asked = body | {"model": model}
                    if path != "/v1/responses":
                        asked["max_tokens"] = 16
                    else:
                        asked["max_output_tokens"] = 16
                    answer = await client.ask(path, asked, submits=1)
                    assert answer.status == 200, answer.body
                    assert answer.json["model"] == model
                    said.add(str(answer.json.get("choices") or answer.json.get("content")
                                 or answer.json["output"][0]["content"]))  # fmt: skip
                assert len(said) == 2, path

    asyncio.run(work())


def test_an_unknown_name_is_still_404_and_names_all_that_are_served() -> None:
    async def work() -> None:
        async with serving(adapted_town()) as client:
            for path, body in (
                ("/v1/completions", {"prompt": TEXT}),
                ("/v1/embeddings", {"input": TEXT}),
                ("/tokenize", {"prompt": TEXT}),
            ):
                answer = await client.ask(path, body | {"model": "sql"})
                assert answer.status == 404, path
                error = answer.json["error"]
                assert error["code"] == "model_not_found"
                assert error["message"].endswith("this server serves pretend, law, teams/sql")
            assert (await client.ask("/v1/models/sql")).status == 404
            same = await client.ask("/tokenize", {"model": "law", "prompt": TEXT})
            assert same.json == (await client.ask("/tokenize", {"prompt": TEXT})).json

    asyncio.run(work())


def test_a_name_that_means_two_things_is_refused() -> None:
    async def work() -> None:
        async with serving(adapted_town(), served_names=("law",)) as client:
            answer = await client.ask("/v1/completions", {"model": "law", "prompt": TEXT})
            assert answer.status == 503
            assert "law is a name of the model and of an adapter" in answer.json["error"]["message"]
            assert (await client.ask("/readyz")).status == 503

    asyncio.run(work())
    options = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), 4, lora=("law=x", "sql=y"))
    check_names(options, ServerSettings("", "demo", served_names=("main",)))
    with pytest.raises(InputError, match="law is a name of the model and of an adapter"):
        check_names(options, ServerSettings("", "demo", served_names=("main", "law")))
