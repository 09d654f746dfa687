"""What is found at a URL, and what is refused there in one line."""

import asyncio
import json
from typing import Any

import pytest

from decode_worker.upstream.survey import (
    Expected,
    Reply,
    Survey,
    Unfit,
    Unready,
    changed,
    message_of,
    still_there,
    survey,
)

IDS = tuple(range(10, 30))
EXPECTED = Expected("auto", "", 512, 100, IDS)
MODEL = {"id": "m", "owned_by": "vllm", "max_model_len": 512}


def event(*ids: int, **more: Any) -> bytes:
    chunk = {"choices": [{"text": "x", "token_ids": list(ids), **more}]}
    return f"data: {json.dumps(chunk)}\n\n".encode()


class Server:
    """Answers by path; what it has no answer for is 404."""

    def __init__(self, **answers: Any) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.answers: dict[str, Any] = {
            "models": {"data": [MODEL]},
            "tokenize": {"tokens": list(IDS)},
            "completions": event(1) + event(2, finish_reason="length") + b"data: [DONE]\n\n",
            **answers,
        }

    async def fetch(self, method: str, path: str, body: Any) -> Reply:
        self.asked.append((method, path, body))
        answer = self.answers.get(path.rpartition("/")[2])
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Reply):
            return answer
        if answer is None:
            return Reply(404, b'{"detail":"Not Found"}')
        return Reply(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())


def look(server: Server, expected: Expected = EXPECTED) -> Survey:
    return asyncio.run(survey(server.fetch, expected))


def test_it_asks_for_models_a_text_and_two_tokens() -> None:
    server = Server()
    assert look(server) == Survey("vllm", "m")
    assert [path for _, path, _ in server.asked] == ["/v1/models", "/tokenize", "/v1/completions"]
    probe = server.asked[-1][2]
    assert probe["prompt"] == list(IDS[:8])
    assert (probe["max_tokens"], probe["return_token_ids"]) == (2, True)


LLAMA = {
    "models": {"data": [{"id": "x.gguf", "owned_by": "llamacpp"}]},
    "props": {"default_generation_settings": {"n_ctx": 512}, "total_slots": 4},
    "completion": b'data: {"content":"a","tokens":[1],"stop":false}\n\n'
                  b'data: {"content":"","tokens":[],"stop":true,"stop_type":"limit"}\n\n',
}  # fmt: skip


def test_llama_cpp_is_asked_in_its_own_words() -> None:
    server = Server(**LLAMA)
    assert look(server) == Survey("llama.cpp", "x.gguf", 4)
    assert server.asked[-1][1] == "/completion"
    assert server.asked[-2][2] == {"content": server.asked[-2][2]["content"], "add_special": False}


def test_a_server_without_tokenizer_and_limits_is_taken_at_its_word() -> None:
    server = Server(tokenize=None, models={"data": [{"id": "m", "owned_by": "somebody"}]})
    assert look(server) == Survey("other", "m")


def test_a_reply_that_is_not_streamed_has_ids_too() -> None:
    whole = json.dumps({"choices": [{"text": "ab", "token_ids": [1, 2]}]}).encode()
    assert look(Server(completions=whole)).dialect == "vllm"


def test_the_kind_can_be_given() -> None:
    models = {"data": [{"id": "m", "owned_by": "a proxy"}]}
    expected = Expected("tensorrt-llm", "", 512, 100, IDS)
    server = Server(models=models)
    assert look(server, expected).dialect == "tensorrt-llm"
    assert server.asked[-1][2]["detokenize"] is False


def test_names_of_one_model_are_one_model() -> None:
    models = {"data": [{**MODEL, "root": "r"}, {**MODEL, "id": "alias", "root": "r"}]}
    assert look(Server(models=models)).model == "m"


SOMEBODY = {"models": {"data": [{"id": "m", "owned_by": "somebody"}]}, "tokenize": None}


