"""survey(): what serves at a URL: the kind of server, its model, its limits; and whether it fits here.

It asks for the models, for the ids of a text, and for two tokens after a few ids, as a request would. A
wrong model, a text without token ids, or a short context are found before the worker joins, and again
when the upstream comes back after it was gone.

A server of unknown kind that takes or returns no ids is asked for text instead.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from errno import ECONNREFUSED
from typing import Any, NamedTuple

from baton.errors import BatonError, InputError
from baton.params import GenerationParams
from decode_worker.upstream.dialects import (
    DIALECTS,
    LLAMA,
    OTHER,
    OWNERS,
    PLAIN,
    TEXT,
    Asked,
    Dialect,
    Json,
    Piece,
    body_of,
    loaded,
    read_piece,
)
from decode_worker.upstream.events import EventReader
from sampler.params import SamplingParams

SAMPLE = "Two naïve façades, 日本語 and\n\tdef f(x): return x  # 3.14"
"""Tokenizers that agree on this text are the same, or near enough to be told by nobody."""
PROBE_IDS, PROBE_TOKENS = 8, 2
REFUSALS = (400, 404, 405, 415, 422, 500, 501)
"""What servers answer to a request whose form they do not know."""


class Reply(NamedTuple):
    """A whole HTTP reply."""

    status: int
    body: bytes


Fetch = Callable[[str, str, Json | None], Awaitable[Reply]]
"""method, path, body -> the reply. Raises OSError."""


class Unready(BatonError):
    """The upstream cannot be used yet: it does not answer, or answers that it is busy or loading.
    `status`: of its answer, if there was one."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


class Unfit(InputError):
    """The upstream cannot be used as it is."""


class NoIds(Unfit):
    """It takes no token ids, or returns none."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an upstream must be. `context` in tokens; `ids`: the model's own ids of SAMPLE."""

    kind: str  # a name of DIALECTS, or auto
    model: str  # its name there; empty: the only one
    context: int
    vocabulary: int
    ids: tuple[int, ...]
    first: int = 0  # special tokens that the tokenizer puts before a text


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found."""

    dialect: str
    model: str
    slots: int = 0  # requests that it runs at once, 0: not known
    answers_as: str = ""  # the model's name in its answers, if they have one
    listed: bool = True  # in its /v1/models
    adds: bool = True  # a server of text puts the tokenizer's special tokens before a prompt


async def survey(fetch: Fetch, expected: Expected) -> Survey:
    """Raises Unready or Unfit, with what the upstream said."""
    found, listed = await _listed(fetch, expected)
    dialect = _dialect(found, expected.kind)
    context, slots = await _limits(fetch, found, dialect)
    if 0 < context < expected.context:
        raise Unfit(
            f"the upstream's context is {context:,} tokens, this cluster promises "
            f"{expected.context:,}: start the router and the workers with --max-model-len {context}"
        )
    await _same_tokenizer(fetch, found["id"], dialect, expected)
    if not dialect.text:
        try:
            names = await _token_ids(fetch, found["id"], dialect, expected)
            return Survey(dialect.name, found["id"], slots, names, listed)
        except NoIds:
            if dialect is not OTHER or expected.kind != "auto":
                raise
    asked_as = (TEXT, PLAIN) if not dialect.text else (dialect,)
    return replace(await _text(fetch, found["id"], asked_as, expected), listed=listed)


async def still_there(fetch: Fetch, found: Survey) -> str:
    """Why the server is not the one that was found, at a glance; empty if it may be. Raises OSError."""
    if not found.listed:
        return ""
    reply = await fetch("GET", "/v1/models", None)
    if reply.status != 200:  # its health is looked at elsewhere
        return ""
    try:
        entries = loaded(reply.body)["data"]
        names = [entry["id"] for entry in entries]
    except (ValueError, KeyError, TypeError):
        return ""
    return "" if found.model in names or not names else f"it serves {_shown(names)} now"


def changed(before: Survey, now: Survey) -> str:
    """Why a worker that began with one cannot go on with the other; empty if it can."""
    same = (before.dialect, before.model) == (now.dialect, now.model)
    if same and before.answers_as == now.answers_as:
        return ""
    return (
        f"it was {before.dialect} with {before.answers_as or before.model!r:.200} and is {now.dialect} "
        f"with {now.answers_as or now.model!r:.200} now: restart this worker"
    )


# ---- what serves there


async def _listed(fetch: Fetch, expected: Expected) -> tuple[Json, bool]:
    """The entry of /v1/models, and whether it is there. Whoever names the model and the kind needs no
    right list: some servers list what lies on their disk, and serve what they were started with."""
    try:
        return _model(await _object(fetch, "GET", "/v1/models", None), expected.model), True
    except Unfit:
        if not expected.model or expected.kind == "auto":
            raise
    except Unready as error:
        if not expected.model or expected.kind == "auto" or error.status not in REFUSALS:
            raise
    return {"id": expected.model}, False


def _model(listed: Json, wanted: str) -> Json:
    """The entry of /v1/models."""
    data = listed.get("data") or []
    if not isinstance(data, list):
        raise Unfit("/v1/models of the upstream is no list: it has no OpenAI-compatible API")
    entries = [e for e in data if isinstance(e, dict) and isinstance(e.get("id"), str)]
    names = [entry["id"] for entry in entries]
    shown = _shown(names)
    if not wanted and len({entry.get("root") or entry["id"] for entry in entries}) > 1:
        raise Unfit(f"the upstream serves several models: name one by --upstream-model: {shown}")
    for entry in entries:
        if wanted in ("", entry["id"]):
            return entry
    if not wanted:
        raise Unfit(
            "the upstream serves none: --upstream-model and --upstream-kind say what it has"
        )
    raise Unfit(
        f"the upstream does not list the model {wanted!r}; it lists {shown}. If it serves it all the "
        "same, say which kind of server it is by --upstream-kind"
    )


def _shown(names: list[str]) -> str:
    return ", ".join(repr(name)[:80] for name in names[:8]) or "none"


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


async def _token_ids(fetch: Fetch, model: str, dialect: Dialect, expected: Expected) -> str:
    """Ask for two tokens, as a request would. The model's name in the answer. Raises NoIds."""
    unknown = dialect is OTHER and expected.kind == "auto"  # text is another way
    params = GenerationParams(PROBE_TOKENS, SamplingParams(temperature=0.0), ignore_eos=True)
    asked = Asked(model, expected.ids[:PROBE_IDS], PROBE_TOKENS, 0, params)
    reply = await _reply(fetch, "POST", dialect.path, body_of(dialect, asked))
    if reply.status != 200:
        refusal = _error(
            f"a test (two tokens after some token ids, asked as {dialect.title} is) failed", reply
        )
        form = reply.status in REFUSALS and (isinstance(refusal, Unfit) or unknown)
        raise NoIds(str(refusal)) if form else refusal
    try:
        pieces = _pieces(reply.body)
    except Unready as error:
        if unknown:
            raise NoIds(str(error)) from error
        raise
    ids = [token for piece in pieces for token in piece.token_ids or ()]
    if not ids:
        raise NoIds(
            "the upstream returns text without token ids, and text that is tokenized again is not the "
            f"same sequence; it was asked as {dialect.title} is, which needs {dialect.needs}. Another "
            f"kind of server: --upstream-kind {'|'.join(DIALECTS)}"
        )
    if max(ids) >= expected.vocabulary or len(ids) > PROBE_TOKENS:
        raise Unfit(
            f"the upstream returned the token ids {ids[:8]} for {PROBE_TOKENS} tokens of a vocabulary of "
            f"{expected.vocabulary:,}: it serves another model, or it is no {dialect.title}"
        )
    return _name_in(pieces)


