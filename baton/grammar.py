"""Grammars: which tokens are allowed next, so that the answer is JSON, fits a schema or matches a regex.

    json_schema({...}), regex("..."), choice([...]), written("..."), tool_calls(Calls(...))
      ->  one string on the wire  ->  Grammars.open  ->  Matcher
    Matcher.mask()  ->  one bit for each id  ->  the sampler draws  ->  Matcher.accept(id)

The state of a Matcher is a function of the string and the ids accepted so far, so another worker can
continue a request from these two. llguidance does the matching; this module adds four things:

* llguidance allows unlimited white space between the parts of a JSON text, and a model may print it
  for ever. Here a gap is one space, or a line feed with at most INDENT spaces or tabs.
* Compiling cannot be interrupted, and llguidance's own limits do not bound all of it: some schemas
  of a few KiB take minutes or gigabytes. Such schemas are refused by their shape.
* A schema's objects are closed, and what it cannot enforce is refused by name: json_schema.py.
* The ids that end a text come from the model's files, not from tokenizer.json: their bits are set here.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from baton.checkpoints.added_tokens import read_vocabulary
from baton.errors import RequestError
from baton.grammar_rules import as_lark, check_rules
from baton.json_schema import INVALID as INVALID_GRAMMAR
from baton.json_schema import NO_ASSERTION, enforceable
from baton.tool_calls import Calls, SpecialTokens, closed_schemas, rules_of

LARGEST = 64 * 1024
"""Bytes of a grammar on the wire."""
DEEPEST = 32
LONGEST_STRING = 4096
"""Characters of a regex or any other string in a grammar: time and memory grow with the square."""
MOST_KEY_PATTERNS = 100
"""patternProperties: each is compared with each, at a cost that grows with them; 400 took 12 s."""
MOST_INTERSECTED = 8
"""Patterns of a schema that intersects its parts: states multiply, 14 took 650 MB."""
MOST_CHOICES = 1024
LONGEST_GRAMMAR = 16 * 1024
"""Characters of a grammar that is written as rules."""
INDENT = 24
GAP = rf"( |\n[ \t]{{0,{INDENT}}})"

MOST_RECENT = 8
"""Compiled grammars that are kept."""
NO_TOKENS = SpecialTokens()
INVALID = INVALID_GRAMMAR
FAILED = "grammar_failed"

_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""A state takes 1 to 2 kB: 100 MB for one answer. The rest is llguidance's own: 20 ms for a mask."""
_TRIAL = 4  # tokens that `check` walks: some grammars compile and then fail at their first token


def json_object() -> str:
    """Any JSON object."""
    return _written({"kind": "json_object"})


def json_schema(schema: Mapping[str, Any]) -> str:
    """JSON that fits the schema, with the properties in the schema's order."""
    return _written({"kind": "json_schema", "schema": schema})


def regex(pattern: str) -> str:
    """Text that matches the pattern as a whole. The syntax is that of Rust's regex crate: no
    look-around and no back-references."""
    return _written({"kind": "regex", "pattern": pattern})


def choice(texts: Sequence[str]) -> str:
    """One of these texts."""
    return _written({"kind": "choice", "texts": list(texts)})


def written(rules: str) -> str:
    """Text that follows the rules of a grammar: Lark's notation, or the EBNF of llama.cpp (GBNF)."""
    return _written({"kind": "rules", "rules": rules})


def tool_calls(calls: Calls) -> str:
    """Text, or calls of tools, as the model writes them: tool_calls.py."""
    return _written({"kind": "tool_calls"} | calls.written())


