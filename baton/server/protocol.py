"""Protocol: what may be asked over HTTP, field by field, and what it comes to.

OpenAI's fields with vLLM's extras. Known fields are checked strictly, unknown ones are ignored, as
clients send what other servers know. https://platform.openai.com/docs/api-reference
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from baton import grammar
from baton.errors import RequestError
from baton.params import MAX_LOGPROBS, MAX_STOP_IDS, MAX_STOPS, Limits, check_ids
from baton.server.faults import Fault, from_request_error
from baton.server.fields import Bool, Int, Number, Stop, Text, TokenId, id_of
from sampler.params import MOST_ALLOWED, MOST_BIASES

MAX_N = 16
MAX_PROMPTS = 256
COMPLETION_TOKENS = 16
"""What a completion has that does not say how long it shall be (OpenAI's default)."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request comes to, whichever way it was asked."""

    prompts: tuple[str | tuple[int, ...], ...]
    n: int
    max_tokens: int | None  # None: as many as fit
    sampling: Mapping[str, Any]  # the given ones alone
    seed: int | None
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    logprobs: int  # -1: none
    prompt_logprobs: int
    echo: bool
    grammar: str
    stream: bool
    include_usage: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    request_id: str
    cache_salt: str
    tools: Sequence[Any] | None


def in_vocabulary(ids: Iterable[int], vocabulary: int, param: str, what: str = "token id") -> None:
    """Raises Fault naming the field and the first id that is no token's."""
    try:
        check_ids(ids, vocabulary, what)
    except RequestError as error:
        raise from_request_error(error, param) from error


def few_biases(value: Any) -> Any:
    """Counted before they are looked at: of those too many each would be an error of its own."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"must have at most {MOST_BIASES:,} ids, not {len(value):,}")
    return value


# The tag says what the value was taken for, so that an error is about that and not about the rest.
Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]
Biases = Annotated[dict[str, Number], Field(max_length=MOST_BIASES), BeforeValidator(few_biases)]


class Loose(BaseModel):
    """Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Loose):
    """Of a stream."""

    include_usage: Bool = False


class JsonSchema(Loose):
    """A schema and its name."""

    name: Text = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Bool | None = None


