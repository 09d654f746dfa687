"""Asking: one HTTP request on its way to the router, for every route that generates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from baton.clock import monotonic
from baton.log import REQUEST
from baton.server import bodies
from baton.server.monitor import Monitor
from baton.server.schema import AnyRequest, TokenizeRequest
from baton.server.service import GenerationService
from baton.server.stream import GenerationStream, PreparedRequest

Change = Callable[[PreparedRequest], PreparedRequest]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that the router has accepted, and headers of the response. Its stream must be closed."""

    prepared: PreparedRequest
    stream: GenerationStream
    headers: dict[str, str]

    @property
    def request_id(self) -> str:
        """As the response's head has it."""
        return self.headers.get("X-Request-Id") or REQUEST.get()


class Asker:
    """Sends requests to the router."""

    def __init__(self, service: GenerationService, monitor: Monitor) -> None:
        self.service, self._monitor = service, monitor

    async def begin(
        self,
        request: Request,
        payload: AnyRequest,
        change: Change | None = None,
        *,
        cut: bool = False,
    ) -> Begun:
        """`change`: makes it a request of another kind; `cut`: as in prepare(). Raises ApiError or
        RequestError."""
        state = request.scope["state"]
        own = str(state["request_id"])  # the client's, if guard.py accepted it
        given = own if request.headers.get("x-request-id") == own else ""
        tenant, quotas = state["tenant"], self.service.quotas
        prepared = await self.service.prepare(
            payload, tenant=tenant, request_id=given, stream=bool(payload.stream), cut=cut
        )
        prepared = prepared if change is None else change(prepared)
        named = quotas.headers(tenant, monotonic())
        if not given:
            named["X-Request-Id"] = prepared.name
        choices = len(prepared.prompts) * prepared.n
        self._monitor.begin(prepared.name, request.headers.get("traceparent"), choices)
        return Begun(prepared, await self.service.begin(prepared), named)


async def translated(
    kind: type[Model], value: dict[str, Any], request: Request, more: int = 0
) -> Model:
    """A chat made of a request's body and of `more` bytes. Raises ApiError."""
    return await bodies.model(kind, value, size=body_size(request) + more)


def body_size(request: Request) -> int:
    """In bytes. One that is sent in chunks counts as a long one."""
    return int(request.headers.get("content-length") or bodies.INLINE + 1)


async def counted(
    service: GenerationService, chat: dict[str, Any], request: Request, more: int = 0
) -> int:
    """Tokens of a chat's prompt. `more`: as in translated(). Raises ApiError or RequestError."""
    known = {name: value for name, value in chat.items() if name in TokenizeRequest.model_fields}
    return len(await service.tokenized(await translated(TokenizeRequest, known, request, more)))