def _written(fields: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"the grammar is not JSON: {_first_line(str(error))}") from error
    GrammarSpec.parse(text)
    return text


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The grammar in a string, within the limits above: one of these."""

    schema: Mapping[str, Any] | None = None
    pattern: str | None = None
    texts: tuple[str, ...] = ()
    rules: str | None = None
    calls: Calls | None = None

    @classmethod
    def parse(cls, text: str) -> "GrammarSpec":
        """Raises RequestError if the string is not a grammar. It may still fail to compile."""
        fields = _read(text)
        _check_sizes(fields)
        match fields:
            case {"kind": "json_object", **rest} if not rest:
                return cls({"type": "object"})
            case {"kind": "json_schema", "schema": dict(schema), **rest} if not rest:
                schema = enforceable(schema)
                _check_patterns(schema)
                # the key that would change llguidance's settings; like any unknown one, it is ignored
                return cls({k: v for k, v in schema.items() if k != "x-guidance"})
            case {"kind": "regex", "pattern": str(pattern), **rest} if not rest:
                if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
                    raise _invalid("the regex ends in a backslash that escapes nothing")
                return cls(pattern=pattern)
            case {"kind": "choice", "texts": list(texts), **rest} if not rest:
                return cls(texts=_checked_texts(texts))
            case {"kind": "rules", "rules": str(rules), **rest} if not rest:
                check_rules(rules)
                return cls(rules=rules)
            case {"kind": "tool_calls", **rest}:
                calls = Calls.read({str(key): value for key, value in rest.items()})
                _check_patterns(*closed_schemas(calls))
                return cls(calls=calls)
        raise _invalid(
            'a grammar is {"kind": "json_object"}, {"kind": "json_schema", "schema": {...}}, '
            '{"kind": "regex", "pattern": "..."}, {"kind": "choice", "texts": ["..."]}, '
            '{"kind": "rules", "rules": "..."} or {"kind": "tool_calls", ...}'
        )

    def compiled_form(self, special: SpecialTokens = NO_TOKENS) -> str:
        """The grammar in llguidance's terms. `special`: the tokens of the model, for tool calls."""
        try:
            if self.calls is not None:
                return LLMatcher.grammar_from_lark(rules_of(self.calls, special, GAP))
            if self.pattern is not None:
                return LLMatcher.grammar_from_regex(self.pattern)
            if self.texts:
                return grammar_from("choice", json.dumps(self.texts))
            if self.rules is not None:
                return LLMatcher.grammar_from_lark(as_lark(self.rules))
            schema = json.dumps(self.schema, ensure_ascii=False, allow_nan=False)
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": GAP})
        except ValueError as error:
            raise _invalid(f"the grammar cannot be compiled: {_first_line(str(error))}") from error


