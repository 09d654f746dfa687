"""Schema: the requests that HTTP clients send, field by field, and the GenerationParams made of them.

OpenAI's fields with vLLM's extras. Known fields are checked strictly (fields.py), unknown ones are
ignored, because clients send fields of other servers. Conversations are in conversation.py, grammars in
structured.py. https://platform.openai.com/docs/api-reference
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from baton.params import (
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
    GenerationParams,
)
from baton.server.api_error import SHOWN, ApiError
from baton.server.conversation import ConversationFields, Messages
from baton.server.fields import GENERATION, TOKENIZE, Fields, Refusals, at_most
from baton.server.structured import StructuredFields
from baton.server.tools import ToolUse, tool_use
from sampler.params import MOST_ALLOWED, MOST_BIASES, RULES, SamplingParams

MAX_N = 16
MAX_PROMPTS = 256
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
Biases = Annotated[dict[str, Number], Field(max_length=MOST_BIASES), at_most(MOST_BIASES, "ids")]


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: Bool = False
    continuous_usage_stats: Bool = Field(
        False, description="With include_usage: in every chunk, that of its choice."
    )

    @property
    def in_every_chunk(self) -> bool:
        return self.include_usage and self.continuous_usage_stats


class GenerationRequest(StructuredFields):
    """Fields that completions and chat share."""

    unsupported: ClassVar[Refusals] = GENERATION

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
    allowed_token_ids: list[TokenId] | None = Field(
        None, min_length=1, max_length=MOST_ALLOWED, description="Only these may be sampled."
    )
    best_of: Int | None = Field(None, description="Must equal n.")
    return_token_ids: Bool = Field(False, description="Those of the prompt and of the answer.")
    return_tokens_as_token_ids: Bool = Field(
        False, description="In logprobs, token_id:ID instead of a token's text."
    )
    request_id: Annotated[Text, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    cache_salt: Text | None = Field(None, max_length=256)
    priority: Int = Field(
        0, ge=-(2**31), lt=2**31, description="Lower goes first, among those of one key or address."
    )
    role_policy: Literal["split", "colocated", "adaptive"] | None = Field(
        None,
        description="Who fills the prompt: prefill workers, decode workers, or whoever is better.",
    )
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
            grammar=self.grammar_field()[1],
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
    suffix: None = None

    @property
    def wanted_tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens

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


class ChatRequest(ConversationFields, GenerationRequest):
    """/v1/chat/completions."""

    messages: Messages
    max_tokens: Int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Int | None = Field(None, ge=1, lt=2**31)
    logprobs: Bool | None = False
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    parallel_tool_calls: Bool = Field(True, description="May an answer call several tools?")
    include_reasoning: Bool = Field(True, description="Of models that reason before they answer.")
    echo: Any = Field(None, description="For completions only.")

    @property
    def wanted_tokens(self) -> int | None:
        """None: as many as fit."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """The tools that may be called; None if there are none. Raises ApiError."""
        return tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    def params(self, defaults: Defaults) -> GenerationParams:
        """Raises ApiError or RequestError."""
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ApiError.bad_request(
                "max_tokens and max_completion_tokens differ: give one of them", "max_tokens"
            )
        if self.echo:
            raise ApiError.bad_request("echo is for completions only", "echo")
        if self.top_logprobs and not self.logprobs:
            raise ApiError.bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.tool_use is not None and self.allowed_token_ids is not None:
            text = (
                "allowed_token_ids and tools may exclude each other: give one, or tool_choice none"
            )
            raise ApiError.bad_request(text, "allowed_token_ids")
        logprobs = (self.top_logprobs or 0) if self.logprobs else -1
        wanted = defaults.context if self.wanted_tokens is None else self.wanted_tokens
        return self._params(defaults, wanted=wanted, logprobs=logprobs)


AnyRequest = CompletionRequest | ChatRequest


class TokenizeRequest(ConversationFields):
    """A text, or a conversation."""

    unsupported: ClassVar[Refusals] = TOKENIZE

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    prompt: Text | None = None
    return_token_strs: Bool = Field(False, description="The tokens as the vocabulary has them.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        return self


class DetokenizeRequest(Fields):
    """Token ids."""

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    tokens: list[TokenId] = Field(max_length=1 << 20, fail_fast=True)
