"""Service: checks and tokenizes requests, and sends them to the router. All routes share it.

CompletionRequest | ChatRequest  -> prepare -> PreparedRequest -> begin -> GenerationStream
"""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import inf
from typing import Any

from baton import failpoint
from baton.client.aio import RouterClient
from baton.clock import monotonic
from baton.errors import RequestError
from baton.grammar import Grammars, tool_calls
from baton.model_files import ModelFiles
from baton.params import NOT_STREAMED_S, GenerationParams, Limits, check_ids, check_request
from baton.server.admission import RETRY_S, Admission, Ticket
from baton.server.api_error import ApiError, from_request_error
from baton.server.bodies import in_thread, model
from baton.server.guard import hashed, tenant_of
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
from baton.server.served import ServedModels
from baton.server.shapes import ChatShape, CompletionShape, Extras, Shape
from baton.server.speech import begins, is_open
from baton.server.stream import Deadlines, GenerationStream, PreparedRequest
from baton.server.templates import Renderer
from baton.server.tools import KnownSchemas, ToolUse, answer_schema, json_schema_in
from baton.server.tools_answer import ToolReading
from baton.server.tools_ids import numbered
from baton.server.tools_prompt import with_tools_told
from baton.server.turns import text_of
from baton.text import Tokenizer, chat_ends, encode_prompt
from baton.tool_calls import FORMATS, CallFormat, Calls
from baton.wire.messages import ClusterInfo
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
        self.models = ServedModels(self.names, router)
        self.tokenizer = Tokenizer(files.tokenizer_file)
        self._chat_ends = chat_ends(self.tokenizer, files.eos_token_ids, files.vocab_size)
        self.started = int(time.time())
        self.draining = False
        self._renderer = renderer
        self._grammars = Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
        self._schemas = KnownSchemas(self._grammars.check)
        self.admission = Admission(settings.max_queued)
        self.metrics: Metrics | None = None  # what it tells of its requests
        self.tenants = tuple(map(tenant_of, hashed(settings.api_keys)))  # of the keys
        self.quotas = Quotas(
            requests=settings.requests_per_key, tokens=settings.tokens_per_key, known=self.tenants
        )
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
        if clash := self.models.clash:
            return clash
        return "" if info.ready else f"the cluster is not ready: {info.waiting_for}"

    def look(self) -> None:
        """Called periodically, to notice until when the cluster was ready."""
        if self.router.info is not None and self.router.info.ready:
            self._ready_at = monotonic()

    def check_room(self, tenant: str) -> None:
        """Raises the ApiError that every request of this tenant would get now, whatever it asks for: its
        quota is used up, the cluster is not ready, the queue is full. To be asked before a request is
        parsed, which costs half as much as the rest of a refusal. The queue is this server's own count of
        its requests without a token: it is right also while the router says nothing new. Where _admit()
        would wait for a router, nothing is refused here."""
        self.quotas.check(tenant, monotonic())
        if self.draining or self.router.info is not None:
            self._check_ready(self.router.info)
            self.admission.check(tenant, 1)

    def _check_ready(self, info: ClusterInfo | None) -> None:
        """Can requests be answered, or will they be soon? Raises ApiError."""
        if self.draining:
            raise ApiError.not_ready("the server is shutting down", RETRY_S)
        self.look()
        ours = info is not None and info.fingerprint == self.files.fingerprint
        ours = ours and not self.models.clash
        if not ours or monotonic() > self._ready_at + RESTART_S:
            raise ApiError.not_ready(self.why_not_ready(), RETRY_S)

    async def _admit(self, model: str | None, tenant: str, choices: int) -> Ticket:
        """Places for so many choices. Raises ApiError for an unknown model, a full queue, and a cluster
        that is not ready. Waits up to ROUTER_S for a router that restarts. Workers that restart get the
        request as soon as they are ready, if they were a short time ago."""
        await self._check_model(model)
        info = None if self.draining else await self.router.answered(ROUTER_S)
        self._check_ready(info)
        return self.admission.take(tenant, choices)

    # ---- requests

    async def prepare(
        self,
        request: AnyRequest,
        *,
        tenant: str = "",
        request_id: str = "",
        stream: bool,
        cut: bool = False,
    ) -> PreparedRequest:
        """Check and tokenize. `tenant`: who asks, for fair shares. `stream`: the client reads tokens as
        they are generated. `cut`: where more tokens are asked for than fit beside the prompt, the answer
        may be as long as fits. Raises ApiError or RequestError if the request is invalid, or cannot be
        answered now. Its places are free again when its GenerationStream is closed."""
        deadlines = self._deadlines(request)
        interval = self.settings.stream_interval_ms / 1e3 if stream else NOT_STREAMED_S
        defaults = Defaults(self._sampling, self.context, secrets.randbits(63), interval)
        params = await in_thread(request.has_long_grammar, request.params, defaults)
        if isinstance(request, ChatRequest):
            params = params.stopping_at(self._chat_ends)
        texts = 1 if isinstance(request, ChatRequest) else len(request.prompts)
        choices = texts * (request.n or 1)
        place = self.quotas.take(tenant, monotonic())
        place.charge(choices * min(params.max_new_tokens, USUAL_ANSWER), monotonic())
        try:
            ticket = await self._admit(request.model, tenant, choices)
            try:
                params = replace(params, adapter=self.models.adapter(request.model))
                found = await self._prepared(
                    request, params, _name(request, request_id), ticket, deadlines, cut=cut
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
        *,
        cut: bool,
    ) -> PreparedRequest:
        special, thinking, tools = request.adds_special_tokens, None, None
        if isinstance(request, ChatRequest):
            text = await self._rendered(request)
            prompts = [await self._encode(text, special=special)]
            if not prompts[0]:
                raise ApiError.bad_request("the conversation is empty", "messages")
            if request.tool_use is not None or not params.grammar or self.call_format.channels:
                thinking = self._begins_thinking(request, text)
            if request.tool_use is None and self.call_format.channels:
                params, thinking, tools = await in_thread(
                    bool(params.grammar), self._in_channels, request, params, thinking
                )
            elif request.tool_use is not None:
                params, tools = await asyncio.to_thread(
                    self._with_tools, request, request.tool_use, params, thinking
                )
        else:
            prompts = [
                await self._encode(each, special=special) if isinstance(each, str) else each
                for each in request.prompts
            ]
        if params.grammar:
            try:
                await asyncio.to_thread(self._grammars.check, params.grammar)
            except RequestError as error:
                raise from_request_error(error, _grammar_param(request)) from error
        check = partial(self._params, cut=cut or request.wanted_tokens is None)
        each_params = await in_thread(sum(map(len, prompts)) > MANY_TOKENS, check, params, prompts)
        options = request.stream_options
        return PreparedRequest(
            name=name,
            prompts=tuple(prompts),
            params=tuple(each_params),
            n=request.n or 1,
            shape=self._shape(request, name, params, thinking, tools),
            ticket=ticket,
            priority=request.priority,
            role_policy=request.role_policy or "",
            deadlines=deadlines,
            echoes=self._echoes(request),
            include_usage=options is not None and options.include_usage,
            prompt_only=request.wanted_tokens == 0,
        )

    def _in_channels(
        self, request: ChatRequest, params: GenerationParams, thinking: bool | None
    ) -> tuple[GenerationParams, bool | None, ToolReading | None]:
        """An answer without calls, whose marks are read all the same. JSON that the request asks for is
        its last message. Where the request wants the marks in the text, or another grammar has no room
        for them, there is nothing to read."""
        answer = json_schema_in(params.grammar)
        guided = answer is not None and not thinking  # a message that goes on is the JSON
        if params.keep_special or (params.grammar and not guided):
            return params, None, None
        if guided:
            calls = Calls(self.call_format, (), thinking=thinking, answer=answer)
            params = replace(params, grammar=_written(calls, request.grammar_param))
        shown = replace(params, shown_special=self._marks)
        return shown, thinking, ToolReading(self.call_format, ())

    def _with_tools(
        self,
        request: ChatRequest,
        use: ToolUse,
        params: GenerationParams,
        thinking: bool | None,
    ) -> tuple[GenerationParams, ToolReading]:
        """The answer is text or calls of tools, which are read so. Raises ApiError."""
        answer = answer_schema(params.grammar, request.grammar_param)
        calls = use.calls(self.call_format, self._schemas, thinking=thinking, answer=answer)
        if self._renderer is not None and self._renderer.one_call:
            calls = replace(calls, several=False)
        written = _written(calls, "tools")
        # others would hide a call that stands behind them: the reader knows texts, the grammar ids
        params = replace(params, grammar=written, shown_special=self._marks, keep_special=False)
        return params, use.reading(self.call_format, self._schemas)

    @property
    def call_format(self) -> CallFormat:
        """How the model writes calls of tools."""
        chosen = self.settings.tool_call_parser
        if chosen != "auto":
            return FORMATS[chosen]
        return self._renderer.calls if self._renderer is not None else FORMATS["json"]

    @cached_property
    def _marks(self) -> tuple[int, ...]:
        """Special tokens that tell calls from text."""
        known = self.call_format.marks
        return tuple(
            i for i in sorted(self.tokenizer.special_ids) if self.tokenizer.token(i) in known
        )

    @property
    def _room(self) -> int:
        """Tokens that a request may have: the largest KV pool may be smaller than the context."""
        pool = self.router.info.pool_tokens if self.router.info else 0
        return min(self.context, pool or self.context)

    def _params(
        self, params: GenerationParams, prompts: Sequence[tuple[int, ...]], *, cut: bool
    ) -> list[GenerationParams]:
        """Those of each prompt, checked with it. `cut`: not more tokens than fit. Raises RequestError."""
        limits = Limits(self.context, self.files.vocab_size, self.models.adapters)
        room = self._room
        found: list[GenerationParams] = []
        for prompt in prompts:
            own, left = params, max(room - len(prompt), 1)
            if cut and own.max_new_tokens > left:
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
        self.check_room(tenant)
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
        if self.metrics is not None and not request.pooling:  # else nothing is generated
            self.metrics.asked(request.n, stream.allowed)
            stream.when_closed = self.metrics.answered
        return stream

    def _begins_thinking(self, request: ChatRequest, prompt: str) -> bool | None:
        """Does the answer begin within the model's reasoning? None: it has none that is told apart. In
        channels: does it go on with a message?"""
        if self.call_format.channels:
            goes_on = request.continue_final_message
            return goes_on or (None if self.settings.reasoning == "off" else False)
        if self.settings.reasoning == "off" or not (self._renderer and self._renderer.reasons):
            return None
        if not request.continue_final_message:
            return begins(prompt)
        last = (request.messages or [])[-1]
        return last.role == "assistant" and is_open(text_of(last.turn), prompt)

    def _shape(
        self,
        request: AnyRequest,
        name: str,
        params: GenerationParams,
        thinking: bool | None,
        tools: ToolReading | None,
    ) -> Shape:
        head = {"id": name, "created": int(time.time()), "model": request.model or self.names[0]}
        chat, options = isinstance(request, ChatRequest), request.stream_options
        silent = frozenset() if params.keep_special else self.tokenizer.special_ids
        silent = silent.difference(params.shown_special)
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
            later_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.in_every_chunk,
            thinking=thinking,
            tools=tools,
            shows_reasoning=not isinstance(request, ChatRequest) or request.include_reasoning,
        )
        return (ChatShape if chat else CompletionShape)(head, self.tokenizer, extras)

    # ---- text

    async def tokenized(self, request: TokenizeRequest) -> tuple[int, ...]:
        """Token ids of a text or of a conversation."""
        await self._check_model(request.model)
        if request.messages is not None:
            text = await self._rendered(request)
        else:
            text = request.prompt or ""
        return await self._encode(text, special=request.adds_special_tokens)

    async def detokenized(self, request: DetokenizeRequest) -> str:
        """The text of token ids. Raises ApiError or RequestError."""
        await self._check_model(request.model)
        check_ids(request.tokens, self.files.vocab_size, param="tokens")
        return await asyncio.to_thread(self.tokenizer.decode, request.tokens, special=True)

    async def _rendered(self, request: ChatRequest | TokenizeRequest) -> str:
        if self._renderer is None:
            raise ApiError.bad_request(NO_TEMPLATE, "messages", "no_chat_template")
        conversation = request.conversation()
        if not self._renderer.offers:
            conversation = with_tools_told(conversation, self.call_format)
        elif (marks := self.call_format.marked) is not None and marks.numbered:
            messages = numbered(conversation.messages)
            conversation = replace(conversation, messages=messages)
        return await self._renderer.render(conversation)

    async def _check_model(self, model: str | None) -> None:
        """ApiError for an unknown model. The first router may still have to tell of adapters."""
        if model is not None and model not in self.names and not self.models.told:
            self._check_ready(None if self.draining else await self.router.answered(ROUTER_S))
        self.models.adapter(model)

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
        return await in_thread(len(text) >= LONG_TEXT, encode)


def _written(calls: Calls, param: str) -> str:
    """The grammar of an answer. Raises ApiError, which names the field that asks for it."""
    try:
        return tool_calls(calls)
    except RequestError as error:
        raise from_request_error(error, param) from error


def _grammar_param(request: AnyRequest) -> str:
    """The field that asks for the request's grammar."""
    calls = isinstance(request, ChatRequest) and request.tool_use is not None
    return "tools" if calls else request.grammar_param


def _name(request: AnyRequest, request_id: str) -> str:
    """A unique id. It contains the client's own id, if there is one."""
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    given = request.request_id or request_id
    return f"{kind}-{given}-{secrets.token_hex(4)}" if given else f"{kind}-{secrets.token_hex(12)}"
