"""Dialects: how each kind of server is asked to continue token ids, and where its reply has ids. Pure.

Three forms cover all of them: OpenAI's completions with a field that asks for ids, llama.cpp's own, and
completions of a text, for servers that know no ids (texts.py). Every sampling parameter is sent, because
servers have defaults of their own; to a server that refuses fields, OpenAI's alone.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from baton.errors import RequestError
from baton.grammar import GrammarSpec
from baton.params import GenerationParams
from sampler.params import SamplingParams

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server. `optional` names the parameters it knows beyond OpenAI's; a request that sets
    another one is refused."""

    name: str
    title: str
    needs: str  # the version that returns token ids, in words
    path: str
    health: str
    ids: Mapping[str, Any]  # what asks for token ids
    optional: frozenset[str]
    grammar: Callable[[GrammarSpec], Json]
    top_k_off: int = -1
    seed_bits: int = 63
    seeds_by_position: bool = False  # a seeded answer goes on as it was from prompt and tokens
    text: bool = False  # prompts and answers are text
    body: "Callable[[Dialect, Asked], Json]" = field(default=lambda dialect, asked: {})


@dataclass(frozen=True, slots=True)
class Asked:
    """What to generate: `max_tokens` after these ids, of which the first `min_tokens` end nothing. Not
    `streamed`: as one reply. `text`: that of the ids, for a dialect of text."""

    model: str
    token_ids: Sequence[int]
    max_tokens: int
    min_tokens: int
    params: GenerationParams  # resolved
    streamed: bool = True
    text: str = ""

    @property
    def sampling(self) -> SamplingParams:
        assert self.params.sampling is not None, "params of a run are resolved"
        return self.params.sampling


class Piece(NamedTuple):
    """A part of a reply. `token_ids` None: it has text, and no ids. `end_id` ended the answer; it may be
    missing among the ids. `total`: ids of the answer so far, by the server's count. `model`: who answers,
    where the server says it."""

    token_ids: Sequence[int] | None = ()
    finish: str | None = None
    end_id: int | None = None
    error: str = ""
    total: int | None = None
    text: str = ""
    model: str = ""


# ---- requests


def body_of(dialect: Dialect, asked: Asked) -> Json:
    """The JSON to send. Raises RequestError if this server has no such parameter."""
    check_supported(dialect, asked.params)
    return dialect.body(dialect, asked)


def check_supported(dialect: Dialect, params: GenerationParams) -> None:
    """RequestError naming a parameter of the request that this kind of server does not have."""
    sampling = params.sampling or SamplingParams()
    wanted = {
        "logprobs": params.logprobs >= 0,
        "prompt logprobs (echo with logprobs)": params.prompt_logprobs >= 0,
        "min_tokens": params.min_tokens > 0,
        "allowed_token_ids": sampling.allowed_token_ids is not None,
        "cache_salt": bool(params.cache_salt),
        "ignore_eos": params.ignore_eos and dialect.text,
    }
    if dialect is PLAIN:
        wanted |= {
            "top_k": sampling.top_k > 0 and not sampling.greedy,
            "min_p": sampling.min_p > 0 and not sampling.greedy,
            "repetition_penalty": sampling.repetition_penalty != 1.0,
        }
    for name, given in wanted.items():
        if given and name not in dialect.optional:
            raise RequestError(
                f"{name} is not available: the engine behind this cluster is {dialect.title}, which is "
                f"asked for {'text' if dialect.text else 'token ids'} and does not take it; leave it out"
                + (
                    ", or turn it off where the model's own settings turn it on"
                    * (dialect is PLAIN)
                )
            )


