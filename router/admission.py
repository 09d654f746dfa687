"""Admission: a Submit becomes a ledger entry that the model can answer, or is refused with a reason."""

from dataclasses import dataclass

from baton.errors import RequestError
from baton.params import Limits, check_request
from baton.text import TextStream, Tokenizer
from baton.wire.messages import Submit
from router.ledger import Entry
from sampler.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Served:
    """What the router knows of the served model."""

    name: str
    fingerprint: str
    limits: Limits
    eos_token_ids: tuple[int, ...]
    sampling: SamplingParams  # defaults


def admit(submit: Submit, client: str, served: Served, tokenizer: Tokenizer) -> Entry:
    """Tokenize and check. Raises RequestError; no value is changed silently."""
    prompt_ids = submit.prompt
    if isinstance(prompt_ids, str):
        prompt_ids = _encoded(prompt_ids, served.limits, tokenizer)
    params = submit.params.resolved(served.sampling, served.eos_token_ids)
    check_request(prompt_ids, params, served.limits)
    text = TextStream(
        tokenizer,
        prompt_ids,
        params.stop,
        include_stop=params.include_stop,
        keep_special=params.keep_special,
        min_tokens=params.min_tokens,
    )
    return Entry(submit.request, client, prompt_ids, params, text)


def _encoded(prompt: str, limits: Limits, tokenizer: Tokenizer) -> tuple[int, ...]:
    fewest = len(prompt) // tokenizer.longest_token
    if fewest > limits.context:
        raise RequestError(
            f"the prompt has {len(prompt):,} characters, at least {fewest:,} tokens, but the "
            f"context is {limits.context:,}; shorten it",
            code="context_length_exceeded",
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt holds half a surrogate pair at character {error.start}: it is not Unicode text"
        ) from error
    return tuple(tokenizer.encode(prompt))
