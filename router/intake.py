"""Intake: from what a client sent to a Request the model can answer, or a refusal in words."""

from dataclasses import dataclass

from baton.errors import RequestError
from baton.kv.region import Plain
from baton.request import Limits, Request, check_request, checked_sampling
from baton.text import Tokenizer
from baton.wire.messages import Submit


@dataclass(frozen=True, slots=True)
class Served:
    """The model this router serves, as far as text and numbers go."""

    name: str
    fingerprint: str
    limits: Limits
    eos_token_ids: tuple[int, ...]
    sampling: Plain  # its own defaults


def read_submit(submit: Submit, client: str, served: Served, tokenizer: Tokenizer) -> Request:
    """Tokenize and check. Raises RequestError; nothing is clamped, nothing is dropped."""
    if (submit.prompt is None) == (submit.token_ids is None):
        raise RequestError("give either a prompt or token ids, not both and not neither")
    if submit.prompt is not None:
        fewest = len(submit.prompt) // tokenizer.longest_token
        if fewest > served.limits.context:
            raise RequestError(
                f"the prompt has {len(submit.prompt):,} characters, at least {fewest:,} tokens, but the "
                f"context is {served.limits.context:,}; shorten it",
                code="context_length_exceeded",
            )
        prompt_ids = tuple(tokenizer.encode(_encodable(submit.prompt)))
    else:
        prompt_ids = submit.token_ids or ()
    eos = () if submit.ignore_eos else served.eos_token_ids
    request = Request(
        id=submit.request,
        client=client,
        prompt_ids=prompt_ids,
        max_new_tokens=submit.max_new_tokens,
        sampling=checked_sampling(submit.sampling, served.sampling),
        stop=submit.stop,
        stop_ids=tuple(dict.fromkeys((*eos, *submit.stop_token_ids))),
        cache_salt=submit.cache_salt,
        include_stop=submit.include_stop,
        keep_special=submit.keep_special,
        min_tokens=submit.min_tokens,
        logprobs=submit.logprobs,
        prompt_logprobs=submit.prompt_logprobs,
        grammar=submit.grammar,
        tell_every_s=submit.tell_every_s,
    )
    check_request(request, served.limits)
    return request


def _encodable(prompt: str) -> str:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt holds half a surrogate pair at character {error.start}: it is not Unicode text"
        ) from error
    return prompt
