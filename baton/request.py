"""Request: what a client asked for, checked against the model that is to answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from baton.errors import RequestError
from baton.kv.region import Plain
from sampler.params import SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_TELL_S = 1.0
UNWATCHED_S = 0.5
"""How long tokens may wait to be told (Submit.tell_every_s) where nobody watches them come."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model allows."""

    context: int  # tokens, prompt and generation together
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was, by the model's own logits (before penalties, bias and temperature), and
    which were the likeliest, likeliest first."""

    value: float
    top_ids: tuple[int, ...] = ()
    top_values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. Never changes; what happens to it is the ledger's."""

    id: str
    client: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Plain
    stop: tuple[str, ...]
    stop_ids: tuple[
        int, ...
    ]  # tokens that end it: the model's EOS unless ignored, and the client's
    cache_salt: str = ""
    include_stop: bool = False  # what ended it belongs to the text
    keep_special: bool = False  # special tokens have text too
    min_tokens: int = 0
    logprobs: int = -1  # of each token, and so many of the likeliest; -1: none
    prompt_logprobs: int = -1
    grammar: str = ""  # a spec of baton/grammar.py; empty: anything goes
    tell_every_s: float = 0.0  # its tokens may wait so long to be told with later ones


def check_request(request: Request, limits: Limits) -> None:
    """Raise RequestError if the model cannot answer this; says the value, the limit, the way out."""
    prompt, wanted = len(request.prompt_ids), request.max_new_tokens
    if not prompt:
        raise RequestError("the prompt is empty: it must have at least one token")
    if wanted < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {wanted}")
    if prompt + wanted > limits.context:
        raise RequestError(
            f"the prompt has {prompt:,} tokens and {wanted:,} new ones are asked for, but the "
            f"context is {limits.context:,}; shorten one of them by {prompt + wanted - limits.context:,}",
            code="context_length_exceeded",
        )
    check_ids(request.prompt_ids, limits.vocabulary)
    check_ids(request.stop_ids, limits.vocabulary, "stop token id")
    if len(request.stop_ids) > MAX_STOP_IDS:
        raise RequestError(f"at most {MAX_STOP_IDS} stop token ids, got {len(request.stop_ids)}")
    if not 0 <= request.min_tokens <= wanted:
        raise RequestError(
            f"min_tokens must be 0 to max_new_tokens ({wanted}), got {request.min_tokens}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if not -1 <= getattr(request, name) <= MAX_LOGPROBS:
            raise RequestError(
                f"{name} must be -1 (none) to {MAX_LOGPROBS}, got {getattr(request, name)}"
            )
    if not 0 <= request.tell_every_s <= MAX_TELL_S:
        raise RequestError(
            f"tell_every_s must be 0 (at once) to {MAX_TELL_S:g}, got {request.tell_every_s}"
        )
    if request.sampling.get("allowed_token_ids"):
        _check_allowed(request, limits)
    if len(request.stop) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop strings, got {len(request.stop)}")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in request.stop):
        raise RequestError(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters")


def _check_allowed(request: Request, limits: Limits) -> None:
    """Something must be left to draw at every step."""
    allowed = SamplingParams.from_wire(request.sampling).allowed_token_ids or ()
    check_ids(allowed, limits.vocabulary, "allowed token id")
    if request.grammar:
        raise RequestError(
            "allowed_token_ids and a grammar may exclude each other: give one of them"
        )
    if request.min_tokens and set(allowed) <= set(request.stop_ids):
        raise RequestError(
            f"min_tokens is {request.min_tokens}, but every allowed token id ends the answer: allow "
            "another one, or leave min_tokens out"
        )


def check_ids(ids: Iterable[int], vocabulary: int, what: str = "token id") -> None:
    """RequestError naming the first id that is no token's."""
    if isinstance(ids, tuple) and ids and min(ids) >= 0 and max(ids) < vocabulary:
        return  # prompts are long: without a step of Python for each
    bad = next((each for each in ids if not 0 <= each < vocabulary), None)
    if bad is not None:
        raise RequestError(f"{what} {bad} is outside the vocabulary of {vocabulary:,}")


def checked_sampling(wanted: Mapping[str, object] | None, default: Plain) -> Plain:
    """The sampling parameters in wire form, or RequestError naming the one that is wrong."""
    if wanted is None:
        return default
    try:
        return SamplingParams.from_wire(wanted).to_wire()
    except ValueError as error:
        raise RequestError(str(error)) from error
