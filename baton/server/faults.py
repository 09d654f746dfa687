"""Faults: everything that can be wrong with a request, as OpenAI's clients expect to be told.

    {"error": {"message": "...", "type": "...", "param": null | "...", "code": null | "..."}}

4xx only where asking again is no use, 5xx and 429 where it may be: the openai client asks again by
itself then. https://platform.openai.com/docs/guides/error-codes
"""

from collections.abc import Sequence
from typing import Any

from baton.errors import RequestError

LONGEST_MESSAGE = 2048  # bytes
INVALID = "invalid_request_error"
OURS = "server_error"

STATUS: dict[str, int] = {
    "invalid_request": 400,
    "invalid_grammar": 400,
    "context_length_exceeded": 400,
    "overloaded": 503,
    "not_ready": 503,
    "timeout": 504,
}
"""Of the codes that the router and this server give; every other is a fault of ours: 500."""


class Fault(Exception):
    """An answer that is not the one asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def bad_request(
        cls, message: str, param: str | None = None, code: str | None = None
    ) -> "Fault":
        return cls(400, message, param=param, code=code)

    @classmethod
    def too_long(cls, message: str) -> "Fault":
        return cls(400, message, param="max_tokens", code="context_length_exceeded")

    @classmethod
    def wrong_key(cls) -> "Fault":
        """The same for a wrong key and for none."""
        text = "a valid API key is needed: send it as `Authorization: Bearer KEY`"
        return cls(401, text, "authentication_error", code="invalid_api_key")

    @classmethod
    def forbidden(cls, message: str) -> "Fault":
        return cls(403, message, "permission_error", code="forbidden")

    @classmethod
    def unknown_path(cls, path: str) -> "Fault":
        text = f"there is nothing at {path[:200]}; /docs lists what there is"
        return cls(404, text, "not_found_error", code="not_found")

    @classmethod
    def unknown_model(cls, model: str, names: Sequence[str]) -> "Fault":
        text = f"there is no model {model[:200]!r} here; this server has {', '.join(names)}"
        return cls(404, text, "not_found_error", param="model", code="model_not_found")

    @classmethod
    def wrong_method(cls, method: str, path: str) -> "Fault":
        return cls(
            405, f"{method[:20]} is not a way to ask {path[:200]}", code="method_not_allowed"
        )

    @classmethod
    def slow(cls, seconds: float) -> "Fault":
        text = f"the request was not whole within {seconds:.0f} s"
        return cls(408, text, code="request_timeout")

    @classmethod
    def too_large(cls, limit: int) -> "Fault":
        text = f"the body is larger than the limit of {limit:,} bytes: shorten it"
        return cls(413, text, code="body_too_large")

    @classmethod
    def limited(cls, why: str, retry_after: int) -> "Fault":
        """This client alone asks too much; the server itself has room."""
        text = f"{why}; try again in {retry_after} s"
        code = "rate_limit_exceeded"
        return cls(429, text, "rate_limit_error", code=code, retry_after=retry_after)

    @classmethod
    def late(cls, seconds: float) -> "Fault":
        text = f"the answer was not there within {seconds:.0f} s: ask for less, or try again"
        return cls(504, text, OURS, code="timeout")

    @classmethod
    def client_left(cls) -> "Fault":
        """Nobody reads this; it stands in the log (nginx's number for it)."""
        return cls(499, "the client has left", code="client_left")

    @classmethod
    def overloaded(cls, waiting: int, limit: int, retry_after: int) -> "Fault":
        text = (
            f"the server is busy: {waiting} requests are waiting (limit {limit}); try again in "
            f"{retry_after} s"
        )
        return cls(503, text, OURS, code="overloaded", retry_after=retry_after)

    @classmethod
    def not_ready(cls, why: str, retry_after: int) -> "Fault":
        text = f"{why}; try again in {retry_after} s"
        return cls(503, text, OURS, code="not_ready", retry_after=retry_after)


def from_failed(code: str, message: str) -> Fault:
    """What the router said of a request that failed."""
    status = STATUS.get(code, 500)
    kind = INVALID if status < 500 else OURS
    param = "max_tokens" if code == "context_length_exceeded" else None
    known = None if code == "invalid_request" else code
    retry_after = 2 if status == 503 else None
    return Fault(status, message, kind, param=param, code=known, retry_after=retry_after)


def from_request_error(error: RequestError, param: str | None = None) -> Fault:
    """A check of ours that a request did not pass."""
    code = None if error.code == "invalid_request" else error.code
    return Fault.bad_request(str(error), param, code)


def body(fault: Fault) -> dict[str, Any]:
    """As JSON, of text that can be sent: short, and without halves of surrogate pairs."""
    message = fault.message[:LONGEST_MESSAGE].encode(errors="replace")[:LONGEST_MESSAGE]
    return {
        "error": {
            "message": message.decode(errors="ignore"),
            "type": fault.kind,
            "param": fault.param,
            "code": fault.code,
        }
    }


def headers(fault: Fault) -> dict[str, str]:
    """What goes with it."""
    found: dict[str, str] = {}
    if fault.status == 401:
        found["WWW-Authenticate"] = "Bearer"
    if fault.retry_after is not None:
        found["Retry-After"] = str(fault.retry_after)
    return found
