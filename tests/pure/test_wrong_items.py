"""A body of many wrong items costs one error: pydantic makes and lists an error for each, and 300,000 of
them hold up all other requests for a second."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from baton.server.api_error import SHOWN, ApiError, from_validation_error
from baton.server.embeddings import EmbeddingRequest
from baton.server.messages.schema import CountRequest, MessagesRequest
from baton.server.responses.schema import ResponsesRequest
from baton.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

KINDS = (
    CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest,
    ResponsesRequest, CountRequest, MessagesRequest, EmbeddingRequest,
)  # fmt: skip
MANY = 20_000
FEW = 2_000
HI = [{"role": "user", "content": "hi"}]
NEEDED = {"prompt": "hi", "messages": HI, "input": "hi", "tokens": [1], "max_tokens": 1}
WRONG: tuple[Any, ...] = (
    [5.5] * MANY, [None] * MANY, [{}] * MANY, [[5.5]] * MANY, [{"type": 5, "role": 5}] * MANY,
    {str(each): [] for each in range(MANY)},
)  # fmt: skip


def nodes(schema: Any, guarded: bool = False) -> Iterator[tuple[dict[str, Any], bool]]:
    """All schemas within one, each with: does a function look at its value first?"""
    if isinstance(schema, list | tuple):
        for each in schema:
            yield from nodes(each)
    elif isinstance(schema, dict):
        if "type" in schema:
            yield schema, guarded
        before = schema.get("type") == "function-before"
        for name, each in schema.items():
            if name not in ("serialization", "cls"):
                yield from nodes(each, before and name == "schema")


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_and_object_is_bounded_before_its_items_are_checked(
    kind: type[BaseModel],
) -> None:
    """A list's size is seen first; an object's last, so a function must look at it."""
    seen = 0
    for schema, guarded in nodes(kind.__pydantic_core_schema__):
        items = schema.get("items_schema", {"type": "any"})
        if schema["type"] == "list":
            seen += 1
            free = "max_length" not in schema and not schema.get("fail_fast")
            assert not free or items["type"] == "any", schema
        elif schema["type"] == "dict":
            seen += 1
            assert guarded or schema.get("values_schema", {"type": "any"})["type"] == "any", schema
    assert seen


@pytest.mark.parametrize("kind", KINDS)
def test_many_wrong_items_in_any_field_are_few_errors(kind: type[BaseModel]) -> None:
    for field in kind.model_fields:
        for wrong in WRONG:
            value = {**{k: v for k, v in NEEDED.items() if k in kind.model_fields}, field: wrong}
            errors = 0
            try:
                kind.model_validate(value)
            except ValidationError as error:
                errors = error.error_count()
            except ApiError:
                errors = 1  # of the fields' own rules
            assert errors < FEW, field


@pytest.mark.parametrize(
    "given",
    ["x" * 500, "it's " * 99, ["a"] * 500, [["b"] * 60, {"c": ["d" * 900] * 60}] * 60,
     {"k": {"l": [1, None, True, -0.5]}}, {str(i): i for i in range(500)}, [[[[[[[[1]]]]]]]], 5, None],
)  # fmt: skip
def test_what_is_shown_of_a_large_value_is_its_beginning(given: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(bytes).validate_python(given if not isinstance(given, str) else [given])
    whole = repr(given if not isinstance(given, str) else [given])
    assert from_validation_error(caught.value).message.endswith(f"got {whole[:SHOWN]}")
