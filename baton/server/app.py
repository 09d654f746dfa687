"""The application: routes, and what becomes of errors. What it rests on: desk.py, watch.py, guard.py."""

import html
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from baton.errors import RequestError
from baton.log import REQUEST
from baton.server.answering import CHAT, COMPLETIONS, Answering, Asked
from baton.server.chatting import ChatRequest, DetokenizeRequest, TokenizeRequest
from baton.server.desk import Desk
from baton.server.faults import Fault, body, from_request_error, headers
from baton.server.fields import fault_of
from baton.server.guard import LOOPBACK, Guard, Rules, hashed
from baton.server.job import streamed
from baton.server.metrics import Metrics
from baton.server.protocol import CompletionRequest, in_vocabulary
from baton.server.socket import add_socket
from baton.server.sse import EventStream
from baton.server.talk import Talk
from baton.server.watch import Watch

PAGE = Path(__file__).parent / "page"
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

logger = logging.getLogger(__name__)


def make_app(
    desk: Desk, watch: Watch, talk: Talk, lifespan: Callable[[], Any], version: str
) -> ASGIApp:
    """The whole application, guarded."""

    @asynccontextmanager
    async def around(_: FastAPI) -> AsyncIterator[None]:
        async with lifespan():
            yield

    app = FastAPI(
        title="baton",
        version=version,
        description="Prefill/decode-disaggregated serving behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        lifespan=around,
    )
    refuse = add_errors(app, watch.metrics)
    add_state(app, desk, talk, watch, version)
    answer = add_openai(app, desk, talk, watch)
    app.add_middleware(Answering, answer=answer, refuse=refuse)
    add_socket(app, desk, talk)
    add_page(app, watch)
    settings = desk.settings
    hosts = (*LOOPBACK, settings.host, *settings.allowed_hosts)
    return Guard(app, Rules(hashed(settings.api_keys), hosts, settings.allowed_origins))


