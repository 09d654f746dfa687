"""Talk: from what a client asked for to token ids and the shape of the answer."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from baton.params import Limits, check_ids
from baton.server.chatting import ChatRequest, TokenizeRequest
from baton.server.choices import ChatShape, CompletionShape, Shape
from baton.server.desk import Desk
from baton.server.faults import Fault
from baton.server.fields import fault_of
from baton.server.protocol import CompletionRequest, Generation
from baton.server.templates import Renderer

NO_TEMPLATE = (
    "this model has no chat template, so it cannot chat: use /v1/completions, or start the server "
    "with --chat-template FILE"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One HTTP request, ready to be sent to the router. `echoes`: what each answer begins with."""

    name: str  # its id, and the beginning of its requests' ids
    generation: Generation
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...]
    shape: Shape


class Talk:
    """The two ways to ask, and their texts."""

    def __init__(self, desk: Desk, renderer: Renderer | None) -> None:
        self._desk = desk
        self._renderer = renderer

    @property
    def chats(self) -> bool:
        """Has the model a chat template?"""
        return self._renderer is not None

    async def plan(self, asked: CompletionRequest | ChatRequest, request_id: str = "") -> Plan:
        """Raises Fault for what cannot be answered, or not now."""
        if isinstance(asked, ChatRequest):
            return await self._chat(asked, request_id)
        return await self._completion(asked, request_id)

    async def plan_json(self, asked: Mapping[str, Any]) -> Plan:
        """The same for what came as plain JSON: a conversation if it has messages."""
        kind = ChatRequest if "messages" in asked else CompletionRequest
        try:
            return await self.plan(kind.model_validate(asked))
        except ValidationError as error:
            raise fault_of(error) from error

    async def _completion(self, asked: CompletionRequest, request_id: str) -> Plan:
        desk = self._desk
        generation = asked.generation(self._limits())
        await desk.admit(asked.model, len(generation.prompts) * generation.n)
        prompts, echoes = [], []
        for prompt in generation.prompts:
            ids = prompt if isinstance(prompt, tuple) else ()
            if isinstance(prompt, str):
                ids = await desk.encode(prompt, special=generation.add_special_tokens)
            check_ids(ids, desk.files.vocab_size)
            if not ids:
                raise Fault.bad_request("the prompt is empty: it must have a token", "prompt")
            prompts.append(ids)
            echoes.append(self._echo(prompt) if generation.echo else "")
        name = _name("cmpl", generation, request_id)
        shape = CompletionShape(
            self._head(name, asked.model),
            desk.tokens,
            logprobs=generation.logprobs,
            prompt_logprobs=generation.prompt_logprobs,
        )
        return Plan(name, generation, tuple(prompts), tuple(echoes), shape)

    def _echo(self, prompt: str | tuple[int, ...]) -> str:
        return (
            prompt if isinstance(prompt, str) else self._desk.tokenizer.decode(prompt, special=True)
        )

    async def _chat(self, asked: ChatRequest, request_id: str) -> Plan:
        desk = self._desk
        generation = asked.generation(self._limits())
        await desk.admit(asked.model, generation.n)
        text = await self._rendered(asked.conversation(), tools=generation.tools)
        ids = await desk.encode(text, special=False)  # the template writes them itself
        if not ids:
            raise Fault.bad_request("the conversation is empty", "messages")
        name = _name("chatcmpl", generation, request_id)
        shape = ChatShape(self._head(name, asked.model), desk.tokens, logprobs=generation.logprobs)
        return Plan(name, generation, (ids,), ("",), shape)

    async def tokenized(self, asked: TokenizeRequest) -> tuple[int, ...]:
        """Token ids of a text or of a conversation."""
        if asked.messages is None:
            return await self._desk.encode(asked.prompt or "", special=asked.add_special_tokens)
        text = await self._rendered(
            asked.conversation(), add_generation_prompt=asked.add_generation_prompt
        )
        return await self._desk.encode(text, special=False)

    async def _rendered(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Any = None,
    ) -> str:
        if self._renderer is None:
            raise Fault.bad_request(NO_TEMPLATE, "messages", "no_chat_template")
        return await self._renderer.render(
            list(messages), add_generation_prompt=add_generation_prompt, tools=tools
        )

    def _limits(self) -> Limits:
        return Limits(self._desk.context, self._desk.files.vocab_size)

    def _head(self, name: str, model: str | None) -> dict[str, Any]:
        return {"id": name, "created": int(time.time()), "model": model or self._desk.names[0]}


def _name(kind: str, generation: Generation, request_id: str) -> str:
    """Unlike any other, and beginning with what the client calls it."""
    given = generation.request_id or request_id
    return f"{kind}-{given}-{secrets.token_hex(4)}" if given else f"{kind}-{secrets.token_hex(12)}"