class ResponseFormat(Loose):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Loose):
    """vLLM's way to say the same."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None


class Asked(Loose):
    """Fields that both ways to ask share."""

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    n: Int | None = Field(1, ge=1, le=MAX_N, description="How many answers.")
    temperature: Number | None = Field(None, ge=0, le=2, description="0: greedy.")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, lt=2**31, description="-1 or 0: off.")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=1e-30, le=1e30)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = Field(None, description="By token id; clamped to -100 .. 100.")
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_IDS)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Int = Field(0, ge=0, lt=2**31)
    skip_special_tokens: Bool = True
    stream: Bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: Text | None = None
    structured_outputs: StructuredOutputs | None = None
    allowed_token_ids: list[TokenId] | None = Field(
        None, min_length=1, max_length=MOST_ALLOWED, description="The only ones that may be drawn."
    )
    best_of: Int | None = Field(None, description="Must equal n.")
    request_id: Annotated[Text, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    cache_salt: Text | None = Field(None, max_length=256)

    def _check_together(self) -> None:
        """What no field can tell alone. Not a validator: its errors would show the whole request."""
        if self.stream_options is not None and not self.stream:
            text = "stream_options is for streams: set stream to true, or leave it out"
            raise Fault.bad_request(text, "stream_options")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Fault.bad_request("best_of must equal n, or be left out", "best_of")

    def _sampling(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                 "presence_penalty", "frequency_penalty")  # fmt: skip
        given = {name: v for name in names if (v := getattr(self, name)) is not None}
        biases = {id_of(key): bias for key, bias in (self.logit_bias or {}).items()}
        if len(biases) < len(self.logit_bias or {}):
            raise Fault.bad_request("logit_bias has two numbers for one token id", "logit_bias")
        if biases:
            given["logit_bias"] = tuple((i, max(-100.0, min(100.0, b))) for i, b in biases.items())
        if self.allowed_token_ids is not None:
            given["allowed_token_ids"] = tuple(self.allowed_token_ids)
        return given

    def _grammar(self) -> str:
        """At most one way to say it."""
        form, structured = self.response_format, self.structured_outputs
        schemas, patterns = {"guided_json": self.guided_json}, {"guided_regex": self.guided_regex}
        if structured is not None:
            if structured.json_ is None and structured.regex is None:
                raise Fault.bad_request("json or regex is missing", "structured_outputs")
            schemas["structured_outputs"] = structured.json_
            patterns["structured_outputs"] = structured.regex
        if form is not None and form.type == "json_schema":
            if form.json_schema is None:
                raise Fault.bad_request("json_schema is missing", "response_format")
            schemas["response_format"] = form.json_schema.schema_
        wanted = [(p, partial(grammar.json_schema, s)) for p, s in schemas.items() if s is not None]
        wanted += [(p, partial(grammar.regex, r)) for p, r in patterns.items() if r is not None]
        if form is not None and form.type == "json_object":
            wanted.append(("response_format", partial(grammar.json_object)))
        if len(wanted) > 1:
            raise Fault.bad_request("say once what the answer must look like", wanted[0][0])
        for param, written in wanted:
            try:
                return written()
            except RequestError as error:
                raise from_request_error(error, param) from error
        return ""

    def to_generation(self, limits: Limits, **own: Any) -> Generation:
        self._check_together()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling, vocabulary = self._sampling(), limits.vocabulary
        biased = (i for i, _ in sampling.get("logit_bias", ()))
        in_vocabulary(biased, vocabulary, "logit_bias", "logit_bias id")
        in_vocabulary(self.allowed_token_ids or (), vocabulary, "allowed_token_ids")
        in_vocabulary(self.stop_token_ids or (), vocabulary, "stop_token_ids", "stop token id")
        most = own["max_tokens"]
        if self.min_tokens > (limits.context if most is None else most):
            raise Fault.bad_request("min_tokens must be at most max_tokens", "min_tokens")
        options = self.stream_options
        shared: dict[str, Any] = {
            "n": self.n or 1,
            "sampling": sampling,
            "seed": self.seed,
            "stop": stop,
            "include_stop": self.include_stop_str_in_output,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "grammar": self._grammar(),
            "stream": bool(self.stream),
            "include_usage": options is not None and options.include_usage,
            "skip_special_tokens": self.skip_special_tokens,
            "request_id": self.request_id or "",
            "cache_salt": self.cache_salt or "",
        }
        return Generation(**shared, **own)


def shape(value: Any) -> str | None:
    """Which of the four ways to write prompts this is, by its first element."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


# A body of 4 MiB holds two million ids: no call into Python for each, and the first error is the last.
PromptIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)
]
PerPrompt = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[PromptIds, Tag("ids")]
    | Annotated[list[Text], PerPrompt, Tag("texts")]
    | Annotated[list[PromptIds], PerPrompt, Tag("lists")],
    Discriminator(
        shape,
        custom_error_type="prompt",
        custom_error_message="must be a text, texts, token ids, or lists of token ids",
    ),
]


class CompletionRequest(Asked):
    """Continue these prompts."""

    prompt: Prompt = Field(description="A text, texts, token ids, or lists of token ids.")
    max_tokens: Int | None = Field(COMPLETION_TOKENS, ge=0, lt=2**31)
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Bool | None = False
    add_special_tokens: Bool = True
    suffix: None = None

    def generation(self, limits: Limits) -> Generation:
        """Raises Fault or RequestError."""
        most = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if most == 0 and not self.echo:
            raise Fault.bad_request("max_tokens may be 0 only with echo", "max_tokens")
        if isinstance(self.prompt, str):
            prompts: tuple[str | tuple[int, ...], ...] = (self.prompt,)
        elif isinstance(self.prompt[0], int):
            prompts = (tuple(self.prompt),)
        else:
            prompts = tuple(p if isinstance(p, str) else tuple(p) for p in self.prompt)
        for ids in (each for each in prompts if isinstance(each, tuple)):
            if len(ids) > limits.context:  # first, so that there are never many to look at
                raise Fault.too_long(
                    f"the prompt has {len(ids):,} tokens, but this model's context is "
                    f"{limits.context:,}: shorten it"
                )
            in_vocabulary(ids, limits.vocabulary, "prompt")
        logprobs = -1 if self.logprobs is None else self.logprobs
        return self.to_generation(
            limits,
            prompts=prompts,
            max_tokens=most,
            logprobs=logprobs,
            prompt_logprobs=logprobs if self.echo else -1,
            echo=bool(self.echo),
            add_special_tokens=self.add_special_tokens,
            tools=None,
        )
