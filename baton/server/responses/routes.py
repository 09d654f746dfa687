"""Routes of the Responses API: create, stream, look up, delete, count.

body -> ResponsesRequest -> chat -> ChatRequest -> service.py -> chunks -> pieces -> Output -> events
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import JSONResponse, Response

from baton.errors import RequestError
from baton.server import bodies
from baton.server.api_error import ApiError
from baton.server.asking import Asker, Begun, body_size, counted, translated
from baton.server.pieces import pieces_of, renamed
from baton.server.responses.answer import (
    Event,
    Output,
    response_of,
    status_of,
    thought,
    usage_of,
)
from baton.server.responses.items import Item, plain_items
from baton.server.responses.schema import NAMES, ResponsesRequest
from baton.server.responses.store import Segment, Store, Stored
from baton.server.schema import ChatRequest
from baton.server.service import GenerationService
from baton.server.sse import EventStream, event, json_of

LONG_ITEMS = 65_536
"""Bytes of JSON; more are read and written in a thread."""


def new_id(prefix: str) -> str:
    """Nobody can guess it."""
    return f"{prefix}_{secrets.token_hex(16)}"


def _tenant(request: Request) -> str:
    return str(request.scope["state"]["tenant"])


def _unknown(store: Store, name: str, status: int = 404, **more: Any) -> ApiError:
    text = (
        f"no response {name[:80]!r} is stored here: this server keeps the last {store.most_responses:,} "
        f"({store.most_bytes >> 20} MiB) in memory, each for the key that asked for it, and none over "
        "a restart; send the whole conversation as input"
    )
    return ApiError(status, text, **more)


def add_responses(app: FastAPI, asker: Asker, store: Store) -> dict[str, Any]:
    """Returns what FastPath calls for each path."""
    service = asker.service

    def conversation(request: Request, name: str | None) -> tuple[Segment, ...]:
        found = None if name is None else store.get(_tenant(request), name)
        if name is not None and found is None:
            code = "previous_response_not_found"
            raise _unknown(store, name, 400, param="previous_response_id", code=code)
        return found.conversation if found else ()

    @app.post(bodies.Path.RESPONSES, tags=["openai"])
    async def responses(request: Request, payload: ResponsesRequest) -> Response:
        """Answer a conversation: OpenAI's Responses API."""
        before = conversation(request, payload.previous_response_id)
        try:
            items, chat, more = await _chat(payload, before, request)
            begun = await asker.begin(request, await translated(ChatRequest, chat, request, more))
            turn = _Turn(service, store, _tenant(request), payload, before, items, begun)
            if payload.stream:
                return EventStream(turn.events(), begun.headers, close=begun.stream.close)
            content = await turn.whole(request)
        except (ApiError, RequestError) as error:
            raise renamed(error, NAMES) from error
        return Response(content, headers=begun.headers, media_type="application/json")

    @app.post(bodies.Path.RESPONSE_TOKENS, tags=["openai"])
    async def input_tokens(request: Request, payload: ResponsesRequest) -> Response:
        """How many tokens a request's input has."""
        before = conversation(request, payload.previous_response_id)
        try:
            _, chat, more = await _chat(payload, before, request)
            tokens = await counted(service, chat, request, more)
        except (ApiError, RequestError) as error:
            raise renamed(error, NAMES) from error
        return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})

    add_stored(app, store)
    return {
        bodies.Path.RESPONSES: (ResponsesRequest, responses),
        bodies.Path.RESPONSE_TOKENS: (ResponsesRequest, input_tokens),
    }


def add_stored(app: FastAPI, store: Store) -> None:
    """Responses of before."""

    def stored(request: Request, name: str) -> Stored:
        found = store.get(_tenant(request), name)
        if found is None:
            raise _unknown(store, name, kind="not_found_error", code="not_found")
        return found

    @app.get("/v1/responses/{name}", tags=["openai"])
    async def response(
        request: Request, name: str, stream: Annotated[bool, Query()] = False
    ) -> Response:
        """A stored response."""
        found = stored(request, name)
        if stream:
            text = "stream is not supported here: a stored response is complete"
            raise ApiError.bad_request(text, "stream", "unsupported")
        return Response(found.response, media_type="application/json")

    @app.get("/v1/responses/{name}/input_items", tags=["openai"])
    async def input_items(
        request: Request,
        name: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """The items before a stored response."""
        found = stored(request, name)
        items = await _items(found.conversation)
        items = items[: len(items) - len(json.loads(found.response)["output"])]
        return JSONResponse(listed(items, limit=limit, descending=order == "desc", after=after))

    @app.delete("/v1/responses/{name}", tags=["openai"])
    async def delete(request: Request, name: str) -> Response:
        """Forget a stored response. What went on from it is kept."""
        stored(request, name)
        store.forget(_tenant(request), name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})


def listed(items: list[Item], *, limit: int, descending: bool, after: str | None) -> Item:
    """A page of a list. Raises ApiError if no item has the id `after`."""
    shown = items[::-1] if descending else items
    if after is not None:
        places = [place for place, each in enumerate(shown) if each["id"] == after]
        if not places:
            raise ApiError.bad_request(f"after: no item {after[:80]!r} is there", "after")
        shown = shown[places[0] + 1 :]
    page = shown[:limit]
    ids = [each["id"] for each in page]
    return {
        "object": "list",
        "data": page,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": len(page) < len(shown),
    }


def _read(segments: Sequence[Segment]) -> list[Item]:
    """The items of a conversation."""
    return [item for each in segments for item in json.loads(each.data)]


async def _items(segments: Sequence[Segment]) -> list[Item]:
    """The same. Long ones are read in a thread."""
    return await bodies.in_thread(_size(segments) > LONG_ITEMS, _read, segments)


