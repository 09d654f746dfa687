"""`python main.py serve`, whole, as its clients see it: the openai package, a WebSocket, a fuzzer."""

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from dataclasses import replace
from typing import Any

import openai
import pytest
import schemathesis
import websockets
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from websockets.asyncio.client import connect

from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.processes import ROOT
from tests.cluster.serving import GREEDY, LENGTH, Server, ask, post
from tests.depth import deep
from tests.patience import PATIENCE_S, until


def streamed(stream: Any) -> tuple[str, str | None]:
    """Text and finish reason."""
    text, reason = "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return text, reason


def test_streams_and_whole_answers_are_those_of_the_offline_job(server: Server) -> None:
    expected = calm.answers(LENGTH, GREEDY)
    whole = server.client.completions.create(
        model="demo", prompt=list(calm.PROMPTS), temperature=0, max_tokens=LENGTH
    )
    assert [(c.text, c.finish_reason) for c in whole.choices] == [
        (each.text, each.reason) for each in expected
    ]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(len(each.tokens) for each in expected)
    for prompt, each in zip(calm.PROMPTS[:3], expected, strict=False):
        assert streamed(ask(server, prompt, stream=True)) == (each.text, each.reason)


def test_the_responses_api_streams_and_goes_on(server: Server) -> None:
    responses = server.client.responses
    asked: dict[str, Any] = {"model": "demo", "max_output_tokens": 400, "temperature": 0}
    first = responses.create(input="Hello", **asked)
    assert first.status == "completed"
    with responses.stream(input="Hello", **asked) as stream:
        texts = [each.delta for each in stream if each.type == "response.output_text.delta"]
        assert "".join(texts) == stream.get_final_response().output_text == first.output_text
    second = responses.create(input="And?", previous_response_id=first.id, **asked)
    said = [{"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And?"}]  # fmt: skip
    spelled = responses.create(input=said, **asked)
    assert second.output_text == spelled.output_text
    assert second.usage is not None
    assert spelled.usage is not None
    assert second.usage.input_tokens == spelled.usage.input_tokens
    assert responses.retrieve(second.id).output_text == second.output_text
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(first.id)


def test_the_messages_api_streams(server: Server) -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "temperature": 0}

    def post(**more: Any) -> str:
        body = json.dumps(asked | more).encode()
        request = urllib.request.Request(
            f"{server.url}/v1/messages", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())

    whole = json.loads(post())
    lines = [each for each in post(stream=True).splitlines() if each.startswith("data: ")]
    events = [json.loads(each.removeprefix("data: ")) for each in lines]
    texts = [each["delta"]["text"] for each in events if each["type"] == "content_block_delta"]
    assert "".join(texts) == whole["content"][0]["text"]
    assert events[-1] == {"type": "message_stop"}
    assert whole["stop_reason"] == events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_embeddings_are_the_same_in_any_company_and_leave_no_kv(server: Server) -> None:
    texts = ["In the future", "On a distant planet " * 20, "x", "In the future"]
    before = ask(server, texts[0]).choices[0].text
    found = server.client.embeddings.create(model="demo", input=texts)
    vectors = [each.embedding for each in found.data]
    assert [len(each) for each in vectors] == [256] * 4
    for each in vectors:
        assert abs(sum(x * x for x in each) - 1) < 1e-5
    alone = server.client.embeddings.create(model="demo", input=texts[0]).data[0].embedding
    assert vectors[0] == vectors[3] == alone
    assert ask(server, texts[0]).choices[0].text == before
    last = {"pooling": "last"}
    other = server.client.embeddings.create(model="demo", input=texts[0], extra_body=last)
    assert other.data[0].embedding != alone
    until(lambda: server.metric("kv_blocks_leased") == 0, "blocks that are free again")


def test_one_large_request_does_not_keep_others_out(server: Server) -> None:
    large = {"n": 16, "max_tokens": 60, "stream": True, "extra_body": {"ignore_eos": True}}
    with ask(server, [[5, 6, 7]] * 16, **large) as stream:
        chunks = iter(stream)
        next(chunks)
        assert server.metric("num_requests_in_lines") > 0
        for _ in range(20):
            assert ask(server, "In the future", max_tokens=2).choices[0].finish_reason == "length"
        next(chunks)  # it goes on
    until(lambda: server.metric("num_requests_in_lines") == 0, "the end of the line")


