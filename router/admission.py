"""Admission: a Submit becomes a ledger entry that the model can answer, or is refused with a reason."""

from dataclasses import dataclass

from baton.errors import RequestError
from baton.model_files import ModelFiles
from baton.params import POOLINGS, Limits, check_request
from baton.rope import FIXED, RopeRule
from baton.text import TextStream, Tokenizer, encode_prompt
from baton.wire.messages import Submit
from router.ledger import Entry
from router.role_policy import asked_for
from sampler.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Served:
    """Properties of the served model that the router needs."""

    name: str
    fingerprint: str
    limits: Limits
    eos_token_ids: tuple[int, ...]
    sampling: SamplingParams  # defaults
    rope: RopeRule = FIXED

    @classmethod
    def of(cls, files: ModelFiles, max_model_len: int | None) -> "Served":
        """The model of these files, with its context cut to `max_model_len` tokens."""
        return cls(
            name=files.name,
            fingerprint=files.fingerprint,
            limits=Limits(files.context(max_model_len), files.vocab_size, files.adapters),
            eos_token_ids=files.eos_token_ids,
            sampling=SamplingParams.from_generation_config(files.generation_config),
            rope=files.rope,
        )


def admit(submit: Submit, client: str, served: Served, tokenizer: Tokenizer) -> Entry:
    """Tokenize and check. Raises RequestError; no value is changed silently."""
    if submit.pooling not in ("", *POOLINGS):
        raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
    prompt_ids = submit.prompt
    if isinstance(prompt_ids, str):
        prompt_ids = encode_prompt(tokenizer, prompt_ids, served.limits.context)
    params = submit.params.resolved(served.sampling, served.eos_token_ids)
    check_request(prompt_ids, params, served.limits)
    text = TextStream(tokenizer, prompt_ids, params)
    return Entry(
        submit.request,
        client,
        prompt_ids,
        params,
        text,
        pooling=submit.pooling,
        tenant=submit.tenant,
        group=submit.group,
        priority=submit.priority,
        queue_timeout_s=submit.queue_timeout_s,
        timeout_s=submit.timeout_s,
        role_policy=asked_for(submit.role_policy),
    )