class TextServer(Server):
    """Of a kind that is not known: it takes text alone, and refuses a field that it does not know, or
    not. `counted`: tokens of SAMPLE by its count."""

    def __init__(self, refusal: Reply, *, strict: bool, counted: int | None = len(IDS)) -> None:
        super().__init__(**SOMEBODY)
        self._refusal, self._strict, self._counted = refusal, strict, counted

    async def fetch(self, method: str, path: str, body: Any) -> Reply:
        if path != "/v1/completions":
            return await super().fetch(method, path, body)
        self.asked.append((method, path, body))
        if not isinstance(body["prompt"], str) or (self._strict and "top_k" in body):
            return self._refusal
        answer: dict[str, Any] = {
            "model": "m-1", "choices": [{"text": " ab", "finish_reason": "length"}]
        }  # fmt: skip
        if self._counted is not None:
            answer["usage"] = {"prompt_tokens": self._counted}
        return Reply(200, json.dumps(answer).encode())


NO_IDS = [
    Reply(422, b'{"detail":[{"loc":["body","prompt"],"msg":"Input should be a valid string"}]}'),
    Reply(400, b'{"detail":"prompt must be a string."}'),
    Reply(500, b"Internal Server Error"),
    Reply(200, b'data: {"choices":[{"text":"ab"}]}\n\n'),
    Reply(200, b'data: {"error":"prompt must be a string"}\n\n'),
]


@pytest.mark.parametrize("refusal", NO_IDS, ids=lambda each: str(each.body[:20]))
def test_a_server_that_knows_no_ids_is_asked_for_text(refusal: Reply) -> None:
    found = look(TextServer(refusal, strict=False))
    assert (found.dialect, found.answers_as, found.adds) == ("text", "m-1", True)


def test_a_server_that_refuses_fields_is_asked_with_those_of_openai() -> None:
    server = TextServer(NO_IDS[0], strict=True)
    assert look(server).dialect == "plain-text"
    assert "top_k" not in server.asked[-1][2]


@pytest.mark.parametrize(
    ("counted", "adds"), [(len(IDS) + 1, True), (len(IDS), False), (None, True)]
)
def test_whether_a_server_puts_special_tokens_first_is_read_off_its_count(
    counted: int | None, adds: bool
) -> None:
    expected = Expected("auto", "", 512, 100, IDS, first=1)
    server = TextServer(NO_IDS[0], strict=False, counted=counted)
    assert look(server, expected).adds is adds


def test_another_tokenizer_is_known_by_its_count() -> None:
    with pytest.raises(Unfit, match="another tokenizer"):
        look(TextServer(NO_IDS[0], strict=False, counted=7))


@pytest.mark.parametrize("kind", ["vllm", "other"])
def test_a_kind_that_was_named_is_not_asked_for_text(kind: str) -> None:
    with pytest.raises(Unfit):
        look(TextServer(NO_IDS[1], strict=False), Expected(kind, "", 512, 100, IDS))


def test_a_busy_server_is_no_server_of_text() -> None:
    with pytest.raises(Unready):
        look(TextServer(Reply(503, b"busy"), strict=False))


@pytest.mark.parametrize(
    "models", [Reply(500, b"no cache"), None, {"data": []}, {"data": [{"id": "x"}]}]
)
def test_who_names_model_and_kind_needs_no_right_list(models: Any) -> None:
    server = TextServer(NO_IDS[0], strict=True)
    server.answers["models"] = models
    found = look(server, Expected("plain-text", "/a/folder", 512, 100, IDS))
    assert (found.dialect, found.model, found.listed) == ("plain-text", "/a/folder", False)
    assert asyncio.run(still_there(server.fetch, found)) == ""
    with pytest.raises((Unfit, Unready)):
        look(server, Expected("auto", "/a/folder", 512, 100, IDS))


def test_another_model_in_the_same_place_is_noticed_at_a_glance() -> None:
    before = Survey("llama.cpp", "a.gguf")
    glances: list[tuple[Any, str]] = [
        ({"data": [{"id": "a.gguf"}]}, ""), ({"data": [{"id": "b.gguf"}]}, "'b.gguf' now"),
        ({"data": []}, ""), (None, ""), (b"<html>", ""), ({"data": [7]}, ""),
    ]  # fmt: skip
    for models, why in glances:
        found = asyncio.run(still_there(Server(models=models).fetch, before))
        assert found.endswith(why)
        assert bool(found) == bool(why)


