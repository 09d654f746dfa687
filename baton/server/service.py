"""Service: checks and tokenizes requests, and sends them to the router. All routes share it.

CompletionRequest | ChatRequest  -> prepare -> PreparedRequest -> begin -> GenerationStream
"""

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from baton import failpoint
from baton.client.aio import RouterClient
from baton.errors import RequestError
from baton.grammar import Grammars
from baton.model_files import ModelFiles
from baton.params import NOT_STREAMED_S, GenerationParams, Limits, check_request
from baton.server.api_error import ApiError, from_request_error, from_validation_error
from baton.server.options import ServerSettings
from baton.server.schema import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    Defaults,
    TokenizeRequest,
)
from baton.server.stream import (
    ChatShape,
    CompletionShape,
    GenerationStream,
    PreparedRequest,
    Shape,
)
from baton.server.templates import Conversation, Renderer
from baton.text import Tokenizer, encode_prompt
from baton.wire.messages import Submit
from sampler.params import SamplingParams

LONG_TEXT = 20_000  # characters; longer ones are tokenized in a thread
RETRY_S = 2
ROUTER_S = 3.0
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
        self.tokenizer = Tokenizer(files.tokenizer_file)
        self.started = int(time.time())
        self.draining = False
        self._renderer = renderer
        self._grammars = Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
        self._was_ready = False  # later requests may wait for workers that restart
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
        """Called periodically, to notice when the cluster is ready for the first time."""
        info = self.router.info
        self._was_ready = self._was_ready or (info is not None and info.ready)

    async def _admit(self, model: str | None, requests: int) -> None:
        """Raises ApiError for an unknown model and for a full queue. Waits up to ROUTER_S for a router
        that restarts."""
        if model is not None and model not in self.names:
            raise ApiError.unknown_model(model, self.names)
        if self.draining:
            raise ApiError.not_ready("the server is shutting down", RETRY_S)
        info = await self.router.answered(ROUTER_S)
        self.look()
        if info is None or info.fingerprint != self.files.fingerprint or not self._was_ready:
            raise ApiError.not_ready(self.why_not_ready(), RETRY_S)
        limit, waiting = self.settings.max_queued, self.router.waiting
        if waiting + requests > max(limit, requests if not waiting else 0):
            raise ApiError.overloaded(waiting, limit, RETRY_S)

    # ---- requests

    async def prepare(
        self, request: AnyRequest, *, request_id: str = "", stream: bool
    ) -> PreparedRequest:
        """Check and tokenize. `stream`: the client reads tokens as they are generated. Raises ApiError
        or RequestError if the request is invalid, or cannot be answered now."""
        interval = self.settings.stream_interval_ms / 1e3 if stream else NOT_STREAMED_S
        defaults = Defaults(self._sampling, self.context, secrets.randbits(63), interval)
        params = request.params(defaults)
        n = request.n or 1
        texts = 1 if isinstance(request, ChatRequest) else len(request.prompts)
        await self._admit(request.model, texts * n)
        prompts = await self._prompts(request)
        if params.grammar:
            try:
                await asyncio.to_thread(self._grammars.check, params.grammar)
            except RequestError as error:
                raise from_request_error(error, "response_format") from error
        name = _name(request, request_id)
        submits: list[Submit] = []
        for prompt in prompts:
            own = params
            if request.wanted_tokens is None:  # all that fit
                left = max(self.context - len(prompt), 1)
                own = replace(own, max_new_tokens=left, min_tokens=min(own.min_tokens, left))
            check_request(prompt, own, Limits(self.context, self.files.vocab_size))
            for choice in range(n):
                submits.append(Submit(f"{name}-{len(submits)}", prompt, _of_choice(own, choice)))
        return PreparedRequest(
            name=name,
            prompts=tuple(prompts),
            submits=tuple(submits),
            shape=self._shape(request, name, params),
            echoes=self._echoes(request, n),
            include_usage=request.stream_options is not None
            and request.stream_options.include_usage,
            prompt_only=request.wanted_tokens == 0,
        )

    async def prepare_json(self, payload: Mapping[str, Any]) -> PreparedRequest:
        """prepare() for a streamed request as a JSON object: a chat if it has messages."""
        kind = ChatRequest if "messages" in payload else CompletionRequest
        try:
            return await self.prepare(kind.model_validate(payload), stream=True)
        except ValidationError as error:
            raise from_validation_error(error) from error

    async def begin(self, request: PreparedRequest) -> GenerationStream:
        """Send it, and wait until the router has accepted it. Raises ApiError."""
        failpoint.hit("server.accepted")
        stream = GenerationStream(self.router, request)
        try:
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

    def _shape(self, request: AnyRequest, name: str, params: GenerationParams) -> Shape:
        head = {"id": name, "created": int(time.time()), "model": request.model or self.names[0]}
        kind = ChatShape if isinstance(request, ChatRequest) else CompletionShape
        asked = {"logprobs": params.logprobs, "prompt_logprobs": params.prompt_logprobs}
        return kind(head, self.tokenizer, **asked)

    # ---- text

    async def tokenized(self, request: TokenizeRequest) -> tuple[int, ...]:
        """Token ids of a text or of a conversation."""
        if request.messages is None:
            return await self._encode(request.prompt or "", special=request.add_special_tokens)
        prompting = request.add_generation_prompt
        text = await self._rendered(Conversation(request.conversation(), prompting))
        return await self._encode(text, special=False)

    async def _prompts(self, request: AnyRequest) -> list[tuple[int, ...]]:
        if isinstance(request, CompletionRequest):
            special = request.add_special_tokens
            return [
                await self._encode(each, special=special) if isinstance(each, str) else each
                for each in request.prompts
            ]
        conversation = Conversation(request.conversation(), tools=request.offered_tools)
        text = await self._rendered(conversation)
        ids = await self._encode(text, special=False)  # the template writes special tokens itself
        if not ids:
            raise ApiError.bad_request("the conversation is empty", "messages")
        return [ids]

    def _echoes(self, request: AnyRequest, n: int) -> tuple[str, ...]:
        """The prompt's text for each choice that begins with it."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return ()
        decode = self.tokenizer.decode
        texts = [
            each if isinstance(each, str) else decode(each, special=True)
            for each in request.prompts
        ]
        return tuple(text for text in texts for _ in range(n))

    async def _rendered(self, conversation: Conversation) -> str:
        if self._renderer is None:
            raise ApiError.bad_request(NO_TEMPLATE, "messages", "no_chat_template")
        return await self._renderer.render(conversation)

    async def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        encode = partial(encode_prompt, self.tokenizer, text, self.context, special=special)
        return encode() if len(text) < LONG_TEXT else await asyncio.to_thread(encode)


def _of_choice(params: GenerationParams, choice: int) -> GenerationParams:
    """Each choice draws its own random numbers."""
    if not choice or params.sampling is None:
        return params
    return replace(params, sampling=replace(params.sampling, choice=choice))


def _name(request: AnyRequest, request_id: str) -> str:
    """A unique id. It contains the client's own id, if there is one."""
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    given = request.request_id or request_id
    return f"{kind}-{given}-{secrets.token_hex(4)}" if given else f"{kind}-{secrets.token_hex(12)}"