async def _text(
    fetch: Fetch, model: str, dialects: Sequence[Dialect], expected: Expected
) -> Survey:
    """Ask for two tokens after a text: in the first of these ways that is not refused."""
    params = GenerationParams(PROBE_TOKENS, SamplingParams(temperature=0.0))
    asked = Asked(model, expected.ids, PROBE_TOKENS, 0, params, streamed=False, text=SAMPLE)
    for dialect in dialects:
        reply = await _reply(fetch, "POST", dialect.path, body_of(dialect, asked))
        if reply.status not in REFUSALS:
            break
    if reply.status != 200:
        raise _error(f"a test (two tokens after a text, asked as {dialect.title} is) failed", reply)
    pieces = _pieces(reply.body)
    if not any(piece.text or piece.finish for piece in pieces):
        raise Unfit(
            "the upstream's answer to a test is no completion: "
            f"{reply.body[:80].decode(errors='replace')}"
        )
    counted = _counted(reply.body)
    ways = (len(expected.ids) + expected.first, len(expected.ids))
    if counted is not None and counted not in ways:
        raise Unfit(
            f"the upstream counts {counted} tokens in a text that has {ways[0]} in --model: it serves a "
            "model with another tokenizer; give the one that it serves"
        )
    return Survey(dialect.name, model, 0, _name_in(pieces), adds=counted in (None, ways[0]))


def _counted(body: bytes) -> int | None:
    """Tokens of the prompt by the upstream's own count."""
    try:
        usage = loaded(body).get("usage") or {}
        counted = usage.get("prompt_tokens")
    except (ValueError, AttributeError):
        return None
    return counted if type(counted) is int and counted > 0 else None


def _name_in(pieces: Sequence[Piece]) -> str:
    return next((piece.model for piece in pieces if piece.model), "")


def _pieces(body: bytes) -> list[Piece]:
    """Of a reply to a test."""
    try:
        pieces = [read_piece(text) for text in _events(body)]
    except ValueError as error:
        raise Unfit(f"the upstream's answer to a test cannot be read: {error}") from error
    for piece in pieces:
        if piece.error:
            raise Unready(f"its answer to a test is an error: {piece.error}")
    return pieces


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
        return Unready(said, reply.status)
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