def test_sampled_answers_depend_on_the_seed_alone(server: Server) -> None:
    warm = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "n": 3}
    first = ask(server, calm.PROMPTS[0], **warm)
    again = ask(server, calm.PROMPTS[0], **warm)
    texts = [choice.text for choice in first.choices]
    assert [choice.text for choice in again.choices] == texts
    assert len(set(texts)) == 3
    single = SamplingParams(temperature=0.9, top_p=0.95, seed=7)
    assert texts[0] == calm.answers(LENGTH, single)[0].text
    unseeded = {ask(server, "A", temperature=1.5).choices[0].text for _ in range(5)}
    assert len(unseeded) > 1


def test_an_answer_is_made_of_the_allowed_ids_alone(server: Server) -> None:
    """As who lets a model choose among labels asks."""
    allowed = (5, 300, 700, 1500)
    for params in (GREEDY, SamplingParams(temperature=1.5, seed=4)):
        only = replace(params, allowed_token_ids=allowed)
        expected = calm.answers(LENGTH, only)[0]
        assert set(expected.tokens) <= set(allowed)
        told = ask(
            server, calm.PROMPTS[0], temperature=only.temperature, seed=only.seed,
            extra_body={"allowed_token_ids": list(allowed)},
        )  # fmt: skip
        assert told.choices[0].text == expected.text


def test_several_answers_to_a_long_prompt_cost_one_prefill(server: Server) -> None:
    prompt = " ".join(f"the {i}th of many words that nobody said before" for i in range(20))
    warm = {"temperature": 0.9, "seed": 3, "max_tokens": 8}
    many = ask(server, prompt, n=4, **warm)
    assert many.usage.prompt_tokens_details.cached_tokens > many.usage.prompt_tokens * 0.9
    assert many.choices[0].text == ask(server, prompt, **warm).choices[0].text


def test_a_stream_ends_with_usage_and_done(server: Server) -> None:
    body = {"model": "demo", "prompt": "In the future", "max_tokens": 5, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-Request-Id": "mine"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().split("\n\n")
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-request-id"] == "mine"
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["id"].startswith("cmpl-mine-") for chunk in chunks)


def test_an_id_that_is_none_is_not_taken(server: Server) -> None:
    told = server.client.completions.with_raw_response.create(
        model="demo", prompt="A", max_tokens=1, extra_headers={"X-Request-Id": "two words"}
    )
    found = told.headers["x-request-id"]
    assert found == told.parse().id
    assert re.fullmatch(r"cmpl-[0-9a-f]{24}", found)


