"""Site: asking a running server over HTTP, with nothing but the standard library."""

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

SLOW_S = 600.0
"""An answer may take this long between two of its bytes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answers, refusals included. `body` is its JSON; of a refusal that is none, one in
    OpenAI's shape that holds its text."""

    status: int
    body: Any
    request_id: str = ""
    retry_after: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """A server of ours, or any other that speaks OpenAI's API."""

    url: str
    key: str = ""

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """POST of the body, or GET without one. Raises OSError if nobody answers, and ValueError for
        an answer that is no JSON."""
        try:
            with self._open(path, body) as answer:
                return _reply(answer.status, answer.headers, json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return _reply(error.code, error.headers, _json(error.read()))
        except http.client.HTTPException as error:
            raise OSError(f"a broken answer: {error}") from error

    def get(self, path: str) -> Any:
        """JSON. Raises InputError if there is no such server, or it refuses."""
        try:
            reply = self.ask(path)
        except (OSError, ValueError) as error:
            raise nobody(self, error) from error
        if reply.status >= 400:
            raise InputError(f"{self.url}{path}: {told(reply.body)}")
        return reply.body

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The chunks of a streamed answer. Raises InputError with the server's own words."""
        try:
            with self._open(path, body) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        yield json.loads(line.removeprefix(b"data: "))
        except urllib.error.HTTPError as error:
            with error:
                raise InputError(told(_json(error.read()))) from error
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"the connection to {self.url} broke: {error}") from error

    def _open(self, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=SLOW_S)
        return answer


def nobody(site: Site, error: Exception) -> InputError:
    """Nobody is there, or somebody else."""
    why = str(getattr(error, "reason", error)) or type(error).__name__
    return InputError(f"no server answers at {site.url} ({why}): start one with `{COMMAND} serve`")


def told(answer: Any) -> str:
    """The message of an error in OpenAI's shape, in one line."""
    error = answer.get("error") if isinstance(answer, dict) else None
    text = str(error.get("message")) if isinstance(error, dict) else str(answer)[:300]
    return " ".join(text.split())


def _reply(status: int, headers: Message, body: Any) -> Reply:
    request_id, retry_after = headers.get("x-request-id", ""), headers.get("Retry-After", "")
    return Reply(status, body, request_id, retry_after)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return {"error": {"message": data[:300].decode("utf-8", "replace")}}
