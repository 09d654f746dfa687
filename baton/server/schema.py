"""Schema: the requests that HTTP clients send, field by field, and the GenerationParams made of them.

OpenAI's fields with vLLM's extras. Known fields are checked strictly, unknown ones are ignored, because
clients send fields of other servers. https://platform.openai.com/docs/api-reference
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)

from baton import grammar
from baton.errors import RequestError
from baton.params import (
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
    GenerationParams,
)
from baton.server.api_error import SHOWN, ApiError, from_request_error
from sampler.params import MOST_ALLOWED, MOST_BIASES, RULES, SamplingParams

MAX_N = 16
MAX_PROMPTS = 256
MAX_MESSAGES = 16_384
MAX_PARTS = 1024
LONGEST_TIMEOUT_S = 86_400.0
COMPLETION_TOKENS = 16
"""max_tokens of a completion that does not give it (OpenAI's default)."""

# Strict numbers refuse true and "1" by themselves; a strict float takes whole numbers.
Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


@dataclass(frozen=True, slots=True)
class Defaults:
    """The values of fields that a request does not give."""

    sampling: SamplingParams  # the model's own
    context: int  # max_new_tokens of a chat
    seed: int = 0
    stream_interval_s: float = 0.0


def few_biases(value: Any) -> Any:
    """Checks the number first: otherwise each of too many items would be an error of its own."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"must have at most {MOST_BIASES:,} ids, not {len(value):,}")
    return value


def id_of(key: str) -> int:
    """The token id in a key of logit_bias."""
    if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= 2**31:
        raise ApiError.bad_request(
            f"the keys of logit_bias must be token ids, got {key[:SHOWN]!r}", "logit_bias"
        )
    return int(key)


# With a tag, an error names the intended alternative only, not all of them.
Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]
Biases = Annotated[dict[str, Number], Field(max_length=MOST_BIASES), BeforeValidator(few_biases)]


class IgnoreExtra(BaseModel):
    """Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(IgnoreExtra):
    """Options of a stream."""

    include_usage: Bool = False


class JsonSchema(IgnoreExtra):
    """A schema and its name."""

    name: Text = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Bool | None = None


class ResponseFormat(IgnoreExtra):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(IgnoreExtra):
    """vLLM's field for grammars."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None


NO_STRUCTURE = StructuredOutputs(json=None)


class GenerationRequest(IgnoreExtra):
    """Fields that completions and chat share."""

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    n: Int | None = Field(1, ge=1, le=MAX_N, description="Answers for each prompt.")
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
        None, min_length=1, max_length=MOST_ALLOWED, description="Only these may be sampled."
    )
    best_of: Int | None = Field(None, description="Must equal n.")
    request_id: Annotated[Text, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    cache_salt: Text | None = Field(None, max_length=256)
    timeout: Number | None = Field(
        None, gt=0, le=LONGEST_TIMEOUT_S, description="Seconds for the whole answer; then 504."
    )

    def _params(self, defaults: Defaults, *, wanted: int, logprobs: int) -> GenerationParams:
        """Checks rules between fields. The errors of a validator would show the whole request."""
        if self.stream_options is not None and not self.stream:
            text = "stream_options needs stream: true"
            raise ApiError.bad_request(text, "stream_options")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError.bad_request("best_of must equal n; leave it out", "best_of")
        if self.min_tokens > wanted:
            raise ApiError.bad_request("min_tokens must be at most max_tokens", "min_tokens")
        return GenerationParams(
            max_new_tokens=max(wanted, 1),
            sampling=self._sampling(defaults),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            include_stop=self.include_stop_str_in_output,
            keep_special=not self.skip_special_tokens,
            logprobs=logprobs,
            grammar=self._grammar(),
            cache_salt=self.cache_salt or "",
            stream_interval_s=defaults.stream_interval_s,
        )

    def _sampling(self, defaults: Defaults) -> SamplingParams:
        given = {name: v for name in RULES if (v := getattr(self, name, None)) is not None}
        given.setdefault("seed", defaults.seed)
        biases = {id_of(key): bias for key, bias in (self.logit_bias or {}).items()}
        if len(biases) < len(self.logit_bias or {}):
            raise ApiError.bad_request("logit_bias has one token id twice", "logit_bias")
        given["logit_bias"] = tuple((i, max(-100.0, min(100.0, b))) for i, b in biases.items())
        if self.allowed_token_ids is not None:
            given["allowed_token_ids"] = tuple(self.allowed_token_ids)
        try:
            return replace(defaults.sampling, **given)
        except ValueError as error:
            raise ApiError.bad_request(str(error)) from error

    def _grammar(self) -> str:
        """The grammar, given in at most one of the four fields."""
        form, structured = self.response_format, self.structured_outputs or NO_STRUCTURE
        if self.structured_outputs and structured.json_ is None and structured.regex is None:
            raise ApiError.bad_request("json or regex is missing", "structured_outputs")
        kind = form.type if form is not None else "text"
        schema = form.json_schema.schema_ if form is not None and form.json_schema else None
        if kind == "json_schema" and schema is None:
            raise ApiError.bad_request("json_schema is missing", "response_format")
        forms: list[tuple[str, Any, Callable[[Any], str]]] = [
            ("guided_json", self.guided_json, grammar.json_schema),
            ("structured_outputs", structured.json_, grammar.json_schema),
            ("response_format", schema if kind == "json_schema" else None, grammar.json_schema),
            ("guided_regex", self.guided_regex, grammar.regex),
            ("structured_outputs", structured.regex, grammar.regex),
            ("response_format", kind == "json_object" or None, lambda _: grammar.json_object()),
        ]
        given = [each for each in forms if each[1] is not None]
        if not given:
            return ""
        param, value, write = given[0]
        if len(given) > 1:
            text = f"{param} and {given[1][0]} exclude each other: give one grammar"
            raise ApiError.bad_request(text, param)
        try:
            return write(value)
        except RequestError as error:
            raise from_request_error(error, param) from error


def shape(value: Any) -> str | None:
    """Which of the four forms a prompt has, judged by its first element; None if it has none."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


# A body of 4 MiB can hold two million ids: no call into Python for each, and stop at the first error.
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


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    prompt: Prompt = Field(description="A text, texts, token ids, or lists of token ids.")
    max_tokens: Int | None = Field(COMPLETION_TOKENS, ge=0, lt=2**31)
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Bool | None = False
    add_special_tokens: Bool = True
    return_token_ids: Bool = Field(False, description="Those of the answer, as vLLM.")
    suffix: None = None

    @property
    def wanted_tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Each as a text or as token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (tuple(self.prompt),)
        return tuple(p if isinstance(p, str) else tuple(p) for p in self.prompt)

    def params(self, defaults: Defaults) -> GenerationParams:
        """Raises ApiError or RequestError. Ids are checked with the prompt: params.check_request."""
        if self.wanted_tokens == 0 and not self.echo:
            raise ApiError.bad_request("max_tokens may be 0 only with echo", "max_tokens")
        logprobs = -1 if self.logprobs is None else self.logprobs
        params = self._params(defaults, wanted=self.wanted_tokens, logprobs=logprobs)
        return replace(params, prompt_logprobs=logprobs) if self.echo else params


class Part(IgnoreExtra):
    """A part of a message: text."""

    type: Literal["text"]
    text: Text


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class ChatMessage(IgnoreExtra):
    """One turn. Its template also sees the fields that are not checked here: reasoning_content and others
    of models to come."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Content | None = None
    name: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    _given: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, check: ModelWrapValidatorHandler["ChatMessage"]) -> "ChatMessage":
        message = check(given)
        message._given = given
        return message

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("only messages of the assistant may have no content")
        return self


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a template, as they were given, but each content is one text."""
    found = []
    for message in messages:
        turn = dict(message._given)
        if isinstance(message.content, list):
            turn["content"] = "".join(part.text for part in message.content)
        found.append(turn)
    return found


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: Messages
    max_tokens: Int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Int | None = Field(None, ge=1, lt=2**31)
    logprobs: Bool | None = False
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Any = None
    echo: Any = Field(None, description="For completions only.")

    def conversation(self) -> list[dict[str, Any]]:
        """For the template."""
        return plain_messages(self.messages)

    @property
    def wanted_tokens(self) -> int | None:
        """None: as many as fit."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template may offer."""
        return self.tools if self.tool_choice != "none" else None

    def params(self, defaults: Defaults) -> GenerationParams:
        """Raises ApiError or RequestError."""
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ApiError.bad_request(
                "max_tokens and max_completion_tokens differ: give one of them", "max_tokens"
            )
        if self.echo:
            raise ApiError.bad_request("echo is for completions only", "echo")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError.bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise ApiError.bad_request(
                "tool_choice must be none or auto: calls cannot be enforced here",
                "tool_choice",
                "unsupported",
            )
        logprobs = (self.top_logprobs or 0) if self.logprobs else -1
        wanted = defaults.context if self.wanted_tokens is None else self.wanted_tokens
        return self._params(defaults, wanted=wanted, logprobs=logprobs)


AnyRequest = CompletionRequest | ChatRequest


class TokenizeRequest(IgnoreExtra):
    """A text, or a conversation."""

    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Bool = True
    add_generation_prompt: Bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """For the template."""
        return plain_messages(self.messages or ())


class DetokenizeRequest(IgnoreExtra):
    """Token ids."""

    tokens: list[TokenId] = Field(max_length=1 << 20, fail_fast=True)