def test_a_conversation_goes_through_the_template(server: Server) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "In the future"}]}]
    chat = server.client.chat.completions.create(
        model="demo", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    text = ask(server, "<user>In the future\n<assistant>", max_tokens=12).choices[0].text
    assert chat.choices[0].message.content == text
    assert chat.choices[0].message.role == "assistant"
    assert len(chat.choices[0].logprobs.content) == 12
    assert all(len(each.top_logprobs) == 2 for each in chat.choices[0].logprobs.content)
    stream = server.client.chat.completions.create(
        model="demo", messages=messages, max_tokens=12, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text
    counted = json.loads(post(server, "/tokenize", {"messages": messages}))
    assert counted["count"] == chat.usage.prompt_tokens


def test_logprobs_of_the_prompt_are_those_of_generating_it(server: Server) -> None:
    """As lm-eval asks: token ids, echo, logprobs, one token."""
    told = ask(server, calm.PROMPTS[1], logprobs=1)
    words = json.loads(
        post(server, "/tokenize", {"prompt": calm.PROMPTS[1] + told.choices[0].text})
    )
    echoed = server.client.completions.create(
        model="demo", prompt=[words["tokens"]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    given = echoed.choices[0].logprobs.token_logprobs
    assert given[0] is None
    assert given[-1 - len(told.choices[0].logprobs.token_logprobs) : -1] == pytest.approx(
        told.choices[0].logprobs.token_logprobs, abs=1e-3
    )
    assert echoed.choices[0].text.startswith(calm.PROMPTS[1])
    nothing = ask(server, calm.PROMPTS[1], echo=True, logprobs=0, max_tokens=0)
    assert nothing.choices[0].text == calm.PROMPTS[1]
    assert nothing.usage.completion_tokens == 0
    assert post(server, "/detokenize", {"tokens": words["tokens"]})


@pytest.mark.parametrize(
    ("wrong", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"temperature": 2.5}, 400, "temperature", None),
        ({"temperature": True}, 400, "temperature", None),
        ({"n": 17}, 400, "n", None),
        ({"max_tokens": 10**6}, 400, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"prompt": []}, 400, "prompt", None),
        ({"prompt": [2048]}, 400, "prompt", None),
        ({"prompt": ""}, 400, "prompt", None),
        ({"stop": ["a"] * 5}, 400, "stop", None),
        ({"logit_bias": {"2048": 1}}, 400, "logit_bias", None),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", None),
        ({"extra_body": {"stop_token_ids": [-1]}}, 400, "stop_token_ids", None),
        ({"extra_body": {"allowed_token_ids": [2048]}}, 400, "allowed_token_ids", None),
        ({"extra_body": {"guided_regex": "("}}, 400, "guided_regex", "invalid_grammar"),
        ({"extra_body": {"best_of": 2}}, 400, "best_of", None),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    server: Server, wrong: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    given = {"model": "demo", "prompt": "x"} | wrong
    with pytest.raises(openai.APIStatusError) as error:
        server.client.completions.create(**given)
    told = error.value
    assert (told.status_code, told.param, told.code) == (status, param, code)
    assert len(told.body["message"]) < 400


def called(server: Server, **more: Any) -> Any:
    """A chat that must call a tool; its answer is long."""
    digits = {
        "type": "object",
        "properties": {"digits": {"type": "string", "pattern": "^[0-9]{300}$"}},
    }
    schema = digits | {"required": ["digits"]}
    tool: Any = {"type": "function", "function": {"name": "count", "parameters": schema}}
    return server.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Count."}], tools=[tool],
        tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=450, **more,
    )  # fmt: skip


def test_answers_fit_a_grammar_though_the_decode_worker_dies(server: Server) -> None:
    """A regex, and a tool's schema within a call."""
    grammar = {"guided_regex": "[0-9]{400}"}
    calmly = ask(server, "Digits:", max_tokens=450, extra_body=grammar).choices[0].text
    calm_call = called(server).choices[0]
    stream = ask(server, "Digits:", max_tokens=450, stream=True, extra_body=grammar)
    chunks, calls = iter(stream), iter(called(server, stream=True))
    first = [next(chunks).choices[0].text for _ in range(5)]
    parts = [next(calls).choices[0] for _ in range(8)]
    before = server.metric("workers_lost_total")
    server.kill("decode-0")
    rest, reason = streamed(chunks)
    assert ("".join(first) + rest, reason) == (calmly, "stop")
    assert re.fullmatch("[0-9]{400}", calmly)
    parts += [chunk.choices[0] for chunk in calls]
    assert server.metric("workers_lost_total") == before + 1
    pieces = [each for part in parts for each in part.delta.tool_calls or ()]
    arguments = "".join(each.function.arguments for each in pieces)
    assert (pieces[0].function.name, pieces[0].function.arguments) == ("count", "")
    assert arguments == calm_call.message.tool_calls[0].function.arguments
    assert re.fullmatch("[0-9]{300}", json.loads(arguments)["digits"])
    assert (parts[-1].finish_reason, calm_call.finish_reason) == ("tool_calls", "tool_calls")


def test_a_stream_goes_on_though_the_router_dies(server: Server) -> None:
    wanted = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    calmly = ask(server, calm.PROMPTS[2], **wanted).choices[0].text
    chunks = iter(ask(server, calm.PROMPTS[2], stream=True, **wanted))
    first = [next(chunks).choices[0].text for _ in range(5)]
    server.kill("router")
    rest, reason = streamed(chunks)
    assert ("".join(first) + rest, reason) == (calmly, "length")


def test_the_server_itself_dies_and_its_port_waits(server: Server) -> None:
    """The listening socket is the supervisor's: who asks meanwhile is answered by the next one."""
    server.kill("server")
    assert ask(server, calm.PROMPTS[0]).choices[0].text == calm.answers(LENGTH, GREEDY)[0].text


def test_who_leaves_gives_the_blocks_back(server: Server) -> None:
    long = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}

    def idle() -> bool:
        held = server.metric("kv_blocks_leased") or server.metric("num_requests_running")
        return held == 0

    until(idle, "an idle pool")
    with ask(server, "In the future", stream=True, **long) as stream:
        next(iter(stream))
    until(idle, "an idle pool")
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.3).completions.create(
            model="demo", prompt="In the future", n=8, **long
        )
    until(idle, "an idle pool")


def test_a_socket_streams_cancels_and_tells_what_is_wrong(server: Server) -> None:
    async def talk() -> None:
        async with connect(server.url.replace("http", "ws") + "/v1/stream") as socket:
            body = {"prompt": calm.PROMPTS[0], "max_tokens": LENGTH, "temperature": 0}
            await socket.send(json.dumps(body))
            text = ""
            while (news := json.loads(await socket.recv())).get("type") != "done":
                text += news["choices"][0]["text"]
            assert text == calm.answers(LENGTH, GREEDY)[0].text
            long = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}
            await socket.send(json.dumps(long))
            name = json.loads(await socket.recv())["id"]
            await socket.send(json.dumps({"type": "cancel", "id": name}))
            while not (news := json.loads(await socket.recv()))["choices"][0]["finish_reason"]:
                pass
            assert news["choices"][0]["finish_reason"] == "abort"
            assert json.loads(await socket.recv())["type"] == "done"
            for wrong in ("{", "[]", '{"prompt": "x", "n": 0}', '{"messages": []}'):
                await socket.send(wrong)
                assert json.loads(await socket.recv())["error"]["type"] == "invalid_request_error"
            await socket.send(b"\x00")
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd.code == 1003

    asyncio.run(talk())


