"""The application: routes and error responses, over service.py and monitor.py."""

import html
import logging
from collections.abc import Awaitable, Callable, Mapping
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from baton.errors import RequestError
from baton.log import REQUEST
from baton.server import bodies
from baton.server.adapters import add_adapters
from baton.server.api_error import (
    ApiError,
    from_request_error,
    from_validation_error,
    response,
)
from baton.server.asking import Asker
from baton.server.bodies import limits_of
from baton.server.described import describe_answers
from baton.server.embeddings import add_embeddings
from baton.server.guard import LOOPBACK, AccessPolicy, Guard, hashed
from baton.server.key_metrics import KeyMetrics
from baton.server.messages.routes import add_messages
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.server.responses.routes import add_responses
from baton.server.responses.store import Store
from baton.server.schema import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from baton.server.service import GenerationService
from baton.server.sse import EventStream
from baton.server.websocket import add_websocket
from baton.timeline import short_name

PAGE = Path(__file__).parent / "page"
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Answer = Callable[[Request, Any], Awaitable[Response]]
Routes = Mapping[str, tuple[type[BaseModel], Answer]]  # of JSON, by path
Refuse = Callable[[str, str, ApiError | RequestError], Response]  # takes method and path

logger = logging.getLogger(__name__)


def make_app(
    service: GenerationService, monitor: Monitor, lifespan: Lifespan[FastAPI], version: str
) -> ASGIApp:
    """The whole application, with its guard."""

    app = FastAPI(
        title="baton",
        version=version,
        description="Prefill/decode-disaggregated serving behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    monitor.metrics.admission = service.admission
    service.metrics = monitor.metrics
    if service.tenants:
        shares = service.tenants, service.quotas, service.admission
        keys = KeyMetrics(service.names[0], monitor.metrics.prefix, *shares)
        monitor.metrics.registry.register(keys)
    refuse = add_errors(app, monitor.metrics)
    add_state(app, service, monitor, version)
    add_models(app, service)
    asker = Asker(service, monitor)
    routes: dict[str, Any] = {}
    for found in (
        add_openai(app, asker),
        add_responses(app, asker, Store()),
        add_messages(app, asker),
        add_embeddings(app, asker),
        add_adapters(app, service),
    ):
        routes |= found
    app.add_middleware(FastPath, routes=routes, refuse=refuse)
    add_websocket(app, service)
    add_page(app, monitor)
    describe_answers(app)
    settings = service.settings
    hosts = (*LOOPBACK, settings.host, *settings.allowed_hosts)
    policy = AccessPolicy(hashed(settings.api_keys), hosts, settings.allowed_origins)

    def check_room(path: str, tenant: str) -> None:
        if path in bodies.GENERATING:
            service.check_room(tenant)

    return Guard(app, policy, lambda path: limits_of(path, service.context), check_room, refuse)


def add_errors(app: FastAPI, metrics: Metrics) -> Refuse:
    """Error responses in OpenAI's form. Returns the function that makes one."""

    def refuse(method: str, path: str, error: ApiError | RequestError) -> Response:
        if isinstance(error, RequestError):
            error = from_request_error(error)
        if error.status in (429, 503) and method == "POST":
            metrics.rejected(error.code or "")
        return response(error, path)

    @app.exception_handler(ApiError)
    @app.exception_handler(RequestError)
    async def on_refusal(request: Request, error: ApiError | RequestError) -> Response:
        return refuse(request.method, request.scope["path"], error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(request.method, request.scope["path"], from_validation_error(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path
        match error.status_code:
            case 404:
                return refuse(method, path, ApiError.unknown_path(path))
            case 405:
                answer = refuse(method, path, ApiError.wrong_method(method, path))
                answer.headers.update(error.headers or {})
                return answer
        return refuse(method, path, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(500)
    async def on_bug(request: Request, error: Exception) -> Response:
        logger.error("internal error", exc_info=error)
        return refuse(request.method, request.scope["path"], ApiError.bug(REQUEST.get()))

    return refuse


def add_state(app: FastAPI, service: GenerationService, monitor: Monitor, version: str) -> None:
    """Health, version, load, metrics."""

    @app.get("/livez", tags=["state"], response_class=Response)
    async def livez() -> Response:
        """200 while the process is alive."""
        return Response()

    @app.get("/health", tags=["state"], response_class=Response)
    @app.get("/ping", tags=["state"], response_class=Response, include_in_schema=False)
    async def health() -> Response:
        """200 if requests can be answered; 503 while loading or draining, and without workers."""
        if why := service.why_not_ready():
            raise ApiError.not_ready(why, 2)
        return Response()

    @app.get("/readyz", tags=["state"])
    async def readyz() -> Response:
        """Like /health, with the state of every worker."""
        why, info = service.why_not_ready(), service.router.info
        workers = [
            {"worker": short_name(w.worker), "role": w.role, "state": w.state}
            for w in (info.workers if info else ())
        ]
        content = {
            "ready": not why,
            "why_not": why,
            "degraded": info.degraded if info else "",
            "workers": workers,
        }
        return JSONResponse(content, 503 if why else 200)

    @app.get("/version", tags=["state"])
    async def version_() -> dict[str, str]:
        """The version of this server."""
        return {"version": version}

    @app.get("/load", tags=["state"])
    async def load() -> dict[str, int]:
        """The number of requests that are running or waiting."""
        return {"server_load": len(service.router)}

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        monitor.refresh()
        return Response(monitor.metrics.exposition(), media_type="text/plain; version=0.0.4")


def add_models(app: FastAPI, service: GenerationService) -> None:
    """The names under which this server's model and its adapters can be asked for."""

    def described(name: str) -> dict[str, Any]:
        parent = {} if name in service.names else {"parent": service.names[0]}  # an adapter's
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "baton",
            "root": service.files.name,
            "max_model_len": service.context,
            "chat": service.chats,
        } | parent

    @app.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        """The models of this server."""
        return {"object": "list", "data": [described(name) for name in service.models.names]}

    @app.get("/v1/models/{name:path}", tags=["openai"])
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        service.models.adapter(name)
        return described(name)


def add_openai(app: FastAPI, asker: Asker) -> Routes:
    """Completions, chat, and the tokenizer. Returns what FastPath calls for each path."""
    service = asker.service

    @app.post(bodies.Path.COMPLETIONS, tags=["openai"])
    async def completions(request: Request, payload: CompletionRequest) -> Response:
        """Complete one or several prompts, given as text or token ids."""
        return await answered(request, payload)

    @app.post(bodies.Path.CHAT, tags=["openai"])
    async def chat(request: Request, payload: ChatRequest) -> Response:
        """Answer a conversation, formatted by the chat template."""
        return await answered(request, payload)

    async def answered(request: Request, payload: AnyRequest) -> Response:
        begun = await asker.begin(request, payload)
        stream, named = begun.stream, begun.headers
        if payload.stream:
            return EventStream(stream.events(), named, close=stream.close)
        whole = await stream.whole(request.receive)
        return Response(whole, headers=named, media_type="application/json")

    @app.post(bodies.Path.TOKENIZE, tags=["text"])
    async def tokenize(request: Request, payload: TokenizeRequest) -> Response:
        """Convert text or messages to token ids."""
        ids = await service.tokenized(payload)
        content = {"tokens": list(ids), "count": len(ids), "max_model_len": service.context}
        if payload.return_token_strs:
            content["token_strs"] = [service.tokenizer.token(each) for each in ids]
        return JSONResponse(content)

    @app.post(bodies.Path.DETOKENIZE, tags=["text"])
    async def detokenize(request: Request, payload: DetokenizeRequest) -> Response:
        """Convert token ids to text."""
        return JSONResponse({"prompt": await service.detokenized(payload)})

    return {
        bodies.Path.COMPLETIONS: (CompletionRequest, completions),
        bodies.Path.CHAT: (ChatRequest, chat),
        bodies.Path.TOKENIZE: (TokenizeRequest, tokenize),
        bodies.Path.DETOKENIZE: (DetokenizeRequest, detokenize),
    }


def add_page(app: FastAPI, monitor: Monitor) -> None:
    """The page, its data, and /docs."""

    # Read once: a name that a client sends never reaches the file system.
    files = {each.name: each.read_bytes() for each in PAGE.iterdir() if each.is_file()}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(files["index.html"], headers=SECURITY)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise ApiError.unknown_path(f"/page/{name}")
        return Response(files[name], headers=SECURITY, media_type=guess_type(name)[0])

    @app.get("/timeline", tags=["page"])
    async def timeline() -> Response:
        """Live state changes of all requests, as server-sent events."""
        return EventStream(monitor.feed())

    @app.get("/trace.json", tags=["page"])
    async def trace() -> Response:
        """The history of all requests in Chrome's trace format, for Perfetto."""
        named = {"Content-Disposition": 'attachment; filename="trace.json"'}
        whole = await monitor.traces.text()
        return Response(whole, headers=named, media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(described(app), headers=SECURITY)


def described(app: FastAPI) -> str:
    """The page /docs: all routes. It loads nothing from other servers."""
    rows = []
    for path, methods in app.openapi()["paths"].items():
        for method, route in methods.items():
            text = html.escape(route.get("description", ""))
            rows.append(
                f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td><td>{text}</td></tr>"
            )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>baton: the API</title>"
        "<link rel=stylesheet href=/page/page.css><body class=docs><h1>The API</h1>"
        "<p>OpenAI's API with vLLM's extra fields. "
        "<a href=/openapi.json>openapi.json</a> describes every field.</p>"
        f"<table>{''.join(rows)}</table></body></html>"
    )


class FastPath:
    """Requests with a JSON body do not pass through the web framework. Its routing, body parsing and
    middleware take as much CPU as all the rest of a request, and it would parse a large body, and list
    all that is wrong with it, in the event loop."""

    def __init__(self, app: ASGIApp, routes: Routes, refuse: Refuse) -> None:
        self._app = app
        self._routes = routes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        json = scope["type"] == "http" and scope["method"] == "POST"
        found = self._routes.get(scope["path"]) if json else None
        if found is None:
            await self._app(scope, receive, send)
            return
        kind, answer = found
        try:
            response = await answer(Request(scope, receive), await _payload(kind, receive))
        except (ApiError, RequestError) as error:
            response = self._refuse("POST", scope["path"], error)
        await response(scope, receive, send)


async def _payload(kind: type[BaseModel], receive: Receive) -> BaseModel:
    """The request in a body. Nothing keeps the body's bytes afterwards. Raises ApiError."""
    data = (await receive()).get("body", b"")  # complete and scanned: see guard.py
    return await bodies.model(kind, await bodies.read(data), size=len(data))
