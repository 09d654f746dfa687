"""What each kind of server is asked for, what it is not asked for, and where its token ids are found."""

import json

import pytest

from baton import grammar
from baton.errors import RequestError
from baton.params import GenerationParams
from baton.tool_calls import HERMES, Calls, Tool
from decode_worker.upstream.dialects import (
    BATON,
    DIALECTS,
    LLAMA,
    OTHER,
    PLAIN,
    SGLANG,
    TENSORRT,
    TEXT,
    VLLM,
    Asked,
    Dialect,
    Piece,
    body_of,
    read_piece,
    without_free_calls,
)
from decode_worker.upstream.options import KINDS
from sampler.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(
    temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
    frequency_penalty=0.4, logit_bias=((3, -1.5),), seed=5,
)  # fmt: skip
ALL = sorted(DIALECTS.values(), key=lambda each: each.name)
FULL = [each for each in ALL if each not in (TEXT, PLAIN)]


def body(
    dialect: Dialect, sampling: SamplingParams = GREEDY, **params: object
) -> dict[str, object]:
    given = GenerationParams(9, sampling, stop_token_ids=(0,), **params)  # type: ignore[arg-type]
    asked = Asked("the-model", (1, 2, 3), 7, given.min_tokens, given, text="a b c")
    return json.loads(json.dumps(body_of(dialect, asked)))


def test_the_option_names_every_dialect() -> None:
    assert ("auto", *DIALECTS) == KINDS


@pytest.mark.parametrize("dialect", FULL, ids=lambda each: each.name)
def test_every_server_gets_ids_streams_and_returns_ids(dialect: Dialect) -> None:
    sent = body(dialect)
    assert sent["prompt"] == [1, 2, 3]
    assert sent["stream"] is True
    assert sent["temperature"] == 0
    assert sent["n_predict" if dialect is LLAMA else "max_tokens"] == 7
    assert sent.items() >= dialect.ids.items()


@pytest.mark.parametrize("dialect", FULL, ids=lambda each: each.name)
def test_all_of_the_sampling_is_sent(dialect: Dialect) -> None:
    """Servers have defaults of their own: a parameter that is left out is theirs."""
    sent = body(dialect, DRAWN)
    names = {"repetition_penalty": "repeat_penalty"} if dialect is LLAMA else {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty",
                 "presence_penalty", "frequency_penalty", "seed"):  # fmt: skip
        assert sent[names.get(name, name)] == getattr(DRAWN, name), name
    assert sent["logit_bias"] == ([[3, -1.5]] if dialect is LLAMA else {"3": -1.5})
    plain = body(dialect)
    assert sent.keys() - plain.keys() == {"logit_bias"}


def test_a_server_of_text_gets_text_and_what_it_may_know() -> None:
    sent = body(TEXT, DRAWN)
    assert (sent["prompt"], sent["max_tokens"], sent["stream"]) == ("a b c", 7, True)
    assert [sent[name] for name in ("top_k", "min_p", "repetition_penalty")] == [40, 0.1, 1.2]
    assert body(TEXT)["top_k"] == -1
    assert not {"ignore_eos", "stop_token_ids", "return_token_ids"} & sent.keys()


def test_a_server_that_refuses_fields_gets_those_of_openai() -> None:
    openai = {"model", "prompt", "max_tokens", "stream", "temperature", "top_p", "seed"}
    assert body(PLAIN).keys() == openai
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert body(PLAIN, SamplingParams(**penalties)).items() >= penalties.items()  # type: ignore[arg-type]


def test_what_changes_no_greedy_answer_is_not_missed() -> None:
    """Models' own settings often have a top_k."""
    assert body(PLAIN, SamplingParams(temperature=0.0, top_k=50, min_p=0.1)) == body(PLAIN)
    with pytest.raises(RequestError, match="repetition_penalty"):
        body(PLAIN, SamplingParams(temperature=0.0, repetition_penalty=1.1))