def test_the_state_of_it(server: Server) -> None:
    assert server.get("/health") == ""
    ready = json.loads(server.get("/readyz"))
    assert ready["ready"]
    assert sorted(w["role"] for w in ready["workers"]) == ["decode", "prefill"]
    assert json.loads(server.get("/version"))["version"]
    assert "/v1/completions" in server.get("/docs")
    model = server.client.models.retrieve("demo")
    assert model.max_model_len == 2304
    assert server.metric("prompt_tokens_total") > 0
    assert server.metric("inter_token_latency_seconds_count") > 0
    assert server.metric("worker_up") == 2
    trace = json.loads(server.get("/trace.json"))
    assert {e["name"] for e in trace["traceEvents"]} >= {"queue", "prefill", "decode"}


def test_the_page_is_fed_with_every_request(server: Server) -> None:
    async def watch() -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
            client._client.stream("GET", f"{server.url}/timeline") as feed,
        ):
            asked = asyncio.create_task(
                client.completions.create(model="demo", prompt="In the future", max_tokens=40)
            )
            kind = ""
            async for line in feed.aiter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    seen += data["moments"] if kind == "moments" else []
                    name = (await asked).id
                    mine = [m for m in seen if m["request"] == f"{name}-0"]
                    if any(m["state"] == "finished" for m in mine):
                        return mine
        return []

    states = [moment["state"] for moment in asyncio.run(asyncio.wait_for(watch(), PATIENCE_S))]
    assert [s for s in states if s != "decoding"] == [
        "queued", "reserving", "reserved", "filling", "finished",
    ]  # fmt: skip
    assert "decoding" in states


def test_talking_from_the_terminal(server: Server) -> None:
    """`python main.py chat`."""

    def chat(*words: str, said: str = "") -> str:
        ran = subprocess.run(
            [sys.executable, "main.py", "chat", "--url", server.url, "--temperature", "0", *words],
            cwd=ROOT, input=said, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
        )  # fmt: skip
        return ran.stdout

    once = chat("In the future", "--max-tokens", "12")
    assert len(once) > 20
    many = chat("--max-tokens", "12", said="In the future\n\nand then\n/new\nIn the future\n")
    first, second, third, rest = many.split("\n")
    assert (first, third, rest) == (once.strip("\n"), first, "")
    assert second != first


UNLIMITED = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
"""Where an answer fills the context if nothing limits it, and the field that does."""


def test_no_input_is_answered_with_a_fault_of_ours(server: Server) -> None:
    """Made up from the API's own description, operation by operation."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = 0

    def try_it(case: Any) -> None:
        nonlocal tried
        if isinstance(case.body, dict):
            limits = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
            for name in limits:
                if type(case.body.get(name)) is int:
                    case.body[name] = min(case.body[name], 20)
            field = UNLIMITED.get(case.path)
            if field and not any(name in case.body for name in limits):
                case.body[field] = 20
            limit = case.body.get("timeout")
            if type(limit) in (int, float) and 0 < limit < 60:
                case.body["timeout"] = 60  # a busy machine may take longer: 504
        answer = case.call(timeout=PATIENCE_S)
        tried += 1
        assert answer.status_code < 500, f"{case.method} {case.path} {case.body}: {answer.text}"
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    for each in schema.get_all_operations():
        operation = each.ok()  # those made of others' fields get fewer examples: theirs are large
        if operation.path == "/timeline":  # it never ends
            continue
        modes = list(GenerationMode) if operation.method == "post" else [GenerationMode.POSITIVE]
        few = operation.path.startswith(("/v1/responses", "/v1/messages", "/v1/embeddings"))
        for mode in modes:
            fuzz = given(case=operation.as_strategy(generation_mode=mode))(try_it)
            settings(
                max_examples=deep(8, usual=6) if few else deep(25, usual=15),
                deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            )(fuzz)()  # fmt: skip
    assert tried > 200


def test_after_all_that_it_says_the_same_as_before(server: Server) -> None:
    assert ask(server, calm.PROMPTS[0]).choices[0].text == calm.answers(LENGTH, GREEDY)[0].text
