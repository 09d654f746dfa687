"""HttpClient: requests to a running HTTP server, with the standard library alone."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any

from baton.errors import InputError
from baton.package import COMMAND

TIMEOUT_S = 600.0
"""The longest wait for the next byte of a response."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, errors included. `body` is its JSON; for an error whose body is not JSON, an error
    object in OpenAI's shape with that text."""

    status: int
    body: Any
    request_id: str = ""
    retry_after: str = ""


@dataclass(frozen=True, slots=True)
class HttpClient:
    """A server with OpenAI's API: ours or any other."""

    url: str
    key: str = ""

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """POST the body, or GET if there is none. Raises OSError if the server cannot be reached, and
        ValueError if a successful response is not JSON."""
        try:
            with self._open(path, body) as answer:
                return _reply(answer.status, answer.headers, json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return _reply(error.code, error.headers, _json(error.read()))
        except http.client.HTTPException as error:
            raise OSError(f"the response is broken: {error}") from error

    def get(self, path: str) -> Any:
        """The JSON of a GET. Raises InputError if the server cannot be reached or answers with an
        error."""
        try:
            reply = self.ask(path)
        except (OSError, ValueError) as error:
            raise unreachable(self, error) from error
        if reply.status >= 400:
            raise InputError(f"{self.url}{path}: {error_message(reply.body)}")
        return reply.body

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The chunks of a streamed response. Raises InputError with the server's message."""
        try:
            with self._open(path, body) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        yield json.loads(line.removeprefix(b"data: "))
        except urllib.error.HTTPError as error:
            with error:
                raise InputError(error_message(_json(error.read()))) from error
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"the connection to {self.url} broke: {error}") from error

    def _open(self, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return answer


def unreachable(client: HttpClient, error: Exception) -> InputError:
    """The error for a URL where no server, or no server of this kind, answers."""
    why = str(getattr(error, "reason", error)) or type(error).__name__
    return InputError(
        f"no server answers at {client.url} ({why}): start one with `{COMMAND} serve`"
    )


def error_message(body: Any) -> str:
    """The message of an error in OpenAI's shape, in one line."""
    error = body.get("error") if isinstance(body, dict) else None
    text = str(error.get("message")) if isinstance(error, dict) else str(body)[:300]
    return " ".join(text.split())


def _reply(status: int, headers: Message, body: Any) -> Reply:
    request_id, retry_after = headers.get("x-request-id", ""), headers.get("Retry-After", "")
    return Reply(status, body, request_id, retry_after)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return {"error": {"message": data[:300].decode("utf-8", "replace")}}
