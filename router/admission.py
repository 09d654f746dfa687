"""Admission: a Submit becomes a ledger entry that the model can answer, or is refused with a reason."""

from dataclasses import dataclass

from baton.params import Limits, check_request
from baton.text import TextStream, Tokenizer, encode_prompt
from baton.wire.messages import Submit
from router.ledger import Entry
from sampler.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Served:
    """Properties of the served model that the router needs."""

    name: str
    fingerprint: str
    limits: Limits
    eos_token_ids: tuple[int, ...]
    sampling: SamplingParams  # defaults


def admit(submit: Submit, client: str, served: Served, tokenizer: Tokenizer) -> Entry:
    """Tokenize and check. Raises RequestError; no value is changed silently."""
    prompt_ids = submit.prompt
    if isinstance(prompt_ids, str):
        prompt_ids = encode_prompt(tokenizer, prompt_ids, served.limits.context)
    params = submit.params.resolved(served.sampling, served.eos_token_ids)
    check_request(prompt_ids, params, served.limits)
    text = TextStream(tokenizer, prompt_ids, params)
    return Entry(submit.request, client, prompt_ids, params, text)
