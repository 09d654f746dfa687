"""Error responses: status, form, headers, and a limited length."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import RequestError
from baton.server.api_error import (
    LONGEST_MESSAGE,
    ApiError,
    body,
    from_failed,
    from_request_error,
    response,
)

SENT = ("WWW-Authenticate", "Connection", "Retry-After")
BAD, OURS = "invalid_request_error", "server_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code", "sent"),
    [
        (ApiError.bad_request("no", "n"), 400, BAD, "n", None, {}),
        (ApiError.wrong_key(), 401, "authentication_error", None, "invalid_api_key",
         {"WWW-Authenticate": "Bearer"}),
        (ApiError.forbidden("no"), 403, "permission_error", None, "forbidden", {}),
        (ApiError.unknown_model("a", ["b"]), 404, "not_found_error", "model", "model_not_found", {}),
        (ApiError.unknown_path("/a"), 404, "not_found_error", None, "not_found", {}),
        (ApiError.wrong_method("PUT", "/a"), 405, BAD, None, "method_not_allowed", {}),
        (ApiError.slow(10), 408, BAD, None, "request_timeout", {}),
        (ApiError.too_large(4), 413, BAD, None, "body_too_large", {}),
        (ApiError.overloaded(9, 8, 2), 503, OURS, None, "overloaded", {"Retry-After": "2"}),
        (ApiError.not_ready("loading", 2), 503, OURS, None, "not_ready", {"Retry-After": "2"}),
    ],
)  # fmt: skip
def test_every_row_of_the_table(
    error: ApiError,
    status: int,
    kind: str,
    param: str | None,
    code: str | None,
    sent: dict[str, str],
) -> None:
    told = body(error)["error"]
    assert (error.status, told["type"], told["param"], told["code"]) == (status, kind, param, code)
    assert list(told) == ["message", "type", "param", "code"]
    assert told["message"] == error.message == str(error) != ""
    found = response(error).headers
    assert {name: found[name] for name in SENT if name in found} == sent


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("invalid_request", 400, BAD), ("invalid_grammar", 400, BAD),
        ("context_length_exceeded", 400, BAD), ("worker_lost", 500, OURS),
        ("fill_failed", 500, OURS), ("numerical_error", 500, OURS), ("grammar_failed", 500, OURS),
        ("aborted", 500, OURS), ("a code of tomorrow", 500, OURS), ("overloaded", 503, OURS),
        ("not_ready", 503, OURS), ("timeout", 504, OURS),
    ],
)  # fmt: skip
def test_what_the_router_says_has_a_status(code: str, status: int, kind: str) -> None:
    error = from_failed(code, "the reason")
    assert (error.status, error.kind, error.message) == (status, kind, "the reason")
    assert error.code == (None if code == "invalid_request" else code)
    assert error.param == ("max_tokens" if code == "context_length_exceeded" else None)
    assert ("Retry-After" in response(error).headers) == (status == 503)


def test_a_check_that_failed_is_a_bad_request() -> None:
    plain = from_request_error(RequestError("no"), "prompt")
    assert (plain.status, plain.message, plain.param, plain.code) == (400, "no", "prompt", None)
    long = from_request_error(RequestError("long", code="context_length_exceeded"))
    assert (long.param, long.code) == ("max_tokens", "context_length_exceeded")
    own = from_request_error(RequestError("no", param="stop_token_ids"))
    assert own.param == "stop_token_ids"


@given(st.text(st.characters(exclude_categories=()), max_size=40), st.integers(1, 200))
def test_a_message_is_short_and_can_be_sent(text: str, times: int) -> None:
    """Surrogates among it, which json.loads lets in and no socket out."""
    message = body(ApiError(400, text * times))["error"]["message"]
    assert len(message.encode()) <= LONGEST_MESSAGE
    json.dumps(message, ensure_ascii=False).encode()
    if text.isascii() and len(text) * times <= LONGEST_MESSAGE:
        assert message == text * times


def test_a_message_is_not_cut_within_a_character() -> None:
    message = body(ApiError(400, "a" + "😀" * 1000))["error"]["message"]
    assert message == "a" + "😀" * 511


@pytest.mark.parametrize(
    "error",
    [
        ApiError.unknown_model("m" * 10**6, ["demo"]),
        ApiError.unknown_path("/" * 10**6),
        ApiError.wrong_method("M" * 10**6, "/" * 10**6),
    ],
)
def test_what_a_client_made_long_is_not_sent_back(error: ApiError) -> None:
    assert len(error.message) < 400