class _Ids:
    """Which ids are text and which end it. End ids that only llguidance assumes are masked out."""

    def __init__(self, vocabulary: int, ends: frozenset[int], tokenizer: LLTokenizer) -> None:
        self.ends = ends
        self.mask_bytes = 4 * -(-vocabulary // 32)
        self.end_bits = sum(1 << each for each in ends)
        no_text = sum(1 << each for each in ends.union(tokenizer.eos_tokens))
        self.text_bits = ((1 << min(vocabulary, tokenizer.vocab_size)) - 1) & ~no_text


class Grammars:
    """The grammars of one model. `vocabulary`: the number of logits, which may differ from that of
    the tokenizer's tokens. The file is read at once, because it may be gone when the first request needs
    it: the cache deletes what has not been used lately. Raises ModelError."""

    def __init__(self, tokenizer_file: Path, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_file = tokenizer_file
        read = read_vocabulary(tokenizer_file)
        self._text, self._end_id = read.json(), read.end_id
        added = read.tokenizer.get_added_tokens_decoder()
        self._added = {each: token.content for each, token in added.items()}
        self._vocabulary = vocabulary
        self._recent: OrderedDict[str, LLMatcher] = OrderedDict()  # the last used at the end
        self._lock = Lock()
        self._ends = frozenset(each for each in eos_token_ids if 0 <= each < vocabulary)

    def check(self, spec: str) -> None:
        """RequestError with the reason if this grammar cannot be used."""
        guide = self.open(spec)
        try:
            for _ in range(_TRIAL):
                if mask := int.from_bytes(guide.mask(), "little"):
                    guide.accept((mask & -mask).bit_length() - 1)  # the lowest allowed id
        except RequestError as error:
            raise _invalid(str(error)) from error

    def open(
        self, spec: str, generated: Sequence[int] = (), *, stop_token_ids: Sequence[int] = ()
    ) -> "Matcher":
        """A Matcher after the ids generated so far. Compiles: some ms, rarely 1 s. The tokenizer's own
        end may end the answer if it is among its stop tokens, as in a chat."""
        matcher = self._compiled(spec)
        chat = not self._own_ends.isdisjoint(stop_token_ids)
        guide = Matcher(matcher, self._ids_of_chats if chat else self._ids)
        for index, token_id in enumerate(generated):
            if not guide.accept(token_id):
                raise RequestError(
                    f"id {token_id}, number {index} of the answer so far, does not fit its grammar",
                    code=FAILED,
                )
        return guide

    def _compiled(self, spec: str) -> LLMatcher:
        """At its beginning. The last ones are kept: agents offer the same tools again and again."""
        with self._lock:
            known = self._recent.pop(spec, None)
            if known is not None:
                self._recent[spec] = known
                return known.deep_copy()
        form = GrammarSpec.parse(spec).compiled_form(self._special)
        matcher = LLMatcher(self._tokenizer, form, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _invalid(f"the grammar cannot be compiled: {_first_line(matcher.get_error())}")
        with self._lock:
            self._recent[spec] = matcher.deep_copy()
            if len(self._recent) > MOST_RECENT:
                self._recent.popitem(last=False)
        return matcher

    @cached_property
    def _ids(self) -> _Ids:
        return _Ids(self._vocabulary, self._ends, self._tokenizer)

    @cached_property
    def _ids_of_chats(self) -> _Ids:
        return _Ids(self._vocabulary, self._ends.union(self._own_ends), self._tokenizer)

    @cached_property
    def _special(self) -> SpecialTokens:
        """Tokens that llguidance matches by id only: all special ones, and others in angle brackets."""
        texts = {each: token for each, token in self._added.items()
                 if each not in self._ends | self._own_ends and each < self._vocabulary
                 and self._tokenizer.is_special_token(each)}  # fmt: skip
        return SpecialTokens(sorted(texts), {token: each for each, token in texts.items()})

    @cached_property
    def _own_ends(self) -> frozenset[int]:
        """The tokenizer's own end, with which a chat ends, too."""
        own = self._end_id
        return frozenset(() if own is None or own >= self._vocabulary else (own,))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        file, text = self._tokenizer_file, self._text
        try:
            known = LLTokenizer(text)
            # The library needs one end token of its vocabulary; any will do: Matcher sets all ends' bits.
            ends = [each for each in sorted(self._ends) if each < known.vocab_size]
            return LLTokenizer(text, eos_token=ends) if ends else known
        except ValueError as error:
            raise _invalid(f"no grammar can guide the tokenizer {file}: {error}") from error


class Matcher:
    """The state of one answer: call `mask` before each id, `accept` after it."""

    def __init__(self, matcher: LLMatcher, ids: _Ids) -> None:
        self._matcher = matcher
        self._ids = ids
        self._ended = False

    @property
    def finished(self) -> bool:
        """Only the end is allowed. Without end ids the mask is empty, and the answer ends here."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self) -> bytes:
        """One bit for each id, set if it is allowed next: 32-bit words, the lowest bit and byte first.

        End ids are set exactly where the text may end. Where only one text can follow, only its usual
        tokens are set. RequestError if no id is allowed or the grammar is too complex.
        """
        bits = 0
        if not self.finished:
            bits = int.from_bytes(self._matcher.compute_bitmask(), "little") & self._ids.text_bits
            if self._matcher.is_error():
                raise self._failure()
        if self.finished or self._matcher.is_accepting():
            bits |= self._ids.end_bits
        elif not bits:
            raise self._failure()
        return bits.to_bytes(self._ids.mask_bytes, "little")

    def accept(self, token_id: int) -> bool:
        """Add an id. False: it is not allowed, and the state is unchanged.

        Accepts every id that `mask` allows, and other tokens of the same text. After an end id only end
        ids are allowed. Raises RequestError as `mask` does.
        """
        if token_id in self._ids.ends:
            self._ended = self.finished or self._matcher.is_accepting()
            return self._ended
        if self.finished or token_id < 0 or not self._ids.text_bits >> token_id & 1:
            return False
        taken = self._matcher.try_consume_tokens([token_id])
        if self._matcher.is_error():
            raise self._failure()
        return bool(taken)

    def _failure(self) -> RequestError:
        reason = _first_line(self._matcher.get_error())
        return RequestError(f"the answer cannot go on by its grammar: {reason}", code=FAILED)


def _read(text: str) -> Any:
    try:
        if (size := len(text.encode())) > LARGEST:
            raise _invalid(f"the grammar is {size} bytes, {LARGEST} are the limit; shorten it")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the grammar is not JSON: {_first_line(str(error))}") from error


def _values(root: Any) -> Iterator[tuple[Any, int]]:
    """Every value in a JSON value, keys included, with its depth."""
    waiting = [(root, 0)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, dict | list):
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            waiting.extend((each, depth + 1) for each in inner)


def _checked_texts(texts: list[Any]) -> tuple[str, ...]:
    if not 0 < len(texts) <= MOST_CHOICES:
        raise _invalid(f"there must be 1 to {MOST_CHOICES:,} choices, not {len(texts):,}")
    if bad := [each for each in texts if not isinstance(each, str) or not each]:
        raise _invalid(f"each choice must be a text of at least one character, got {bad[0]!r:.80}")
    return tuple(texts)


def _check_sizes(fields: Any) -> None:
    rules = isinstance(fields, dict) and fields.get("kind") == "rules"
    longest = LONGEST_GRAMMAR if rules else LONGEST_STRING
    for value, depth in _values(fields):
        if depth > DEEPEST:
            raise _invalid(f"the grammar is nested deeper than {DEEPEST} levels")
        if isinstance(value, str) and len(value) > longest:
            raise _invalid(f"a string has {len(value)} characters, {longest} are the limit")


def _check_patterns(*schemas: Mapping[str, Any]) -> None:
    """Of schemas that are compiled together: time and memory of each add up."""
    keyed, intersected = 0, 0
    for schema in schemas:
        patterns: set[str] = set()
        intersects = False
        for value, _ in _values(schema):
            if not isinstance(value, dict):
                continue
            keys = value.get("patternProperties")
            keyed += len(keys) if isinstance(keys, dict) else 0
            found = (value.get("pattern"), value.get("format"))
            patterns.update(each for each in found if isinstance(each, str))
            asserted = value.keys() - NO_ASSERTION
            joined = bool(asserted & {"$ref", "anyOf", "oneOf"}) and len(asserted) > 1
            intersects = intersects or joined or "allOf" in asserted
        intersected += len(patterns) if intersects else 0
    if keyed > MOST_KEY_PATTERNS:
        raise _invalid(f"{keyed} patternProperties are too many, {MOST_KEY_PATTERNS} are the limit")
    if intersected > MOST_INTERSECTED:
        raise _invalid(
            "the schema intersects its parts (allOf, or $ref or anyOf beside other keywords) and has "
            f"{intersected} patterns and formats, {MOST_INTERSECTED} are the limit then"
        )


def _first_line(text: str) -> str:
    """The one line of a library's message that says what is wrong."""
    if text.startswith("panic"):
        return "it is too complex"
    if text.startswith("NoExtension"):
        return "no text fits it"
    if text.startswith("oneOf constraints"):
        return "the schema's keyword oneOf, whose parts may fit one value together: use anyOf"
    lines = text.split("\n")
    best = next((line for line in lines if line.startswith("error: ")), lines[0])
    return best.removeprefix("error: ")[:160]


def _invalid(message: str) -> RequestError:
    return RequestError(message, code=INVALID)