def test_llama_cpp_keeps_as_many_tokens_as_a_penalty_looks_at() -> None:
    """-1, once its whole context, is refused since late 2026; and it keeps room for what is named."""
    assert body(LLAMA)["repeat_last_n"] == 0
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert body(LLAMA, SamplingParams(**{penalty: 1.5}))["repeat_last_n"] == 10  # type: ignore[arg-type]


def test_no_top_k_is_what_each_server_calls_it() -> None:
    assert [body(each)["top_k"] for each in (VLLM, SGLANG, TENSORRT, LLAMA)] == [-1, -1, 0, 0]


@pytest.mark.parametrize("seed", [0, 5, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dialect", ALL, ids=lambda each: each.name)
def test_a_seed_is_a_number_that_the_server_takes(dialect: Dialect, seed: int) -> None:
    sent = body(dialect, SamplingParams(seed=seed))["seed"]
    assert 0 <= sent < 2**dialect.seed_bits  # type: ignore[operator]
    assert sent == seed or not 0 <= seed < 2**dialect.seed_bits


def test_the_choices_of_a_request_have_seeds_of_their_own() -> None:
    seeds = {body(VLLM, SamplingParams(seed=5, choice=i))["seed"] for i in range(4)}
    assert len(seeds) == 4


REFUSED = [
    (LLAMA, {"min_tokens": 2}, "min_tokens"),
    (OTHER, {"min_tokens": 2}, "min_tokens"),
    (TENSORRT, {"cache_salt": "a"}, "cache_salt"),
    (TEXT, {"ignore_eos": True}, "ignore_eos"),
    (TEXT, {"min_tokens": 2}, "min_tokens"),
    (PLAIN, {"sampling": SamplingParams(top_k=5)}, "top_k"),
    (PLAIN, {"sampling": SamplingParams(min_p=0.1)}, "min_p"),
    (PLAIN, {"sampling": SamplingParams(repetition_penalty=1.1)}, "repetition_penalty"),
    *[(each, {"logprobs": 0}, "logprobs") for each in ALL],
    *[(each, {"prompt_logprobs": 0}, "prompt logprobs") for each in ALL],
]


@pytest.mark.parametrize(("dialect", "params", "word"), REFUSED)
def test_what_a_server_lacks_is_refused_by_name(
    dialect: Dialect, params: dict[str, object], word: str
) -> None:
    with pytest.raises(RequestError, match=word) as error:
        body(dialect, **params)
    assert dialect.title in str(error.value)


def test_allowed_ids_where_the_server_knows_them() -> None:
    allowed = SamplingParams(allowed_token_ids=(3, 4))
    assert body(VLLM, allowed)["allowed_token_ids"] == [3, 4]
    with pytest.raises(RequestError, match="allowed_token_ids"):
        body(SGLANG, allowed)


def test_a_grammar_in_the_words_of_each_server() -> None:
    schema, pattern = {"type": "object"}, "[ab]+"
    text, regex = grammar.json_schema(schema), grammar.regex(pattern)
    assert body(VLLM, grammar=text)["structured_outputs"] == {"json": schema}
    assert body(BATON, grammar=regex)["structured_outputs"] == {"regex": pattern}
    assert json.loads(str(body(SGLANG, grammar=text)["json_schema"])) == schema
    assert body(TENSORRT, grammar=regex)["response_format"] == {"type": "regex", "regex": pattern}
    assert body(LLAMA, grammar=text)["json_schema"] == schema
    with pytest.raises(RequestError, match=r"llama\.cpp") as error:
        body(LLAMA, grammar=regex)
    assert error.value.code == "invalid_grammar"


def test_what_no_other_server_can_enforce_is_refused_and_free_text_stays_free() -> None:
    tools = (Tool("f", {"type": "object"}),)
    forced = grammar.tool_calls(Calls(HERMES, tools, forced=True))
    for other in (forced, grammar.choice(["a", "b"]), grammar.written('root ::= "a"')):
        with pytest.raises(RequestError, match="behind this cluster is vLLM") as error:
            body(VLLM, grammar=other)
        assert error.value.code == "invalid_grammar"
    free = GenerationParams(5, grammar=grammar.tool_calls(Calls(HERMES, tools)))
    assert without_free_calls(free) == GenerationParams(5)
    for kept in ("", forced, grammar.json_object()):
        assert without_free_calls(GenerationParams(5, grammar=kept)).grammar == kept


PIECES = [
    # vLLM: a token, half a character, the end; what it sends beside them
    ({"choices": [{"index": 0, "text": " a", "token_ids": [5]}]}, Piece([5])),
    ({"choices": [{"text": "", "token_ids": [7], "finish_reason": None}]}, Piece([7])),
    ({"choices": [{"text": "", "token_ids": [], "finish_reason": "stop", "stop_reason": 2}]},
     Piece([], "stop", 2)),
    ({"choices": [{"text": "x", "token_ids": [1], "finish_reason": "length", "stop_reason": None}]},
     Piece([1], "length")),
    ({"choices": [], "usage": {"completion_tokens": 3}}, Piece()),
    # SGLang: what stopped it has another name
    ({"choices": [{"text": "", "token_ids": [2], "finish_reason": "stop", "matched_stop": 2}]},
     Piece([2], "stop", 2)),
    ({"choices": [{"text": "", "finish_reason": "stop", "matched_stop": "x"}]}, Piece((), "stop")),
    # llama.cpp
    ({"index": 0, "content": " a", "tokens": [5], "stop": False}, Piece([5])),
    ({"content": "", "tokens": [], "stop": True, "stop_type": "eos"}, Piece([], "stop")),
    ({"content": "", "tokens": [], "stop": True, "stop_type": "limit", "tokens_predicted": 3},
     Piece([], "length", total=3)),
    # text alone: no ids
    ({"choices": [{"text": " a", "finish_reason": None}]}, Piece(None)),
    ({"content": " a", "stop": False}, Piece(None)),
    # others: an end that is none yet, and what TGI calls its ends
    ({"choices": [{"text": " a", "finish_reason": ""}]}, Piece(None)),
    ({"choices": [{"text": "", "finish_reason": "eos_token"}]}, Piece((), "stop")),
    ({"choices": [{"text": "", "finish_reason": "abort"}]}, Piece((), "abort")),
    # errors within a stream
    ({"error": {"message": "the engine\n died", "code": 500}}, Piece(error="the engine died")),
    ({"error": "no memory"}, Piece(error="no memory")),
    ({"object": "error", "message": "too long", "code": 400}, Piece(error="too long")),
    ({"detail": "Internal\nError"}, Piece(error="Internal Error")),
    ({"error": None, "choices": [{"token_ids": [5]}]}, Piece([5])),
    ({"error": {"message": ""}}, Piece(error="an error without a message")),
    ({"object": "error", "code": 500}, Piece(error="an error without a message")),
    ({}, Piece()),
    ({"object": "ping"}, Piece()),
    ({"type": "ping"}, Piece()),
]  # fmt: skip


@pytest.mark.parametrize(("event", "piece"), PIECES)
def test_ids_and_end_of_a_reply(event: object, piece: Piece) -> None:
    assert read_piece(json.dumps(event))._replace(text="") == piece


def test_text_and_model_of_a_reply() -> None:
    found = read_piece('{"model": "m", "choices": [{"text": " a", "finish_reason": "length"}]}')
    assert found == Piece(None, "length", text=" a", model="m")
    assert read_piece('{"model": 7, "choices": [{"text": 8}]}').model == ""
    assert read_piece('{"content": "", "stop": true, "model": "x.gguf"}').model == "x.gguf"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "[" * 100_000, '{"a":' * 100_000, '{"choices": [7]}',
     '{"choices": [{"token_ids": "ab"}]}',
     '{"choices": [{"token_ids": [1.5]}]}', '{"choices": [{"token_ids": [-1]}]}',
     '{"choices": [{"token_ids": [true]}]}', '{"content": "", "tokens": {"a": 1}}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_reply_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own, and ours
        read_piece(text)