def _size(segments: Sequence[Segment]) -> int:
    return sum(len(each.data) for each in segments)


async def _chat(
    payload: ResponsesRequest, before: Sequence[Segment], request: Request
) -> tuple[list[Item], Item, int]:
    """The request's own items, the chat of the whole conversation, and the bytes of `before`. Raises
    ApiError: a conversation is no longer than a body that brings all of it."""
    own, held = body_size(request), _size(before)
    if held and own + held > bodies.MAX_BODY_BYTES:
        text = (
            f"the conversation before has {held:,} bytes, with this input {own + held:,}; at most "
            f"{bodies.MAX_BODY_BYTES:,} are allowed: go on with a shorter one, sent as input"
        )
        raise ApiError.bad_request(text, "previous_response_id")

    def build() -> tuple[list[Item], Item]:
        items = plain_items(payload.input, new_id)
        return items, payload.chat([*_read(before), *items])

    return *await bodies.in_thread(own + held > bodies.INLINE, build), held


def kept(response: Item, whole: bytes, asked: Sequence[Item]) -> tuple[bytes, bytes]:
    """What is stored of a response: itself, and the items that its turn, which `asked`, adds to the
    conversation. Those have no probabilities of tokens, which no prompt shows and which are a hundred
    times as long as their text; nor has a response that is longer than a body may be."""
    bare = [without_logprobs(each) for each in response["output"]]
    if len(whole) > bodies.MAX_BODY_BYTES:
        whole = _bytes(response | {"output": bare})
    return whole, _bytes([*asked, *bare])


def without_logprobs(item: Item) -> Item:
    """An item whose texts have no probabilities of tokens."""
    content = item.get("content")
    if not isinstance(content, list):
        return item
    parts = [each | {"logprobs": []} if each.get("logprobs") else each for each in content]
    return item | {"content": parts}


def _bytes(value: Any) -> bytes:
    """As JSON. Halves of surrogate pairs, which a client may send in what no prompt shows, become ?."""
    return json_of(value).encode(errors="replace")


@dataclass(frozen=True, slots=True)
class _Turn:
    """One response under way."""

    service: GenerationService
    store: Store
    tenant: str
    request: ResponsesRequest
    before: tuple[Segment, ...]  # the conversation
    items: list[Item]  # that the request adds to it
    begun: Begun

    async def whole(self, request: Request) -> bytes:
        """The response as JSON. Raises ApiError."""
        head, output = self._head(), self._output()
        answer = json.loads(await self.begun.stream.whole(request.receive))
        choice = answer["choices"][0]
        list(output.take(pieces_of(choice["message"], choice["logprobs"])))
        return (await self._ended(head, output, choice["finish_reason"], answer["usage"]))[0]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. A chunk's are yielded together."""
        numbers, stream = count(), self.begun.stream
        head, output, finish_reason = self._head(), self._output(), None

        def encoded(*found: Event) -> bytes:
            return b"".join(
                event({**e, "sequence_number": next(numbers)}, e["type"]) for e in found
            )

        def about(status: str, response: Item) -> Event:
            return {"type": f"response.{status}", "response": response}

        try:
            begins = response_of(head, "in_progress")
            yield encoded(about("created", begins), about("in_progress", begins))
            async with contextlib.aclosing(stream.chunks()) as chunks:
                async for chunk in chunks:
                    if "error" in chunk:
                        why = chunk["error"]["message"]
                        failed = response_of(head, "failed", output.items, error=why)
                        yield encoded(about("failed", failed))
                        return
                    for choice in chunk["choices"]:
                        pieces = pieces_of(choice["delta"], choice["logprobs"])
                        if found := encoded(*output.take(pieces)):
                            yield found
                        finish_reason = choice["finish_reason"] or finish_reason
            status = status_of(finish_reason)
            last = encoded(*output.end(status))
            _, response = await self._ended(head, output, finish_reason, stream.usage())
            yield last + encoded(about(status, response))
        finally:
            stream.close()

    async def _ended(
        self, head: Item, output: Output, finish_reason: str | None, usage: Item
    ) -> tuple[bytes, Item]:
        """The response, as JSON and as an object. It is stored, if it shall be."""
        status = status_of(finish_reason)
        list(output.end(status))
        reasoning = await self._tokens(thought(output.items))
        response = response_of(
            head,
            status,
            output.items,
            usage=usage_of(usage, reasoning),
            finish_reason=finish_reason,
        )
        whole = _bytes(response)
        if self.request.store is not False:
            self.store.put(
                self.tenant, response["id"], *kept(response, whole, self.items), self.before
            )
        return whole, response

    async def _tokens(self, text: str) -> int:
        """Of the reasoning, read again: the answer's tokens do not say where its kinds begin."""
        if not text:
            return 0
        encode = partial(self.service.tokenizer.encode, text, special=False)
        return len(await asyncio.to_thread(encode))

    def _output(self) -> Output:
        request = self.request
        return Output(new_id, logprobs=request.wants_logprobs, namespaces=request.namespaces())

    def _head(self) -> Item:
        """What the request says about the response."""
        request, sampling = self.request, self.begun.prepared.params[0].sampling
        form = request.text.format if request.text else None
        reasoning = request.reasoning
        head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": request.model or self.service.names[0],
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": sampling.temperature if sampling else None,
            "text": {
                "format": form.model_dump(by_alias=True, exclude_none=True)
                if form and form.type == "json_schema"
                else {"type": form.type if form else "text"}
            },
            "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
            "tools": request.shown_tools(),
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p if sampling else None,
            "truncation": "disabled",
            "user": request.user,
        }
        whole: Item = json.loads(_bytes(head))
        return whole
