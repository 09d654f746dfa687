"""HTTP: asking a running server, with nothing but the standard library."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from baton.errors import InputError

SLOW_S = 600.0
"""An answer may take this long between two of its bytes."""


@dataclass(frozen=True, slots=True)
class Site:
    """A server of ours, or any other that speaks OpenAI's API."""

    url: str
    key: str = ""

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str, Any]:
        """Status, the request's id, and the JSON of the answer. Raises OSError if nobody answers."""
        try:
            with self._open(path, body) as answer:
                return answer.status, answer.headers.get("x-request-id", ""), json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get("x-request-id", ""), _json(error.read())
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"a broken answer: {error}") from error

    def get(self, path: str) -> Any:
        """JSON. Raises InputError if there is no such server."""
        try:
            with self._open(path, None) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise InputError(f"{self.url}{path}: {told(_json(error.read()))}") from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"no server answers at {self.url}: start one with `python main.py serve`"
            ) from error

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


def told(answer: Any) -> str:
    """The message of an error in OpenAI's shape."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(answer)[:300]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return {"error": {"message": data[:300].decode("utf-8", "replace")}}
