"""GenerationParams: how to continue one prompt. Built once, checked once, carried unchanged.

    HTTP schema or command line -> GenerationParams -> Submit -> ledger entry -> Start -> decode run

Rules for every model are checked when a GenerationParams is built, also when one arrives in a message.
check_request() checks rules of the served model. A new field is added here, in
baton/server/schema.py, and where it takes effect. It changes the messages, so PROTOCOL
(baton/wire/messages.py) goes up by one, once for each release.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

from baton.adapters.identity import Adapter, unknown
from baton.bounds import INT_MAX, Content, Ids, Line, OptionalName, Range, Size
from baton.errors import RequestError
from sampler.params import SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_STREAM_INTERVAL_S = 1.0
NOT_STREAMED_S = 0.5
"""The stream_interval_s of answers that are not streamed."""

Whole = Annotated[int, Range(-INT_MAX, INT_MAX)]
"""Wider than the rule below, which says what is wrong in the words of its field."""


POOLINGS = ("mean", "last")
"""How the last hidden states of a prompt's tokens become one: their mean, or the last token's."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model allows."""

    context: int  # tokens, prompt and generation together
    vocabulary: int
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Raises RequestError with the field, the rule and the value."""

    max_new_tokens: Whole
    sampling: SamplingParams | None = None  # None: the model's own defaults
    stop: Annotated[tuple[Line, ...], Size(0, 256)] = ()
    stop_token_ids: Ids = ()
    ignore_eos: bool = False
    min_tokens: Whole = 0  # no stop string, stop token or EOS ends the answer before
    include_stop: bool = False  # the text includes the stop string or token
    keep_special: bool = False  # the text includes special tokens
    shown_special: Ids = ()  # those that it includes all the same
    logprobs: Annotated[
        int, Range(-1, INT_MAX)
    ] = -1  # of each token, with as many alternatives; -1: none
    prompt_logprobs: Whole = -1  # the same of the prompt's tokens
    grammar: Content = ""  # a spec of baton/grammar.py; empty: none
    cache_salt: Line = ""  # only requests of equal salt share cached KV
    adapter: OptionalName = (
        ""  # digest of the adapter that is applied (baton/adapters/); empty: none
    )
    stream_interval_s: Annotated[float, Range(-1e7, 1e7)] = (
        0.0  # longest delay before tokens are sent to the client
    )

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(
                f"at most {MAX_STOP_IDS} stop token ids, got {len(self.stop_token_ids)}"
            )
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise RequestError(
                f"min_tokens must be 0 to max_new_tokens ({self.max_new_tokens}), got "
                f"{self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if not -1 <= (value := getattr(self, name)) <= MAX_LOGPROBS:
                raise RequestError(f"{name} must be -1 (none) to {MAX_LOGPROBS}, got {value}")
        if not 0 <= self.stream_interval_s <= MAX_STREAM_INTERVAL_S:
            raise RequestError(
                f"stream_interval_s must be 0 (at once) to {MAX_STREAM_INTERVAL_S:g}, got "
                f"{self.stream_interval_s}"
            )
        if self.grammar and self.sampling is not None and self.sampling.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids and a grammar may exclude each other: give one of them"
            )
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"at most {MAX_STOPS} stop strings, got {len(self.stop)}")
        if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop):
            raise RequestError(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
        for name, text in (*(("stop", each) for each in self.stop), ("cache_salt", self.cache_salt),
                           ("grammar", self.grammar)):  # fmt: skip
            check_unicode(text, name, param=name)

    def stopping_at(self, ends: tuple[int, ...]) -> "GenerationParams":
        """Stop at these end ids, too, unless ends are ignored."""
        if self.ignore_eos or not ends:
            return self
        return replace(self, stop_token_ids=tuple(dict.fromkeys((*self.stop_token_ids, *ends))))

    def resolved(
        self, default: SamplingParams, eos_token_ids: tuple[int, ...]
    ) -> "GenerationParams":
        """Complete with the model's defaults: its sampling if none is given, and its EOS ids among
        `stop_token_ids`. With stop strings tokens are not delayed: only the router finds the string, and
        each step until then is wasted."""
        eos = () if self.ignore_eos else eos_token_ids
        return replace(
            self,
            sampling=self.sampling or default,
            stop_token_ids=tuple(dict.fromkeys((*eos, *self.stop_token_ids))),
            stream_interval_s=0.0 if self.stop else self.stream_interval_s,
        )


def check_unicode(text: str, what: str, *, param: str = "prompt") -> None:
    """RequestError if `text`, which the message calls `what`, cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds half a surrogate pair at character {error.start}: it is not Unicode text",
            param=param,
        ) from error


def check_request(prompt_ids: tuple[int, ...], params: GenerationParams, limits: Limits) -> None:
    """RequestError if the model cannot answer this, with the value, the limit and what to change.
    `params` should be resolved(), so that EOS ids are among the stop tokens."""
    prompt, wanted = len(prompt_ids), params.max_new_tokens
    if not prompt:
        raise RequestError("the prompt is empty: it must have at least one token", param="prompt")
    if prompt + wanted > limits.context:
        raise RequestError(
            f"the prompt has {prompt:,} tokens and {wanted:,} new ones are asked for, but the "
            f"context is {limits.context:,}; shorten one of them by {prompt + wanted - limits.context:,}",
            code="context_length_exceeded",
            param="max_tokens",
        )
    if why := unknown(params.adapter, limits.adapters):
        raise RequestError(f"the model is not served: {why}", code="model_not_found", param="model")
    check_ids(prompt_ids, limits.vocabulary)
    check_ids(params.stop_token_ids, limits.vocabulary, "stop token id", "stop_token_ids")
    if params.sampling is None:
        return
    biased = (token_id for token_id, _ in params.sampling.logit_bias)
    check_ids(biased, limits.vocabulary, "logit_bias id", "logit_bias")
    allowed = params.sampling.allowed_token_ids
    if allowed is None:
        return
    check_ids(allowed, limits.vocabulary, "allowed token id", "allowed_token_ids")
    if params.min_tokens and set(allowed) <= set(params.stop_token_ids):
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but every allowed token id ends the answer: allow "
            "another one, or leave min_tokens out"
        )


def check_ids(
    ids: Iterable[int], vocabulary: int, what: str = "token id", param: str = "prompt"
) -> None:
    """Raises RequestError with the first id outside the vocabulary."""
    if isinstance(ids, tuple) and ids and min(ids) >= 0 and max(ids) < vocabulary:
        return  # prompts are long: without a step of Python for each
    bad = next((each for each in ids if not 0 <= each < vocabulary), None)
    if bad is not None:
        text = f"{what} {bad} is outside the vocabulary of {vocabulary:,}"
        raise RequestError(text, param=param)