def seed_of(sampling: SamplingParams, bits: int) -> int:
    """The request's seed as a number of so many bits. Each of its choices draws its own numbers."""
    most = (1 << bits) - 1
    if not sampling.choice:
        return sampling.seed & most
    digest = hashlib.blake2b(f"{sampling.seed} {sampling.choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & most


def _completions(dialect: Dialect, asked: Asked) -> Json:
    params, sampling = asked.params, asked.sampling
    body: Json = {
        "model": asked.model,
        "prompt": list(asked.token_ids),
        "max_tokens": asked.max_tokens,
        "stream": asked.streamed,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or dialect.top_k_off,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": seed_of(sampling, dialect.seed_bits),
        "ignore_eos": params.ignore_eos,
        "skip_special_tokens": False,
        **dialect.ids,
    }
    if params.stop_token_ids:
        body["stop_token_ids"] = list(params.stop_token_ids)
    if asked.min_tokens:
        body["min_tokens"] = asked.min_tokens
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.allowed_token_ids is not None:
        body["allowed_token_ids"] = list(sampling.allowed_token_ids)
    if params.cache_salt:
        body["cache_salt"] = params.cache_salt
    return body | _grammar(dialect, params)


def _text(dialect: Dialect, asked: Asked) -> Json:
    """OpenAI's completions of a text, with the fields that most servers know beside OpenAI's own."""
    sampling = asked.sampling
    return _plain(dialect, asked) | {
        "top_k": sampling.top_k or dialect.top_k_off,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
    }


def _plain(dialect: Dialect, asked: Asked) -> Json:
    """OpenAI's completions of a text, with OpenAI's own fields alone."""
    sampling = asked.sampling
    body: Json = {
        "model": asked.model,
        "prompt": asked.text,
        "max_tokens": asked.max_tokens,
        "stream": asked.streamed,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed_of(sampling, dialect.seed_bits),
    }
    if sampling.presence_penalty:
        body["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        body["frequency_penalty"] = sampling.frequency_penalty
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return body | _grammar(dialect, asked.params)


def _llama(dialect: Dialect, asked: Asked) -> Json:
    """llama.cpp's /completion. The order of its samplers is made that of this project."""
    params, sampling = asked.params, asked.sampling
    body: Json = {
        "prompt": list(asked.token_ids),
        "n_predict": asked.max_tokens,
        "stream": asked.streamed,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": _penalized(asked),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "seed": seed_of(sampling, dialect.seed_bits),
        "ignore_eos": params.ignore_eos,
        "cache_prompt": not params.cache_salt,
        **dialect.ids,
    }
    if sampling.logit_bias:
        body["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias]
    return body | _grammar(dialect, params)


def _penalized(asked: Asked) -> int:
    """How many of the last tokens count for penalties: all, if there are penalties. llama.cpp keeps room
    for so many. Versions of late 2026 refuse -1, which meant its whole context before."""
    sampling = asked.sampling
    neutral = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    return 0 if neutral == (1.0, 0.0, 0.0) else len(asked.token_ids) + asked.max_tokens


def _grammar(dialect: Dialect, params: GenerationParams) -> Json:
    if not params.grammar:
        return {}
    spec = GrammarSpec.parse(params.grammar)
    if spec.pattern is None and spec.schema is None:
        what = "choices and rules" if spec.calls is None else "tool calls that are enforced"
        raise RequestError(
            f"{what} are not available: behind this cluster is {dialect.title}, which gets JSON schemas "
            "and regexes only",
            code="invalid_grammar",
        )
    return dialect.grammar(spec)


def without_free_calls(params: GenerationParams) -> GenerationParams:
    """Other servers cannot watch a text for the beginning of a call. Where the answer may be text, it is
    free there, and a call in it is read as one if it happens to be sound (docs/engines.md)."""
    if not params.grammar:
        return params
    calls = GrammarSpec.parse(params.grammar).calls
    free = calls is not None and not calls.forced and calls.answer is None
    return replace(params, grammar="") if free else params


def _structured(spec: GrammarSpec) -> Json:
    if spec.pattern is not None:
        return {"structured_outputs": {"regex": spec.pattern}}
    return {"structured_outputs": {"json": spec.schema}}


def _sglang_grammar(spec: GrammarSpec) -> Json:
    if spec.pattern is not None:
        return {"regex": spec.pattern}
    return {"json_schema": json.dumps(spec.schema)}


def _tensorrt_grammar(spec: GrammarSpec) -> Json:
    if spec.pattern is not None:
        return {"response_format": {"type": "regex", "regex": spec.pattern}}
    return {"response_format": {"type": "json", "schema": spec.schema}}


def _no_grammar(spec: GrammarSpec) -> Json:
    raise RequestError(
        "answers in a form are not available: the engine behind this cluster returns text alone, and how "
        "it would be asked for one is not known",
        code="invalid_grammar",
    )


def _llama_grammar(spec: GrammarSpec) -> Json:
    if spec.pattern is not None:
        raise RequestError(
            "a regex is not available: the engine behind this cluster is llama.cpp, which takes JSON "
            "schemas only",
            code="invalid_grammar",
        )
    return {"json_schema": spec.schema}


# ---- replies

ENDS = {"eos_token": "stop", "stop_sequence": "stop"}
"""finish_reason of servers that do not use OpenAI's words: TGI."""


def read_piece(data: str) -> Piece:
    """One event of a reply, of any dialect. Raises ValueError if it is not an object of JSON."""
    found = loaded(data)
    if not isinstance(found, dict):
        raise ValueError(f"an event is no JSON object: {data[:80]}")
    if error := _error_in(found):
        return Piece(error=error)
    model = found["model"] if isinstance(found.get("model"), str) else ""
    if "choices" in found:
        return _from_choice(found["choices"])._replace(model=model)
    if "content" in found or "tokens" in found:
        finish = {"limit": "length", "none": "abort"}.get(str(found.get("stop_type")), "stop")
        ids = _ids(found.get("tokens"), found.get("content"))
        total = found.get("tokens_predicted")
        done = found.get("stop") is True
        total = total if type(total) is int else None
        return Piece(ids, finish if done else None, total=total, model=model)
    return Piece()


def _error_in(event: Json) -> str:
    """The message of an error, of any shape; empty if the event is none."""
    error = event.get("error")
    if isinstance(error, dict):
        error = error.get("message", error)
    elif not error:
        error = event.get("message") or event.get("detail")
        alone = error and not event.keys() - {"detail", "message", "type", "code"}
        if event.get("object") != "error" and not alone:
            return ""
    return " ".join(str(error or "").split())[:500] or "an error without a message"


def loaded(text: str | bytes) -> Any:
    """JSON of another server. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _from_choice(choices: object) -> Piece:
    if not isinstance(choices, list) or not choices:
        return Piece()  # the usage, or nothing yet
    choice = choices[0]
    if not isinstance(choice, dict):
        raise ValueError(f"a choice is no JSON object: {choice!r:.80}")
    finish = str(choice.get("finish_reason") or "")  # Go's servers send "" before the end
    end, text = choice.get("stop_reason", choice.get("matched_stop")), choice.get("text")
    return Piece(
        _ids(choice.get("token_ids"), text),
        ENDS.get(finish, finish) or None,
        end if type(end) is int else None,
        text=text if isinstance(text, str) else "",
    )


def _ids(ids: object, text: object) -> Sequence[int] | None:
    """The ids; None if there are none for a text."""
    if ids is None:
        return None if text else ()
    if not isinstance(ids, list) or any(type(each) is not int or each < 0 for each in ids):
        raise ValueError(f"token ids are no list of numbers: {ids!r:.80}")
    return ids


_NEEDS_TEXT = "OpenAI's completions of a text"
_FULL = frozenset({"min_tokens", "allowed_token_ids", "cache_salt"})

VLLM = Dialect(
    "vllm", "vLLM", "vLLM 0.10.2 or newer", "/v1/completions", "/health",
    {"return_token_ids": True}, _FULL, _structured, body=_completions,
)  # fmt: skip
SGLANG = Dialect(
    "sglang", "SGLang", "an SGLang whose completions know return_token_ids", "/v1/completions",
    "/health", {"return_token_ids": True}, frozenset({"min_tokens", "cache_salt"}), _sglang_grammar,
    body=_completions,
)  # fmt: skip
TENSORRT = Dialect(
    "tensorrt-llm", "TensorRT-LLM", "trtllm-serve", "/v1/completions", "/health",
    {"detokenize": False}, frozenset({"min_tokens"}), _tensorrt_grammar, top_k_off=0,
    body=_completions,
)  # fmt: skip
LLAMA = Dialect(
    "llama.cpp", "llama.cpp", "llama-server of llama.cpp itself", "/completion", "/health",
    {"return_tokens": True}, frozenset({"cache_salt"}), _llama_grammar, top_k_off=0, seed_bits=31,
    body=_llama,
)  # fmt: skip
BATON = Dialect(
    "baton", "another cluster of this project", "version 0.3 or newer", "/v1/completions", "/readyz",
    {"return_token_ids": True}, _FULL, _structured, seed_bits=63, seeds_by_position=True,
    body=_completions,
)  # fmt: skip
OTHER = Dialect(
    "other", "a server of unknown kind", "a server with vLLM's return_token_ids", "/v1/completions",
    "/v1/models", {"return_token_ids": True}, frozenset(), _structured, body=_completions,
)  # fmt: skip

TEXT = Dialect(
    "text", "a server of text", _NEEDS_TEXT, "/v1/completions", "/health", {}, frozenset(), _no_grammar,
    seed_bits=31, text=True, body=_text,
)  # fmt: skip
PLAIN = Dialect(
    "plain-text", "a server of text with OpenAI's fields alone", _NEEDS_TEXT, "/v1/completions",
    "/health", {}, frozenset(), _no_grammar, seed_bits=31, text=True, body=_plain,
)  # fmt: skip

DIALECTS = {each.name: each for each in (VLLM, SGLANG, TENSORRT, LLAMA, BATON, OTHER, TEXT, PLAIN)}
OWNERS = {
    "vllm": VLLM, "sglang": SGLANG, "tensorrt_llm": TENSORRT, "tensorrt-llm": TENSORRT,
    "llamacpp": LLAMA, "llama.cpp": LLAMA, "baton": BATON,
}  # fmt: skip
"""By `owned_by` in /v1/models."""
