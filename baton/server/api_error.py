"""API errors, in the form that OpenAI's clients read.

    {"error": {"message": "...", "type": "...", "param": null | "...", "code": null | "..."}}

4xx where a retry cannot help, 5xx where it may: the openai client then retries by itself. Not after
deadline_exceeded: its user wanted an end by then, and would get three times as long. The paths of
Anthropic's API have its form: {"type": "error", "error": {"type": "...", "message": "..."}}.
https://platform.openai.com/docs/guides/error-codes
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse

from baton.errors import RequestError
from baton.log import REQUEST

SHOWN = 80  # characters of what a client sent
LONGEST_TEXT = 300
LONGEST_MESSAGE = 2048  # bytes
INVALID = "invalid_request_error"
OURS = "server_error"

STATUS: dict[str, int] = {
    "invalid_request": 400,
    "invalid_grammar": 400,
    "model_not_found": 404,
    "context_length_exceeded": 400,
    "unsupported": 400,
    "overloaded": 503,
    "not_ready": 503,
    "queue_timeout": 503,
    "deadline_exceeded": 504,
    "timeout": 504,
}
"""By the codes of router and server; any other code is an internal error: 500."""
MESSAGES_PATH = "/v1/messages"
"""The paths of Anthropic's API begin so."""
MESSAGES_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Its types of errors, by status: https://docs.claude.com/en/api/errors"""


@dataclass(eq=False)
class ApiError(Exception):
    """An error response."""

    status: int
    message: str
    kind: str = INVALID
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None  # seconds
    headers: dict[str, str] = field(default_factory=dict)  # more of the response

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @classmethod
    def bad_request(
        cls, message: str, param: str | None = None, code: str | None = None
    ) -> "ApiError":
        return cls(400, message, param=param, code=code)

    @classmethod
    def wrong_key(cls) -> "ApiError":
        """For a wrong key and for none."""
        text = "a valid API key is needed: send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`"
        return cls(401, text, "authentication_error", code="invalid_api_key")

    @classmethod
    def forbidden(cls, message: str) -> "ApiError":
        return cls(403, message, "permission_error", code="forbidden")

    @classmethod
    def unknown_path(cls, path: str) -> "ApiError":
        text = f"not found: {path[:200]}; see /docs for all paths"
        return cls(404, text, "not_found_error", code="not_found")

    @classmethod
    def unknown_model(cls, model: str, names: Sequence[str]) -> "ApiError":
        text = f"model not found: {model[:200]!r}; this server serves {', '.join(names)}"
        return cls(404, text, "not_found_error", param="model", code="model_not_found")

    @classmethod
    def wrong_method(cls, method: str, path: str) -> "ApiError":
        text = f"method not allowed: {method[:20]} for {path[:200]}"
        return cls(405, text, code="method_not_allowed")

    @classmethod
    def slow(cls, seconds: float) -> "ApiError":
        text = f"the request was not complete within {seconds:.0f} s"
        return cls(408, text, code="request_timeout")

    @classmethod
    def too_large(cls, limit: int) -> "ApiError":
        text = f"the body is larger than the limit of {limit:,} bytes: shorten it"
        return cls(413, text, code="body_too_large")

    @classmethod
    def client_left(cls) -> "ApiError":
        """For the log only; 499 is nginx's status."""
        return cls(499, "the client has disconnected", code="client_left")

    @classmethod
    def overloaded(cls, waiting: int, limit: int, retry_after: int) -> "ApiError":
        return cls._busy(f"{waiting} requests are waiting (limit {limit})", retry_after)

    @classmethod
    def over_share(cls, held: int, free: int, retry_after: int) -> "ApiError":
        """The client holds its part of the places; the rest is for others."""
        why = (
            f"{held} requests of this client are waiting, and the last {free} places are for others"
        )
        return cls._busy(why, retry_after)

    @classmethod
    def much_arrives(cls, held: int, limit: int, retry_after: int) -> "ApiError":
        why = f"{held:,} bytes of requests are arriving (limit {limit:,}, shared among clients)"
        return cls._busy(why, retry_after)

    @classmethod
    def rate_limited(cls, why: str, retry_after: int) -> "ApiError":
        """The client has used its quota; others have not."""
        text = f"{why}; try again in {retry_after} s"
        kind, code = "rate_limit_error", "rate_limit_exceeded"
        return cls(429, text, kind, code=code, retry_after=retry_after)

    @classmethod
    def _busy(cls, why: str, retry_after: int) -> "ApiError":
        text = f"the server is busy: {why}; try again in {retry_after} s"
        return cls(503, text, OURS, code="overloaded", retry_after=retry_after)

    @classmethod
    def bug(cls, request: str) -> "ApiError":
        """For what nobody expected; `request`: its id in the log."""
        text = f"internal error; for details see request {request} in the server's log"
        return cls(500, text, OURS, code="internal_error")

    @classmethod
    def not_ready(cls, why: str, retry_after: int) -> "ApiError":
        text = f"{why}; try again in {retry_after} s"
        return cls(503, text, OURS, code="not_ready", retry_after=retry_after)


