"""survey(): what serves at a URL: the kind of server, its model, its limits; and whether it fits here.

It asks for the models, for the ids of a text, and for two tokens after a few ids, as a request would. A
wrong model, a text without token ids, or a short context are found before the worker joins, and again
when the upstream comes back after it was gone.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from errno import ECONNREFUSED
from typing import Any, NamedTuple

from baton.errors import BatonError, InputError
from baton.params import GenerationParams
from decode_worker.upstream.dialects import (
    DIALECTS,
    LLAMA,
    OTHER,
    OWNERS,
    Asked,
    Dialect,
    Json,
    body_of,
    loaded,
    read_piece,
)
from decode_worker.upstream.events import EventReader
from sampler.params import SamplingParams

SAMPLE = "Two naïve façades, 日本語 and\n\tdef f(x): return x  # 3.14"
"""Tokenizers that agree on this text are the same, or near enough to be told by nobody."""
PROBE_IDS, PROBE_TOKENS = 8, 2


class Reply(NamedTuple):
    """A whole HTTP reply."""

    status: int
    body: bytes


Fetch = Callable[[str, str, Json | None], Awaitable[Reply]]
"""method, path, body -> the reply. Raises OSError."""


class Unready(BatonError):
    """The upstream cannot be used yet: it does not answer, or answers that it is busy or loading."""


class Unfit(InputError):
    """The upstream cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an upstream must be. `context` in tokens; `ids`: the model's own ids of SAMPLE."""

    kind: str  # a name of DIALECTS, or auto
    model: str  # its name there; empty: the only one
    context: int
    vocabulary: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found."""

    dialect: str
    model: str
    slots: int = 0  # requests that it runs at once, 0: not known


async def survey(fetch: Fetch, expected: Expected) -> Survey:
    """Raises Unready or Unfit, with what the upstream said."""
    listed = await _object(fetch, "GET", "/v1/models", None)
    found = _model(listed, expected.model)
    dialect = _dialect(found, expected.kind)
    context, slots = await _limits(fetch, found, dialect)
    if 0 < context < expected.context:
        raise Unfit(
            f"the upstream's context is {context:,} tokens, this cluster promises "
            f"{expected.context:,}: start the router and the workers with --max-model-len {context}"
        )
    await _same_tokenizer(fetch, found["id"], dialect, expected)
    await _token_ids(fetch, found["id"], dialect, expected)
    return Survey(dialect.name, found["id"], slots)


def changed(before: Survey, now: Survey) -> str:
    """Why a worker that began with one cannot go on with the other; empty if it can."""
    if (before.dialect, before.model) == (now.dialect, now.model):
        return ""
    return (
        f"it was {before.dialect} with {before.model!r:.200} and is {now.dialect} with "
        f"{now.model!r:.200} now: restart this worker"
    )


# ---- what serves there


def _model(listed: Json, wanted: str) -> Json:
    """The entry of /v1/models."""
    data = listed.get("data") or []
    if not isinstance(data, list):
        raise Unfit("/v1/models of the upstream is no list: it has no OpenAI-compatible API")
    entries = [e for e in data if isinstance(e, dict) and isinstance(e.get("id"), str)]
    names = [entry["id"] for entry in entries]
    shown = ", ".join(repr(name)[:80] for name in names[:8]) or "none"
    if not wanted and len({entry.get("root") or entry["id"] for entry in entries}) > 1:
        raise Unfit(f"the upstream serves several models: name one by --upstream-model: {shown}")
    for entry in entries:
        if wanted in ("", entry["id"]):
            return entry
    raise Unfit(f"the upstream does not serve the model {wanted!r}; it serves {shown}")


def _dialect(found: Json, kind: str) -> Dialect:
    if kind != "auto":
        return DIALECTS[kind]
    return OWNERS.get(str(found.get("owned_by")).lower(), OTHER)


async def _limits(fetch: Fetch, found: Json, dialect: Dialect) -> tuple[int, int]:
    """Context of one request, in tokens, and requests at once; 0 where it is not known."""
    context, slots = found.get("max_model_len"), 0
    if dialect is LLAMA:
        props = await _optional(fetch, "GET", "/props", None)
        settings = props.get("default_generation_settings")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        slots = props.get("total_slots", 0)
    return (context if type(context) is int else 0), (slots if type(slots) is int else 0)


async def _same_tokenizer(fetch: Fetch, model: str, dialect: Dialect, expected: Expected) -> None:
    """Where the upstream tokenizes for others."""
    body: Json = {"model": model, "prompt": SAMPLE, "add_special_tokens": False}
    if dialect is LLAMA:
        body = {"content": SAMPLE, "add_special": False}
    ids = (await _optional(fetch, "POST", "/tokenize", body)).get("tokens")
    if isinstance(ids, list) and tuple(ids) != expected.ids:
        raise Unfit(
            f"the upstream's model {model!r:.200} has another tokenizer than --model: a text of "
            f"{len(expected.ids)} tokens here has {len(ids)} there, or other ones; give the model that "
            "it serves"
        )


async def _token_ids(fetch: Fetch, model: str, dialect: Dialect, expected: Expected) -> None:
    """Ask for two tokens, as a request would."""
    params = GenerationParams(PROBE_TOKENS, SamplingParams(temperature=0.0), ignore_eos=True)
    asked = Asked(model, expected.ids[:PROBE_IDS], PROBE_TOKENS, 0, params)
    reply = await _reply(fetch, "POST", dialect.path, body_of(dialect, asked))
    if reply.status != 200:
        raise _error(
            f"a test (two tokens after some token ids, asked as {dialect.title} is) failed", reply
        )
    ids: list[int] = []
    try:
        for text in _events(reply.body):
            piece = read_piece(text)
            if piece.error:
                raise Unready(f"its answer to a test is an error: {piece.error}")
            ids += piece.token_ids or ()
    except ValueError as error:
        raise Unfit(f"the upstream's answer to a test cannot be read: {error}") from error
    if not ids:
        raise Unfit(
            "the upstream returns text without token ids, and text that is tokenized again is not the "
            f"same sequence; it was asked as {dialect.title} is, which needs {dialect.needs}. Another "
            f"kind of server: --upstream-kind {'|'.join(DIALECTS)}"
        )
    if max(ids) >= expected.vocabulary or len(ids) > PROBE_TOKENS:
        raise Unfit(
            f"the upstream returned the token ids {ids[:8]} for {PROBE_TOKENS} tokens of a vocabulary of "
            f"{expected.vocabulary:,}: it serves another model, or it is no {dialect.title}"
        )


def _events(body: bytes) -> list[str]:
    reader = EventReader(streamed=not body.lstrip().startswith(b"{"))
    return reader.feed(body) + reader.end()


# ---- HTTP


async def _reply(fetch: Fetch, method: str, path: str, body: Json | None) -> Reply:
    try:
        return await fetch(method, path, body)
    except OSError as error:
        raise Unready(reason_of(error)) from error


async def _object(fetch: Fetch, method: str, path: str, body: Json | None) -> Json:
    reply = await _reply(fetch, method, path, body)
    if reply.status != 200:
        raise _error(f"{method} {path} failed", reply)
    try:
        found = loaded(reply.body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unfit(f"{path} of the upstream is no JSON object: it has no OpenAI-compatible API")
    return found


async def _optional(fetch: Fetch, method: str, path: str, body: Json | None) -> Json:
    """The object, or an empty one where the server has no such path."""
    try:
        return await _object(fetch, method, path, body)
    except Unfit:
        return {}


def _error(what: str, reply: Reply) -> BatonError:
    said = f"{what}: status {reply.status}: {message_of(reply.body)}"
    if reply.status in (401, 403):
        return Unfit(f"{said}; give its key by --upstream-key-file")
    if reply.status in (429, 503) or reply.status >= 500:
        return Unready(said)
    return Unfit(said)


def reason_of(error: Exception) -> str:
    """What went wrong on the way, in one line."""
    if refused(error):
        return "connection refused"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "the connection was reset"
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text[:300] or type(error).__name__


def refused(error: Exception) -> bool:
    """The host is there, and nothing listens. asyncio puts the errors of several addresses into one."""
    return isinstance(error, ConnectionRefusedError) or f"[Errno {ECONNREFUSED}]" in str(error)


def message_of(body: bytes) -> str:
    """The message of an error in OpenAI's shape or FastAPI's, in one line; else the body's beginning."""
    found: Any
    try:
        found = loaded(body)
    except ValueError:
        found = body[:300].decode("utf-8", "replace")
    if isinstance(found, dict):
        found = found.get("error", found.get("detail", found.get("message", found)))
    if isinstance(found, dict) and "message" in found:
        found = found["message"]
    return " ".join(str(found).split())[:300] or "no message"
