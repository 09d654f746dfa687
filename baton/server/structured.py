"""Structured: the fields of a request that ask for a grammar, and the one grammar that they mean.

response_format        {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}};
                       a `schema` beside the type is enforced, too
structured_outputs     {"json" | "regex" | "choice" | "grammar" | "json_object": ...}
guided_json, guided_regex, guided_choice, guided_grammar     vLLM's older names of these
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from baton import finite, grammar
from baton.errors import RequestError
from baton.server.api_error import ApiError, from_request_error
from baton.server.fields import STRUCTURED, Fields, Refusals

Text = Annotated[str, Field(strict=True)]
LONG_GRAMMAR = 4096
"""Characters of a grammar that is read at once; longer ones and schemas are read in a thread."""
Schema = dict[str, Any] | Text
"""An object, or its JSON."""
Choices = Annotated[
    list[Text], Field(min_length=1, max_length=grammar.MOST_CHOICES, fail_fast=True)
]


class JsonSchema(Fields):
    """A schema and its name."""

    name: Text = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Annotated[bool, Field(strict=True)] | None = None


class ResponseFormat(Fields):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(Fields):
    """vLLM's field for grammars."""

    unsupported: ClassVar[Refusals] = STRUCTURED
    within: ClassVar[str] = "structured_outputs"

    json_: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: Annotated[bool, Field(strict=True)] | None = None


class StructuredFields(Fields):
    """All of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    def grammar_field(self) -> tuple[str, str]:
        """The name of the field that asks for a grammar, and the grammar; both empty if none does. Raises
        ApiError for several, and for one that cannot be."""
        given = self._given()
        if not given:
            return "", ""
        param, value, write = given[0]
        if len(given) > 1:
            text = f"{param} and {given[1][0]} exclude each other: give one grammar"
            raise ApiError.bad_request(text, param)
        try:
            return param, write(value)
        except RequestError as error:
            raise from_request_error(error, param) from error

    @property
    def grammar_param(self) -> str:
        """The name of the field that asks for a grammar, without reading the grammar."""
        return next((param for param, _, _ in self._given()), "")

    @property
    def has_long_grammar(self) -> bool:
        """Does grammar_field() take long enough to hold up an event loop? A schema may: its size says
        little about what its references repeat."""
        fields = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        within, form = self.structured_outputs, self.response_format
        values: list[Any] = [*fields]
        if within is not None:
            values += [within.json_, within.regex, within.choice, within.grammar]
        if form is not None:
            values += [form.schema_, form.json_schema]
        return any(_is_long(value) for value in values)

    def _given(self) -> list[tuple[str, Any, Callable[[Any], str]]]:
        form, asked = self.response_format, self.structured_outputs
        forms: list[tuple[str, Any, Callable[[Any], str]]] = [
            ("guided_json", self.guided_json, _of_schema),
            ("guided_regex", self.guided_regex, grammar.regex),
            ("guided_choice", self.guided_choice, grammar.choice),
            ("guided_grammar", self.guided_grammar, grammar.written),
        ]
        if form is not None and form.type != "text":
            schema = form.json_schema.schema_ if form.json_schema else form.schema_
            if form.type == "json_schema" and schema is None:
                raise ApiError.bad_request("json_schema is missing", "response_format")
            forms.append(("response_format", {} if schema is None else schema, _of_format(schema)))
        if asked is not None:
            inner: list[tuple[Any, Callable[[Any], str]]] = [
                (asked.json_, _of_schema), (asked.regex, grammar.regex),
                (asked.choice, grammar.choice), (asked.grammar, grammar.written),
                (asked.json_object or None, _any_object),
            ]  # fmt: skip
            if all(value is None for value, _ in inner):
                text = "give one of json, regex, choice, grammar and json_object"
                raise ApiError.bad_request(text, "structured_outputs")
            forms += [("structured_outputs", value, write) for value, write in inner]
        return [each for each in forms if each[1] is not None]


def _is_long(value: Any) -> bool:
    if isinstance(value, list):
        return sum(map(len, value)) > LONG_GRAMMAR
    return len(value) > LONG_GRAMMAR if isinstance(value, str) else value is not None


def _any_object(_: Any) -> str:
    return grammar.json_object()


def _of_format(schema: dict[str, Any] | None) -> Callable[[Any], str]:
    return _any_object if schema is None else grammar.json_schema


def _of_schema(given: Any) -> str:
    """An object, or its JSON."""
    if isinstance(given, str):
        if len(given) > grammar.LARGEST:
            text = f"the schema has {len(given):,} characters, {grammar.LARGEST:,} are the limit"
            raise RequestError(text, code=grammar.INVALID)
        try:
            given = finite.loads(given)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema is not JSON: {error}", code=grammar.INVALID) from error
        if not isinstance(given, dict):
            text = f"the schema must be a JSON object, got {given!r:.80}"
            raise RequestError(text, code=grammar.INVALID)
    return grammar.json_schema(given)