def from_failed(code: str, message: str, param: str | None = None) -> ApiError:
    """A request that the router, or a check of this server, refused or gave up."""
    status = STATUS.get(code, 500)
    kind = INVALID if status < 500 else OURS
    if code == "context_length_exceeded":
        param = "max_tokens"
    known = None if code == "invalid_request" else code
    retry_after = 2 if status == 503 else None
    return ApiError(status, message, kind, param=param, code=known, retry_after=retry_after)


def from_request_error(error: RequestError, param: str | None = None) -> ApiError:
    """`param`: the field, where it is not the error's own."""
    return from_failed(error.code, str(error), param or error.param)


def from_validation_error(error: RequestValidationError | ValidationError) -> ApiError:
    """The first thing that is wrong, in one line, with the field's name."""
    first = error.errors()[0]
    where = [str(each) for each in first["loc"] if each != "body"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not where and ": " in message:  # of several fields: the message names one itself
        name, _, message = message.partition(": ")
        where = [name]
    param = where[0] if where else None
    if first["type"] == "json_invalid":
        return ApiError.bad_request(f"the body is not valid JSON: {message}"[:LONGEST_TEXT])
    given = repr(_beginning(first.get("input")))[:SHOWN]
    path = ".".join(where)[:SHOWN]
    text = f"{path}: {message}, got {given}" if path else f"{message}, got {given}"
    return ApiError.bad_request(text[:LONGEST_TEXT], param)


def _beginning(whole: Any) -> Any:
    """As much of a value as can be shown: repr() of all of a large one would hold up other requests."""
    room = iter(range(SHOWN))  # each value within takes a character at least

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            return value[:SHOWN]
        if isinstance(value, dict):
            return {
                str(name)[:SHOWN]: cut(value[name]) for name, _ in zip(value, room, strict=False)
            }
        if isinstance(value, list):
            return [cut(each) for each, _ in zip(value, room, strict=False)]
        return value

    return cut(whole)


def body(error: ApiError) -> dict[str, Any]:
    """As JSON. The message is cut to LONGEST_MESSAGE and has no halves of surrogate pairs."""
    return {
        "error": {
            "message": _shown(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def messages_body(error: ApiError, request_id: str = "") -> dict[str, Any]:
    """As JSON, in the form of Anthropic's API. `request_id`: if it is not that of the context."""
    kind = MESSAGES_KINDS.get(error.status, INVALID if error.status < 500 else "api_error")
    about = {"type": kind, "message": _shown(error)}
    return {"type": "error", "error": about, "request_id": request_id or REQUEST.get()}


def _shown(error: ApiError) -> str:
    message = error.message[:LONGEST_MESSAGE].encode(errors="replace")[:LONGEST_MESSAGE]
    return message.decode(errors="ignore")


def response(error: ApiError, path: str = "") -> JSONResponse:
    """The HTTP response, in the form of the API that has this path."""
    found = dict(error.headers)
    if error.status == 401:
        found["WWW-Authenticate"] = "Bearer"
    if error.code == "deadline_exceeded":
        found["X-Should-Retry"] = "false"
    if error.retry_after is not None:
        found["Retry-After"] = str(error.retry_after)
    form = messages_body if path.startswith(MESSAGES_PATH) else body
    return JSONResponse(form(error), error.status, headers=found)