def add_errors(app: FastAPI, metrics: Metrics) -> Callable[[str, Fault], Response]:
    """Every error in OpenAI's shape. Returns how a fault is answered."""

    def answer(fault: Fault) -> Response:
        return JSONResponse(body(fault), fault.status, headers=headers(fault))

    def refuse(method: str, fault: Fault) -> Response:
        if fault.status == 503 and method == "POST":
            metrics.rejected(fault.code or "")
        return answer(fault)

    @app.exception_handler(Fault)
    async def on_fault(request: Request, fault: Fault) -> Response:
        return refuse(request.method, fault)

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        return answer(from_request_error(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return answer(fault_of(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        match error.status_code:
            case 404:
                return answer(Fault.unknown_path(path))
            case 405:
                response = answer(Fault.wrong_method(request.method, path))
                response.headers.update(error.headers or {})
                return response
        return answer(Fault(error.status_code, str(error.detail)))

    @app.exception_handler(500)
    async def on_bug(request: Request, error: Exception) -> Response:
        logger.error("a bug of ours", exc_info=error)
        text = f"something went wrong here; the server's log says more at {REQUEST.get()}"
        return answer(Fault(500, text, "server_error", code="internal_error"))

    return refuse


def add_state(app: FastAPI, desk: Desk, talk: Talk, watch: Watch, version: str) -> None:
    """Is it there, what is it, how is it."""

    @app.get("/livez", tags=["state"], response_class=Response)
    async def livez() -> Response:
        """200 while this process lives."""
        return Response()

    @app.get("/health", tags=["state"], response_class=Response)
    @app.get("/ping", tags=["state"], response_class=Response, include_in_schema=False)
    async def health() -> Response:
        """200 when requests are worked on, 503 while loading, draining, or without workers."""
        if why := desk.why_not_ready():
            raise Fault.not_ready(why, 2)
        return Response()

    @app.get("/readyz", tags=["state"])
    async def readyz() -> Response:
        """The same with the state of every worker."""
        why, info = desk.why_not_ready(), desk.line.info
        workers = [
            {"worker": w.worker.partition(".")[0], "role": w.role, "state": w.state}
            for w in (info.workers if info else ())
        ]
        content = {"ready": not why, "why_not": why, "workers": workers}
        return JSONResponse(content, 503 if why else 200)

    @app.get("/version", tags=["state"])
    async def version_() -> dict[str, str]:
        """Of this server."""
        return {"version": version}

    @app.get("/load", tags=["state"])
    async def load() -> dict[str, int]:
        """Requests that this server is at work on."""
        return {"server_load": len(desk.line)}

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """For Prometheus."""
        watch.refresh()
        return Response(watch.metrics.exposition(), media_type="text/plain; version=0.0.4")

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": desk.started,
            "owned_by": "baton",
            "root": desk.files.name,
            "max_model_len": desk.context,
            "chat": talk.chats,
        }

    @app.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        """What is served here."""
        return {"object": "list", "data": [described(name) for name in desk.names]}

    @app.get("/v1/models/{name:path}", tags=["openai"])
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in desk.names:
            raise Fault.unknown_model(name, desk.names)
        return described(name)


def add_openai(
    app: FastAPI, desk: Desk, talk: Talk, watch: Watch
) -> Callable[[Request, Asked], Awaitable[Response]]:
    """Completions and chat, and the tokenizer behind them. Returns how the first two are answered: most
    of them do not come by their routes (answering.py)."""

    @app.post(COMPLETIONS, tags=["openai"])
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue one prompt or several."""
        return await answered(request, asked)

    @app.post(CHAT, tags=["openai"])
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation, by the model's own chat template."""
        return await answered(request, asked)

    async def answered(request: Request, asked: Asked) -> Response:
        own = str(request.scope["state"]["request_id"])  # the client's, if guard.py found it good
        given = own if request.headers.get("x-request-id") == own else ""
        plan = await talk.plan(asked, given)
        named = {} if given else {"X-Request-Id": plan.name}
        watch.begin(plan.name, request.headers.get("traceparent"))
        streams = plan.generation.stream
        job = await desk.begin(
            plan.generation, plan.prompts, plan.name, plan.echoes, streams=streams
        )
        if streams:
            usage = plan.generation.include_usage
            return EventStream(streamed(job, plan.shape, include_usage=usage), named)
        await job.whole(request.receive)
        return JSONResponse(plan.shape.whole(job.choices, job.usage()), headers=named)

    @app.post("/tokenize", tags=["text"])
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        """Text or messages to token ids."""
        ids = await talk.tokenized(asked)
        return {"tokens": list(ids), "count": len(ids), "max_model_len": desk.context}

    @app.post("/detokenize", tags=["text"])
    async def detokenize(asked: DetokenizeRequest) -> dict[str, str]:
        """Token ids to text."""
        in_vocabulary(asked.tokens, desk.files.vocab_size, "tokens")
        return {"prompt": desk.tokenizer.decode(asked.tokens, special=True)}

    return answered


def add_page(app: FastAPI, watch: Watch) -> None:
    """The page, and what it is fed with."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers=SECURITY)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        found = PAGE / name
        if found.parent != PAGE or not found.is_file():
            raise Fault.unknown_path(f"/page/{name}")
        return FileResponse(found, headers=SECURITY)

    @app.get("/timeline", tags=["page"])
    async def timeline() -> Response:
        """What happens to every request, live: server-sent events."""
        return EventStream(watch.feed())

    @app.get("/trace.json", tags=["page"])
    async def trace() -> Response:
        """What happened to every request, in the Chrome trace format: open it in Perfetto."""
        named = {"Content-Disposition": 'attachment; filename="trace.json"'}
        return JSONResponse(watch.trace(), headers=named)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(described(app), headers=SECURITY)


def described(app: FastAPI) -> str:
    """The routes on one page that needs no network."""
    rows = []
    for path, ways in app.openapi()["paths"].items():
        for way, what in ways.items():
            told = html.escape(what.get("description", ""))
            rows.append(
                f"<tr><td>{way.upper()}</td><td><code>{html.escape(path)}</code></td><td>{told}</td></tr>"
            )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>baton: the API</title>"
        "<link rel=stylesheet href=/page/page.css><body class=docs><h1>The API</h1>"
        "<p>OpenAI's, with vLLM's extra fields. Every field: "
        "<a href=/openapi.json>openapi.json</a>.</p>"
        f"<table>{''.join(rows)}</table></body></html>"
    )
