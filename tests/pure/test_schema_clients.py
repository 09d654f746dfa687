"""What real clients send over HTTP, and what of it reaches the router."""

import json
from typing import Any

import httpx2
import openai

from baton.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tests.pure.test_schema import (
    CHAT,
    COMPLETION,
    DEFAULTS,
    answer,
    chat,
    complete,
    good,
    refused,
    sampling,
)


def test_the_openai_client() -> None:
    """The real one; only its wire ends here."""
    seen: list[Any] = []

    def serve(request: httpx2.Request) -> httpx2.Response:
        kind = ChatRequest if request.url.path.endswith("chat/completions") else CompletionRequest
        seen.append(good(answer(kind, request.content)))
        return httpx2.Response(200, json={"id": "a", "choices": [], "created": 0, "object": "x"})

    http = httpx2.Client(transport=httpx2.MockTransport(serve))
    with openai.OpenAI(api_key="k", base_url="http://here/v1", http_client=http) as client:
        client.completions.create(
            model="demo", prompt=["a", "b"], n=None, stop=["\n"], logprobs=None, best_of=1, user="u"
        )
        client.chat.completions.create(
            model="demo",
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "y"},
            ],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            tool_choice="auto", temperature=0, logprobs=True, store=False, metadata={"a": "b"},
            extra_body={"top_k": 5, "ignore_eos": True},
        )  # fmt: skip
    first, second = seen
    assert (first.stop, first.max_new_tokens) == (("\n",), 16)
    assert second.sampling == sampling(temperature=0.0, top_k=5)
    assert (second.logprobs, second.max_new_tokens, second.ignore_eos) == (0, 2048, True)


def test_lm_eval_asks_for_the_prompt_s_own_logprobs() -> None:
    found = good(complete(
        model="demo", prompt=[[1, 2, 3], [4]], temperature=0, max_tokens=1, logprobs=1, echo=True,
        seed=1234,
    ))  # fmt: skip
    assert (found.logprobs, found.prompt_logprobs, found.max_new_tokens) == (1, 1, 1)
    assert found.sampling == sampling(temperature=0, seed=1234)


def test_guidellm_writes_contents_as_lists() -> None:
    found = good(chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}], stream=True,
        stream_options={"include_usage": True}, ignore_eos=True, max_completion_tokens=64, stop=None,
    ))  # fmt: skip
    assert (found.max_new_tokens, found.ignore_eos) == (64, True)


def test_langchain_and_bench_serve() -> None:
    found = good(chat(model="demo", temperature=0.7, n=1, stream=False, max_completion_tokens=None))
    assert found.sampling == sampling(temperature=0.7)
    bench = good(complete(
        model="demo", repetition_penalty=1.0, max_tokens=128, logprobs=None, stream=True,
        stream_options={"include_usage": True}, request_id="bench-0", priority=0, unknown={"a": 1},
    ))  # fmt: skip
    assert (bench.max_new_tokens, bench.logprobs) == (128, -1)


def test_no_top_logprobs_need_no_logprobs() -> None:
    assert good(chat(top_logprobs=0)).logprobs == -1


def test_sampling_that_is_not_given_is_the_default() -> None:
    assert good(complete()).sampling == DEFAULTS
    for name in ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"):
        assert good(complete(**{name: 1})).sampling == sampling(**{name: 1})
    assert good(complete(seed=-5)).sampling == sampling(seed=-5)


def test_prompts_are_texts_or_ids() -> None:
    for prompt, found in (
        ("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3))),
    ):  # fmt: skip
        assert CompletionRequest.model_validate({"prompt": prompt}).prompts == found


def test_tokens_that_are_wanted_are_known_or_all_that_fit() -> None:
    wanted = [
        CompletionRequest.model_validate(COMPLETION | fields).wanted_tokens
        for fields in ({}, {"max_tokens": None}, {"max_tokens": 5})
    ]
    assert wanted == [16, 16, 5]
    for fields, tokens in (({}, None), ({"max_completion_tokens": 7}, 7), ({"max_tokens": 5}, 5)):
        assert ChatRequest.model_validate(CHAT | fields).wanted_tokens == tokens
    assert good(complete(max_tokens=0, echo=True)).max_new_tokens == 1


def test_tools_are_offered_unless_none_may_be_called() -> None:
    for choice, offered in ((None, [{}]), ("auto", [{}]), ("none", None)):
        asked = ChatRequest.model_validate(CHAT | {"tools": [{}], "tool_choice": choice})
        assert asked.offered_tools == offered


def test_a_template_gets_messages_as_they_were_sent() -> None:
    sent = [
        {"content": "4", "reasoning_content": "2 + 2", "role": "assistant", "tool_calls": None},
        {"role": "assistant", "tool_calls": [{"id": "1", "x": None}], "refusal": None, "y": {"z": 1}},
        {"role": "user", "content": [{"type": "text", "text": "a", "u": 1},
                                     {"type": "text", "text": "b"}]},
    ]  # fmt: skip
    for kind in (ChatRequest, TokenizeRequest):
        found = kind.model_validate_json(json.dumps({"messages": sent})).conversation()
        assert json.dumps(found.messages) == json.dumps(sent)


def test_tokenize_takes_a_text_or_messages() -> None:
    assert answer(TokenizeRequest, '{"prompt": ""}').adds_special_tokens
    assert answer(TokenizeRequest, json.dumps(CHAT)).conversation().messages == CHAT["messages"]
    refused(answer(TokenizeRequest, "{}"), "prompt")
    refused(answer(TokenizeRequest, json.dumps(CHAT | COMPLETION)), "prompt")
    refused(answer(DetokenizeRequest, "{}"), "tokens")
