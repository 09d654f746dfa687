"""Request: what a client asked for, checked against the model that is to answer."""

from collections.abc import Mapping
from dataclasses import dataclass

from baton.errors import RequestError
from baton.kv.region import Plain
from sampler.params import SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model allows."""

    context: int  # tokens, prompt and generation together
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. Never changes; what happens to it is the ledger's."""

    id: str
    client: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Plain
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    cache_salt: str = ""


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
    bad = next((t for t in request.prompt_ids if not 0 <= t < limits.vocabulary), None)
    if bad is not None:
        raise RequestError(f"token id {bad} is outside the vocabulary of {limits.vocabulary:,}")
    if len(request.stop) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop strings, got {len(request.stop)}")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in request.stop):
        raise RequestError(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters")


def checked_sampling(wanted: Mapping[str, object] | None, default: Plain) -> Plain:
    """The sampling parameters in wire form, or RequestError naming the one that is wrong."""
    if wanted is None:
        return default
    try:
        return SamplingParams.from_wire(wanted).to_wire()
    except ValueError as error:
        raise RequestError(str(error)) from error
