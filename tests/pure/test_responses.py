"""OpenAI's Responses API: what a chat answers becomes items and events. Requests are tested in
test_responses_requests.py."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from baton.server.api_error import ApiError
from baton.server.pieces import Call, Content, Piece, Reasoning, pieces_of
from baton.server.responses.answer import Output
from baton.server.responses.items import messages_of, plain_items
from baton.server.responses.routes import listed, new_id
from baton.server.responses.schema import ResponsesRequest
from baton.server.responses.store import OVERHEAD, Segment, Store
from tests.pure.town_app import TownClient, serving

RESPONSES = "/v1/responses"

CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


def ids() -> Any:
    numbers = count()
    return lambda prefix: f"{prefix}_{next(numbers)}"


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


# ---- answers

KINDS = st.sampled_from(("reasoning", "content", "call"))
ANSWERS = st.lists(st.tuples(KINDS, st.text(min_size=1, max_size=8)), max_size=5)


def cut(answer: Sequence[tuple[str, str]], size: int) -> Iterator[Piece]:
    """The answer in pieces of `size` characters. A new call is another call."""
    for index, (kind, text) in enumerate(answer):
        for start in range(0, len(text), size):
            part = text[start : start + size]
            if kind == "call":
                first = {"id": f"c{index}", "name": "f"} if not start else {}
                yield Call(index, part, **first)
            else:
                yield Reasoning(part) if kind == "reasoning" else Content(part)


@given(ANSWERS, st.integers(1, 9), st.sampled_from(("completed", "incomplete")))
@settings(deadline=None)
def test_an_answer_is_the_same_however_it_was_cut(
    answer: list[tuple[str, str]], size: int, status: str
) -> None:
    whole, parts = Output(ids()), Output(ids())
    list(whole.take(list(cut(answer, 99))))
    list(whole.end(status))
    events = [event for piece in cut(answer, size) for event in parts.take([piece])]
    events += parts.end(status)
    assert parts.items == whole.items
    assert [each["status"] for each in parts.items[:-1]] == ["completed"] * (len(parts.items) - 1)
    assert parts.items[-1]["status"] == status
    by_item = groupby(events, key=lambda event: event["output_index"])
    for item, (index, group) in zip(parts.items, by_item, strict=True):
        found = list(group)
        assert found[0]["type"] == "response.output_item.added"
        assert found[-1] == {
            "type": "response.output_item.done", "output_index": index, "item": item,
        }  # fmt: skip
        joined = "".join(each.get("delta", "") for each in found)
        done = [each for each in found if each["type"].endswith((".done", "_part.done"))]
        if item["type"] == "function_call":
            assert joined == item["arguments"] == done[0]["arguments"]
        else:
            assert joined == item["content"][0]["text"] == done[0]["text"]
            assert done[1]["part"] == item["content"][0]


def test_an_answer_without_text_is_an_empty_message() -> None:
    output = Output(ids())
    kinds = [event["type"].removeprefix("response.") for event in output.end("completed")]
    assert kinds == [
        "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done",
    ]  # fmt: skip
    assert output.items[0]["content"][0]["text"] == ""


def test_logprobs_wait_for_their_text() -> None:
    """In events they have no bytes."""

    def score(token: str) -> dict[str, Any]:
        top = {"token": token, "logprob": -1.0, "bytes": [*token.encode()]}
        return top | {"top_logprobs": [top]}

    output = Output(ids(), logprobs=True)
    scores = [score(""), score("a"), score("")]
    events = list(output.take([Content("", scores[:1]), Content("a", scores[1:2])]))
    events += [*output.take([Content("", scores[2:])]), *output.end("completed")]
    assert output.items[0]["content"][0]["logprobs"] == scores
    told = [each["logprobs"] for each in events if "logprobs" in each]
    assert [len(each) for each in told] == [2, 3]
    assert all(
        each.keys() == {"token", "logprob", "top_logprobs"} for all_ in told for each in all_
    )


def test_deltas_and_messages_of_a_chat_become_pieces() -> None:
    begun = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert pieces_of({"role": "assistant", "content": ""}) == []
    assert pieces_of({"tool_calls": [begun]}) == [Call(0, "", "c", "f")]
    assert pieces_of({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}) == [
        Call(0, "{")
    ]
    message = {"reasoning_content": "Hm", "content": "Yes", "tool_calls": [CHAT_CALL, CHAT_CALL]}
    assert pieces_of(message, {"content": [1]}) == [
        Reasoning("Hm"), Content("Yes", [1]),
        Call(0, '{"a":1}', "c1", "add"), Call(1, '{"a":1}', "c1", "add"),
    ]  # fmt: skip


# ---- the store


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(-1, 9)), max_size=40))
@settings(deadline=None)
def test_the_store_keeps_its_bounds_and_counts_what_it_holds(
    turns: list[tuple[int, int, int]],
) -> None:
    store, known = Store(responses=6, size=8 * OVERHEAD), [[""] * 10 for _ in range(3)]
    for number, (tenant, size, before) in enumerate(turns):
        held = store.get(str(tenant), known[tenant][before]) if before >= 0 else None
        earlier: Sequence[Segment] = held.conversation if held else ()
        store.put(str(tenant), f"r{number}", bytes(size), bytes(size), earlier)
        known[tenant][number % 10] = f"r{number}"
        if number % 7 == 6:
            store.forget(str(tenant), f"r{number}")
        stored = [each for mine in store._held.values() for each in mine.values()]
        segments = {id(part): part for each in stored for part in each.conversation}
        total = sum(len(each.response) + OVERHEAD for each in stored)
        total += sum(len(each.data) + OVERHEAD for each in segments.values())
        assert (store.responses, store.bytes) == (len(stored), total)
        assert store.responses <= 6
        assert store.bytes <= 8 * OVERHEAD
        assert sum(store._sizes.values()) == store.bytes
    for mine in [dict(each) for each in store._held.values()]:
        for tenant in map(str, range(3)):
            for name in mine:
                store.forget(tenant, name)
    assert (store.responses, store.bytes, store._sizes, store._held) == (0, 0, {}, {})


def test_the_many_responses_of_one_tenant_do_not_cost_another_its_own() -> None:
    store = Store(responses=4)
    store.put("quiet", "mine", b"", b"", ())
    for number in range(20):
        store.put("loud", f"r{number}", b"", b"", ())
    assert store.get("quiet", "mine") is not None
    assert [store.get("loud", f"r{number}") is not None for number in range(16, 20)] == [
        False, True, True, True,
    ]  # fmt: skip


def test_a_page_of_items_goes_on_after_an_id() -> None:
    items = [{"id": str(number)} for number in range(5)]
    first = listed(items, limit=2, descending=True, after=None)
    assert (first["first_id"], first["last_id"], first["has_more"]) == ("4", "3", True)
    last = listed(items, limit=3, descending=True, after="3")
    assert ([each["id"] for each in last["data"]], last["has_more"]) == (["2", "1", "0"], False)
    with pytest.raises(ApiError, match="after"):
        listed(items, limit=3, descending=False, after="9")


# ---- over HTTP


def events_of(body: bytes) -> list[dict[str, Any]]:
    """Of a stream. Each is named as its type says."""
    found = []
    for text in body.decode().split("\n\n")[:-1]:
        name, data = text.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def calm(response: Mapping[str, Any]) -> Any:
    """Without ids and times."""
    text = json.dumps({**response, "created_at": 0})
    for number, each in enumerate([response, *response["output"]]):
        text = text.replace(each["id"], str(number))
    return json.loads(text)


GREEDY = {"input": "Hello", "max_output_tokens": 5, "temperature": 0}


def test_a_stream_says_what_the_whole_response_says_and_openai_reads_both() -> None:
    async def ask(client: TownClient, **more: Any) -> None:
        client.fresh()
        whole = await client.ask(RESPONSES, GREEDY | more, submits=1)
        client.fresh()
        stream = await client.ask(RESPONSES, GREEDY | more | {"stream": True}, submits=1)
        events = events_of(stream.body)
        assert [each["sequence_number"] for each in events] == [*range(len(events))]
        kinds = [each["type"].removeprefix("response.") for each in events]
        assert kinds[:2] == ["created", "in_progress"]
        assert kinds[-1] == "incomplete"
        assert calm(events[-1]["response"]) == calm(whole.json)
        adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
        for each in events:
            adapter.validate_python(each)
        response = Response.model_validate(whole.json)
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage is not None
        assert response.usage.output_tokens == 5
        texts = [each["delta"] for each in events if each["type"].endswith("_text.delta")]
        item = whole.json["output"][0]
        assert "".join(texts) == item["content"][0]["text"]
        if item["type"] == "reasoning":
            assert whole.json["usage"]["output_tokens_details"]["reasoning_tokens"] > 0

    async def work() -> None:
        async with serving() as client:
            await ask(client)
            await ask(client, include=["message.output_text.logprobs"], top_logprobs=1)
        async with serving(template="{{ messages[0]['content'] }}<think>{# </think> #}") as client:
            await ask(client)

    asyncio.run(work())


def test_a_conversation_goes_on_after_a_response_of_ones_own() -> None:
    ann, bob = ({"x-api-key": key} for key in ("ann", "bob"))

    async def work() -> None:
        async with serving(api_keys=("ann", "bob")) as client:
            first = (await client.ask(RESPONSES, GREEDY, submits=1, headers=ann)).json
            said = first["output"][0]["content"][0]["text"]
            goes_on = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 2}
            second = (await client.ask(RESPONSES, goes_on, submits=1, headers=ann)).json
            spelled = [says("user", "Hello"), says("assistant", said), says("user", "And?")]
            count_ = f"{RESPONSES}/input_tokens"
            whole = (await client.ask(count_, {"input": spelled}, headers=ann)).json["input_tokens"]
            assert second["usage"]["input_tokens"] == whole
            counted = await client.ask(count_, goes_on, headers=ann)
            assert counted.json["input_tokens"] == whole

            place = f"{RESPONSES}/{second['id']}"
            assert (await client.ask(place, headers=ann)).json == second
            listed_ = (await client.ask(f"{place}/input_items", headers=ann)).json["data"]
            roles = [(each["role"], each["content"][0]["text"]) for each in listed_]
            assert roles == [("user", "And?"), ("assistant", said), ("user", "Hello")]
            for method in ("GET", "DELETE"):
                assert (await client.ask(place, method=method, headers=bob)).status == 404
            refused = await client.ask(RESPONSES, goes_on, headers=bob)
            assert refused.status == 400
            assert refused.json["error"]["code"] == "previous_response_not_found"
            assert "restart" in refused.json["error"]["message"]

            gone = await client.ask(f"{RESPONSES}/{first['id']}", method="DELETE", headers=ann)
            assert gone.json == {"id": first["id"], "object": "response", "deleted": True}
            assert (await client.ask(f"{RESPONSES}/{first['id']}", headers=ann)).status == 404
            goes_on["previous_response_id"] = second["id"]  # which needs the first no more
            third = await client.ask(RESPONSES, goes_on | {"store": False}, submits=1, headers=ann)
            assert third.status == 200
            gone = await client.ask(f"{RESPONSES}/{third.json['id']}", headers=ann)
            assert gone.status == 404

    asyncio.run(work())


def test_thoughts_of_one_turn_are_joined() -> None:
    part = "summary_text"
    thoughts = [
        {"type": "reasoning", "content": [], "summary": [{"type": part, "text": t}]} for t in "abc"
    ]
    items = [says("user", "Hi"), *thoughts, says("assistant", "Yes."), *thoughts]
    spelled = messages_of(None, plain_items(ResponsesRequest(input=items).input, new_id))
    assert [each.get("reasoning_content") for each in spelled] == [None, "abc", "abc"]


def test_a_conversation_that_goes_on_is_no_longer_than_one_that_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a request of a hundred bytes costs as much as all that was ever stored."""
    monkeypatch.setattr("baton.server.bodies.MAX_BODY_BYTES", 600)

    async def work() -> None:
        async with serving() as client:
            first = (await client.ask(RESPONSES, GREEDY, submits=1)).json
            goes_on = {"input": "And? " * 60, "previous_response_id": first["id"]}
            for path in (RESPONSES, f"{RESPONSES}/input_tokens"):
                answer = await client.ask(path, goes_on)
                assert answer.status == 400
                assert answer.json["error"]["param"] == "previous_response_id"
                assert "at most 600 are allowed" in answer.json["error"]["message"]

    asyncio.run(work())


