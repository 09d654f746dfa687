"""Desk: what the routes share: the line to the router, the model's text, and how a request is answered.

One HTTP request becomes one Job (job.py).
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from baton.client.aio import RouterClient
from baton.errors import RequestError
from baton.grammar import Grammars
from baton.model_files import ModelFiles
from baton.params import NOT_STREAMED_S, GenerationParams
from baton.server.choices import Tokens
from baton.server.faults import Fault, from_request_error
from baton.server.job import Job
from baton.server.protocol import Generation
from baton.server.settings import ServerSettings
from baton.text import Tokenizer
from baton.wire.messages import Submit
from sampler.params import SamplingParams

LONG_TEXT = 20_000  # characters; longer ones are tokenized off the loop
RETRY_S = 2
ROUTER_S = 3.0
OWN_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Desk:
    """Everything behind the routes."""

    def __init__(self, settings: ServerSettings, files: ModelFiles, line: RouterClient) -> None:
        self.settings = settings
        self.files = files
        self.line = line
        self.names = settings.served_names or (files.name,)
        self.tokenizer = Tokenizer(files.tokenizer_file)
        self.tokens = Tokens(self.tokenizer)
        self.grammars = Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
        self.started = int(time.time())
        self.draining = False
        self._was_ready = False  # what comes after may wait for workers that are on their way
        given = files.generation_config
        self._defaults = SamplingParams(
            **{k: given[k] for k in OWN_DEFAULTS if given.get(k) is not None}
        )

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        info = self.line.info
        return info.context if info else self.files.max_positions

    # ---- is it there, does it fit

    def why_not_ready(self) -> str:
        """What stands between a request and its answer, in words; empty if nothing."""
        info = self.line.info
        if self.draining:
            return "the server is shutting down"
        if info is None:
            return "no router answers"
        if info.fingerprint != self.files.fingerprint:
            return f"the cluster serves another model: {info.model}, not {self.files.name}"
        return "" if info.ready else f"the cluster is not ready: {info.waiting_for}"

    def look(self) -> None:
        """Called now and then."""
        info = self.line.info
        self._was_ready = self._was_ready or (info is not None and info.ready)

    async def admit(self, model: str | None, requests: int) -> None:
        """Raises Fault if this cannot be taken now, or never. A router that is being started again
        is waited for, for a moment."""
        if model is not None and model not in self.names:
            raise Fault.unknown_model(model, self.names)
        if self.draining:
            raise Fault.not_ready("the server is shutting down", RETRY_S)
        info = await self.line.answered(ROUTER_S)
        self.look()
        if info is None or info.fingerprint != self.files.fingerprint or not self._was_ready:
            raise Fault.not_ready(self.why_not_ready(), RETRY_S)
        limit, waiting = self.settings.max_queued, self.line.waiting
        if waiting + requests > max(limit, requests if not waiting else 0):
            raise Fault.overloaded(waiting, limit, RETRY_S)

    # ---- text

    async def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Token ids. Raises Fault for what cannot be a prompt of this model."""
        fewest = len(text) // self.tokenizer.longest_token
        if fewest > self.context:
            raise Fault.too_long(
                f"the prompt has {len(text):,} characters, at least {fewest:,} tokens, but this "
                f"model's context is {self.context:,}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Fault.bad_request(
                f"the prompt holds half a surrogate pair at character {error.start}", "prompt"
            ) from error
        if len(text) < LONG_TEXT:
            return tuple(self.tokenizer.encode(text, special=special))
        ids = await asyncio.to_thread(self.tokenizer.encode, text, special=special)
        return tuple(ids)

    def length(self, wanted: int | None, prompt: Sequence[int]) -> int:
        """New tokens: as asked for, or all that fit. Raises Fault."""
        left = self.context - len(prompt)
        if wanted is None and left >= 1:
            return left
        if (wanted or 1) > left:
            raise Fault.too_long(
                f"the prompt has {len(prompt):,} tokens and max_tokens is {wanted or 1:,}, but this "
                f"model's context is {self.context:,}"
            )
        return wanted or 1

    async def check_grammar(self, grammar: str) -> None:
        """Raises Fault if it cannot be compiled."""
        if grammar:
            try:
                await asyncio.to_thread(self.grammars.check, grammar)
            except RequestError as error:
                raise from_request_error(error, "response_format") from error

    def sampling(self, generation: Generation, choice: int, seed: int) -> SamplingParams:
        """What was asked for over the model's own."""
        try:
            return replace(self._defaults, **generation.sampling, seed=seed, choice=choice)
        except ValueError as error:
            raise Fault.bad_request(str(error)) from error

    # ---- answering

    async def begin(
        self,
        generation: Generation,
        prompts: Sequence[tuple[int, ...]],
        name: str,
        echoes: Sequence[str],
        *,
        streams: bool,
    ) -> Job:
        """Send it all, and wait until the router has taken it. Raises Fault. `streams`: somebody
        watches the tokens come."""
        await self.check_grammar(generation.grammar)
        seed = secrets.randbits(63) if generation.seed is None else generation.seed
        submits = []
        for at, prompt in enumerate(prompts):
            length = self.length(generation.max_tokens, prompt)
            for choice in range(generation.n):
                params = GenerationParams(
                    max_new_tokens=length,
                    sampling=self.sampling(generation, choice, seed),
                    stop=generation.stop,
                    stop_token_ids=generation.stop_token_ids,
                    ignore_eos=generation.ignore_eos,
                    min_tokens=min(generation.min_tokens, length),
                    include_stop=generation.include_stop,
                    keep_special=not generation.skip_special_tokens,
                    logprobs=generation.logprobs,
                    prompt_logprobs=generation.prompt_logprobs,
                    grammar=generation.grammar,
                    cache_salt=generation.cache_salt,
                    stream_interval_s=self.settings.stream_interval_s
                    if streams
                    else NOT_STREAMED_S,
                )
                submits.append(Submit(f"{name}-{at * generation.n + choice}", prompt, params))
        job = Job(
            self.line,
            prompts,
            submits,
            silent=generation.max_tokens == 0,
        )
        for each in job.choices:
            each.echo = echoes[each.index // generation.n]
        try:
            await job.accepted()
        except BaseException:
            job.close()
            raise
        return job
