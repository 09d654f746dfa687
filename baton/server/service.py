"""Service: checks and tokenizes requests, and sends them to the router. All routes share it.

CompletionRequest | ChatRequest  -> prepare -> PreparedRequest -> begin -> GenerationStream
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, TypeVar

from baton import failpoint
from baton.client.aio import RouterClient
from baton.clock import monotonic
from baton.errors import RequestError
from baton.grammar import Grammars
from baton.model_files import ModelFiles
from baton.params import NOT_STREAMED_S, GenerationParams, Limits, check_ids, check_request
from baton.server.admission import RETRY_S, Admission, Ticket
from baton.server.api_error import ApiError, from_request_error
from baton.server.bodies import model
from baton.server.metrics import Metrics
from baton.server.options import ServerSettings
from baton.server.quotas import Quotas
from baton.server.schema import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    Defaults,
    DetokenizeRequest,
    TokenizeRequest,
)
from baton.server.shapes import ChatShape, CompletionShape, Extras, Shape
from baton.server.speech import begins, is_open
from baton.server.stream import Deadlines, GenerationStream, PreparedRequest
from baton.server.templates import Renderer
from baton.server.turns import text_of
from baton.text import Tokenizer, chat_ends, encode_prompt
from sampler.params import SamplingParams

LONG_TEXT = 20_000  # characters; longer ones are tokenized in a thread
MANY_TOKENS = 20_000  # of all prompts; more are checked in one
USUAL_ANSWER = 512
"""Tokens of an answer that are charged first; few are as long as they may be."""
ROUTER_S = 3.0
RESTART_S = 15.0
"""A cluster that was ready so shortly ago restarts a worker, and requests wait. Else it is down: 503."""
OWN_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NO_TEMPLATE = (
    "this model has no chat template, so it cannot chat: use /v1/completions, or start the server "
    "with --chat-template FILE"
)

Result = TypeVar("Result")


class GenerationService:
    """One model behind HTTP. `renderer`: None for a model without a chat template."""

    def __init__(
        self,
        settings: ServerSettings,
        files: ModelFiles,
        router: RouterClient,
        renderer: Renderer | None,
    ) -> None:
        self.settings = settings
        self.files = files
        self.router = router
        self.names = settings.served_names or (files.name,)
        self.tokenizer = Tokenizer(files.tokenizer_file)
        self._chat_ends = chat_ends(self.tokenizer, files.eos_token_ids, files.vocab_size)
        self.started = int(time.time())
        self.draining = False
        self._renderer = renderer
        self._grammars = Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
        self.admission = Admission(settings.max_queued)
        self.metrics: Metrics | None = None  # what it tells of its requests
        self._quotas = Quotas(requests=settings.requests_per_key, tokens=settings.tokens_per_key)
        self._ready_at = -inf  # later requests may wait for workers that restart
        given = files.generation_config
        self._sampling = SamplingParams(
            **{k: given[k] for k in OWN_DEFAULTS if given.get(k) is not None}
        )

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        info = self.router.info
        return info.context if info else self.files.max_positions

    @property
    def chats(self) -> bool:
        """Does the model have a chat template?"""
        return self._renderer is not None

    # ---- readiness

    def why_not_ready(self) -> str:
        """Why requests cannot be answered now; empty if they can."""
        info = self.router.info
        if self.draining:
            return "the server is shutting down"
        if info is None:
            return "no router answers"
        if info.fingerprint != self.files.fingerprint:
            return f"the cluster serves another model: {info.model}, not {self.files.name}"
        return "" if info.ready else f"the cluster is not ready: {info.waiting_for}"

    def look(self) -> None:
        """Called periodically, to notice until when the cluster was ready."""
        if self.router.info is not None and self.router.info.ready:
            self._ready_at = monotonic()

    async def _admit(self, model: str | None, tenant: str, choices: int) -> Ticket:
        """Places for so many choices. Raises ApiError for an unknown model, a full queue, and a cluster
        that is not ready. Waits up to ROUTER_S for a router that restarts. Workers that restart get the
        request as soon as they are ready, if they were a short time ago."""
        self._check_model(model)
        if self.draining:
            raise ApiError.not_ready("the server is shutting down", RETRY_S)
        info = await self.router.answered(ROUTER_S)
        self.look()
        ours = info is not None and info.fingerprint == self.files.fingerprint
        if not ours or monotonic() > self._ready_at + RESTART_S:
            raise ApiError.not_ready(self.why_not_ready(), RETRY_S)
        return self.admission.take(tenant, choices)

    # ---- requests

    async def prepare(
        self, request: AnyRequest, *, tenant: str = "", request_id: str = "", stream: bool
    ) -> PreparedRequest:
        """Check and tokenize. `tenant`: who asks, for fair shares. `stream`: the client reads tokens as
        they are generated. Raises ApiError or RequestError if the request is invalid, or cannot be
        answered now. Its places are free again when its GenerationStream is closed."""
        deadlines = self._deadlines(request)
        interval = self.settings.stream_interval_ms / 1e3 if stream else NOT_STREAMED_S
        defaults = Defaults(self._sampling, self.context, secrets.randbits(63), interval)
        params = await _in_thread(request.has_long_grammar, request.params, defaults)
        if isinstance(request, ChatRequest):
            params = params.stopping_at(self._chat_ends)
        texts = 1 if isinstance(request, ChatRequest) else len(request.prompts)
        choices = texts * (request.n or 1)
        place = self._quotas.take(tenant, monotonic())
        place.charge(choices * min(params.max_new_tokens, USUAL_ANSWER), monotonic())
        try:
            ticket = await self._admit(request.model, tenant, choices)
            try:
                found = await self._prepared(
                    request, params, _name(request, request_id), ticket, deadlines
                )
                place.charge(sum(map(len, found.prompts)), monotonic())
                return replace(found, place=place)
            except BaseException:
                ticket.close()
                raise
        except BaseException:
            place.close(0, monotonic())
            raise

    async def _prepared(
        self,
        request: AnyRequest,
        params: GenerationParams,
        name: str,
        ticket: Ticket,
        deadlines: Deadlines,
    ) -> PreparedRequest:
        special, thinking = request.adds_special_tokens, None
        if isinstance(request, ChatRequest):
            text = await self._rendered(request)
            prompts = [await self._encode(text, special=special)]
            if not prompts[0]:
                raise ApiError.bad_request("the conversation is empty", "messages")
            thinking = None if params.grammar else self._begins_thinking(request, text)
        else:
            prompts = [
                await self._encode(each, special=special) if isinstance(each, str) else each
                for each in request.prompts
            ]
        if params.grammar:
            try:
                await asyncio.to_thread(self._grammars.check, params.grammar)
            except RequestError as error:
                raise from_request_error(error, request.grammar_param) from error
        each_params = await _in_thread(
            sum(map(len, prompts)) > MANY_TOKENS, self._params, request, params, prompts
        )
        options = request.stream_options
        return PreparedRequest(
            name=name,
            prompts=tuple(prompts),
            params=tuple(each_params),
            n=request.n or 1,
            shape=self._shape(request, name, params, thinking),
            ticket=ticket,
            priority=request.priority,
            deadlines=deadlines,
            echoes=self._echoes(request),
            include_usage=options is not None and options.include_usage,
            prompt_only=request.wanted_tokens == 0,
        )

    def _params(
        self, request: AnyRequest, params: GenerationParams, prompts: Sequence[tuple[int, ...]]
    ) -> list[GenerationParams]:
        """Those of each prompt, checked with it. Raises RequestError."""
        limits = Limits(self.context, self.files.vocab_size)
        found: list[GenerationParams] = []
        for prompt in prompts:
            own = params
            if request.wanted_tokens is None:  # all that fit
                left = max(self.context - len(prompt), 1)
                own = replace(own, max_new_tokens=left, min_tokens=min(own.min_tokens, left))
            check_request(prompt, own, limits)
            found.append(own)
        return found

    def _deadlines(self, request: AnyRequest) -> Deadlines:
        most = self.settings.request_timeout_s
        wanted = most if request.timeout is None else request.timeout
        if most and wanted > most:
            text = f"timeout must be at most {most:g} s (--request-timeout), got {wanted:g}"
            raise ApiError.bad_request(text, "timeout")
        return Deadlines(timeout_s=wanted, queue_timeout_s=self.settings.queue_timeout_s)

    async def prepare_json(
        self, payload: Mapping[str, Any], *, tenant: str, size: int
    ) -> PreparedRequest:
        """prepare() for a streamed request, a JSON object of `size` bytes: a chat if it has messages."""
        kind = ChatRequest if "messages" in payload else CompletionRequest
        request: AnyRequest = await model(kind, payload, size=size)
        return await self.prepare(request, tenant=tenant, stream=True)

    async def begin(self, request: PreparedRequest) -> GenerationStream:
        """Send it, and wait until the router has accepted it. Raises ApiError."""
        stream = GenerationStream(self.router, request)
        try:
            failpoint.hit("server.accepted")
            stream.start()
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        if self.metrics is not None:
            self.metrics.asked(request.n, stream.allowed)
            stream.when_closed = self.metrics.answered
        return stream

    def _begins_thinking(self, request: ChatRequest, prompt: str) -> bool | None:
        """Does the answer begin within the model's reasoning? None: it has none that is told apart."""
        if self.settings.reasoning == "off" or not (self._renderer and self._renderer.reasons):
            return None
        if not request.continue_final_message:
            return begins(prompt)
        last = (request.messages or [])[-1]
        return last.role == "assistant" and is_open(text_of(last.turn), prompt)

    def _shape(
        self, request: AnyRequest, name: str, params: GenerationParams, thinking: bool | None
    ) -> Shape:
        head = {"id": name, "created": int(time.time()), "model": request.model or self.names[0]}
        chat, options = isinstance(request, ChatRequest), request.stream_options
        silent = frozenset() if params.keep_special else self.tokenizer.special_ids
        if not params.include_stop:
            silent = silent.union(
                params.resolved(self._sampling, self.files.eos_token_ids).stop_token_ids
            )
        extras = Extras(
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            silent=frozenset(silent),
            tokens_as_ids=request.return_tokens_as_token_ids,
            token_ids=request.return_token_ids,
            continuous_usage=options is not None and options.in_every_chunk,
            thinking=thinking,
            shows_reasoning=not isinstance(request, ChatRequest) or request.include_reasoning,
        )
        return (ChatShape if chat else CompletionShape)(head, self.tokenizer, extras)

    # ---- text

    async def tokenized(self, request: TokenizeRequest) -> tuple[int, ...]:
        """Token ids of a text or of a conversation."""
        self._check_model(request.model)
        if request.messages is not None:
            text = await self._rendered(request)
        else:
            text = request.prompt or ""
        return await self._encode(text, special=request.adds_special_tokens)

    async def detokenized(self, request: DetokenizeRequest) -> str:
        """The text of token ids. Raises ApiError or RequestError."""
        self._check_model(request.model)
        check_ids(request.tokens, self.files.vocab_size, param="tokens")
        return await asyncio.to_thread(self.tokenizer.decode, request.tokens, special=True)

    async def _rendered(self, request: ChatRequest | TokenizeRequest) -> str:
        if self._renderer is None:
            raise ApiError.bad_request(NO_TEMPLATE, "messages", "no_chat_template")
        return await self._renderer.render(request.conversation())

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self.names:
            raise ApiError.unknown_model(model, self.names)

    def _echoes(self, request: AnyRequest) -> tuple[str, ...]:
        """The text of each prompt, if answers begin with it. A character that a prompt of ids begins and
        does not end belongs to the answer."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return ()
        tokenizer = self.tokenizer
        decode = tokenizer.decode_whole if request.wanted_tokens else tokenizer.decode
        return tuple(
            each if isinstance(each, str) else decode(each, special=True)
            for each in request.prompts
        )

    async def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        encode = partial(encode_prompt, self.tokenizer, text, self.context, special=special)
        return await _in_thread(len(text) >= LONG_TEXT, encode)


async def _in_thread(much: bool, work: Callable[..., Result], *given: Any) -> Result:
    """Long work does not hold up the event loop."""
    return await asyncio.to_thread(work, *given) if much else work(*given)


def _name(request: AnyRequest, request_id: str) -> str:
    """A unique id. It contains the client's own id, if there is one."""
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    given = request.request_id or request_id
    return f"{kind}-{given}-{secrets.token_hex(4)}" if given else f"{kind}-{secrets.token_hex(12)}"