TWO = {"data": [MODEL, {**MODEL, "id": "other"}]}
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"models": None}, "/v1/models failed: status 404"),
    ({"models": b"<html>"}, "no OpenAI-compatible API"),
    ({"models": b"[" * 100_000}, "no OpenAI-compatible API"),
    ({"completions": b"data: " + b"[" * 100_000 + b"\n\n"}, "cannot be read"),
    ({"models": {"data": 7}}, "no OpenAI-compatible API"),
    ({"models": {"data": []}}, "serves none"),
    ({"models": TWO}, "--upstream-model: 'm', 'other'"),
    ({"models": Reply(401, b'{"error":{"message":"no key"}}')}, "no key; give its key by --upstream-key"),
    ({"models": {"data": [{**MODEL, "max_model_len": 256}]}}, "--max-model-len 256"),
    ({**LLAMA, "props": {"default_generation_settings": {"n_ctx": 128}}}, "--max-model-len 128"),
    ({"tokenize": {"tokens": [*IDS[:-1], 99]}}, "another tokenizer"),
    ({"completions": Reply(400, b'{"detail":"prompt must be a string"}')}, "must be a string"),
    ({"completions": b'data: {"choices":[{"text":"ab"}]}\n\n'}, "text without token ids"),
    ({"completions": b'data: {"choices":[{"text":"ab"}]}\n\n'}, "vLLM 0.10.2"),
    ({"completions": event(100)}, "serves another model"),
    ({"completions": event(1) + event(1, 2)}, "for 2 tokens"),
    ({"completions": b"data: {\n\n"}, "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("answers", "words"), UNFIT)
def test_what_does_not_fit_is_refused_in_one_line(answers: dict[str, Any], words: str) -> None:
    with pytest.raises(Unfit) as error:
        look(Server(**answers))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


UNREADY: list[tuple[dict[str, Any], str]] = [
    ({"models": ConnectionRefusedError(111, "Connect call failed")}, "connection refused"),
    ({"models": OSError("Multiple exceptions: [Errno 111] a, [Errno 111] b")}, "connection refused"),
    ({"models": TimeoutError()}, "no answer in time"),
    ({"models": Reply(503, b'{"error":{"message":"loading\\nmodel","code":503}}')}, "loading model"),
    ({"completions": Reply(429, b"busy")}, "busy"),
    ({"completions": b'data: {"error":{"message":"out of memory"}}\n\n'}, "out of memory"),
    ({"tokenize": ConnectionResetError()}, "reset"),
]  # fmt: skip


@pytest.mark.parametrize(("answers", "words"), UNREADY)
def test_what_may_pass_is_waited_for(answers: dict[str, Any], words: str) -> None:
    with pytest.raises(Unready) as error:
        look(Server(**answers))
    assert words in str(error.value)


def test_the_model_that_was_named_must_be_there() -> None:
    assert look(Server(models=TWO), Expected("auto", "other", 512, 100, IDS)).model == "other"
    with pytest.raises(Unfit, match="'m', 'other'"):
        look(Server(models=TWO), Expected("auto", "third", 512, 100, IDS))


def test_another_server_in_its_place_is_noticed() -> None:
    before = Survey("vllm", "m", 4)
    assert changed(before, Survey("vllm", "m", 9)) == ""
    assert "restart this worker" in changed(before, Survey("vllm", "other"))
    assert "sglang" in changed(before, Survey("sglang", "m"))
    assert "'n'" in changed(Survey("vllm", "m", 4, "m"), Survey("vllm", "m", 4, "n"))


MESSAGES: list[tuple[bytes, str]] = [
    (b'{"error":{"message":"a\\nb"}}', "a b"), (b'{"error":"a"}', "a"), (b'{"detail":"a"}', "a"),
    (b'{"message":"a","type":"x"}', "a"), (b"plain\n text", "plain text"), (b"", "no message"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), MESSAGES)
def test_the_message_of_an_error(body: bytes, message: str) -> None:
    assert message_of(body) == message