def test_probabilities_of_tokens_are_of_the_response_and_not_of_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are a hundred times as long as their text: a conversation with them could not go on."""
    asked = GREEDY | {"include": ["message.output_text.logprobs"], "top_logprobs": 20}
    asked |= {"max_output_tokens": 40}

    async def work() -> None:
        async with serving() as client:
            first = await client.ask(RESPONSES, asked, submits=1)
            (message,) = first.json["output"]
            assert message["content"][0]["logprobs"]
            name = first.json["id"]
            assert (await client.ask(f"{RESPONSES}/{name}")).body == first.body
            limit = 20_000
            assert len(first.body) > limit
            monkeypatch.setattr("baton.server.bodies.MAX_BODY_BYTES", limit)
            goes_on = GREEDY | {"input": "And?", "previous_response_id": name}
            second = await client.ask(RESPONSES, goes_on, submits=1)
            assert second.status == 200, second.json
            items = (await client.ask(f"{RESPONSES}/{second.json['id']}/input_items")).json["data"]
            texts = [part for each in items for part in each["content"]]
            assert not any(part.get("logprobs") for part in texts)
            # a response that is longer than a body may be is stored without them, too
            third = (await client.ask(RESPONSES, asked, submits=1)).json
            assert third["output"][0]["content"][0]["logprobs"]
            kept = (await client.ask(f"{RESPONSES}/{third['id']}")).json["output"][0]["content"][0]
            assert (kept["logprobs"], kept["text"]) == (
                [],
                third["output"][0]["content"][0]["text"],
            )

    asyncio.run(work())


def test_a_failure_is_an_event_of_the_stream() -> None:
    async def work() -> None:
        async with serving() as client:
            ids_ = (await client.ask("/tokenize", {"messages": [says("user", "Hello")]})).json
            client.exchange.town.poisoned.add(ids_["tokens"][0])
            answer = await client.ask(RESPONSES, GREEDY | {"stream": True}, submits=1)
            last = events_of(answer.body)[-1]
            assert last["type"] == "response.failed"
            assert last["response"]["status"] == "failed"
            assert last["response"]["error"]["code"] == "server_error"
            assert Response.model_validate(last["response"]).error is not None
            name = last["response"]["id"]
            assert (await client.ask(f"{RESPONSES}/{name}")).status == 404

    asyncio.run(work())


def test_errors_name_the_field_that_was_sent() -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_output_tokens": 600}, "max_output_tokens"),
        ({"input": "\ud800"}, "input"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"top_k": -5}, "top_k"),
        ({"text": {"format": form}}, "text.format"),
        ({"model": "gpt-9"}, "model"),
    ]

    async def work() -> None:
        async with serving() as client:
            for body, param in wrong:
                answer = await client.ask(RESPONSES, {"input": "Hello"} | body)
                assert answer.status in (400, 404)
                assert answer.json["error"]["param"] == param

    asyncio.run(work())
