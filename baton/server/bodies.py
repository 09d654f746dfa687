"""Bodies: limits on JSON text, counted on its bytes as they arrive, before anything is built from it.

    scan = JsonScan(limits);  scan.feed(piece) ...        raises ApiError at the first limit passed

A megabyte of `[],[],` becomes a hundred times as much memory and holds up every other request while it is
parsed, so the parser only sees texts whose cost is known. The scan need not understand invalid JSON: the
parser stops at the first error, and up to there both agree.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from baton import finite
from baton.server.api_error import LONGEST_TEXT, ApiError, from_validation_error
from baton.server.conversation import MAX_MESSAGES
from baton.server.schema import MAX_PROMPTS

MAX_BODY_BYTES = 4 << 20
DEEPEST_JSON = 32
LONGEST_NUMBER = 128
"""Characters. Python's conversion takes a time that grows with the square of the number's length."""
MOST_ELEMENTS = 300_000
OTHER_ELEMENTS = 32_768
"""Elements of a request beside its prompts: biases, allowed ids, a grammar."""
COMPLETION_KEYS = 16_384
CHAT_KEYS = 5 * MAX_MESSAGES + COMPLETION_KEYS
MOST_CONTAINERS = 4 * MAX_MESSAGES
SMALL = 64
"""Keys and elements of a request that has a few fields."""
PIECE = 64 << 10
"""Bytes scanned, a millisecond or two, before the event loop gets its turn."""
INLINE = 16 << 10
"""Bytes of JSON that are parsed at once; more are parsed in a thread."""

STRUCTURE = b"[]{},:"
NO_STRUCTURE = bytes(set(range(256)) - set(STRUCTURE))
NO_BRACKETS = b",:"
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: 1 deeper, 1 less deep
TO_SPACES = bytes.maketrans(STRUCTURE + b'"', b" " * (len(STRUCTURE) + 1))
SEPARATORS = STRUCTURE + b'" \t\n\r'

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


class Path(StrEnum):
    """The routes that take JSON."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"
    STREAM = "/v1/stream"
    RESPONSES = "/v1/responses"
    RESPONSE_TOKENS = "/v1/responses/input_tokens"
    EMBEDDINGS = "/v1/embeddings"
    MESSAGES = "/v1/messages"
    MESSAGE_TOKENS = "/v1/messages/count_tokens"
    LOAD_ADAPTER = "/v1/load_lora_adapter"
    UNLOAD_ADAPTER = "/v1/unload_lora_adapter"


ADAPTERS = frozenset({Path.LOAD_ADAPTER, Path.UNLOAD_ADAPTER})
CONVERSATIONS = frozenset(Path) - {Path.COMPLETIONS, Path.EMBEDDINGS, Path.DETOKENIZE} - ADAPTERS


GENERATING = frozenset(
    {Path.COMPLETIONS, Path.CHAT, Path.RESPONSES, Path.MESSAGES, Path.EMBEDDINGS}
)
"""The routes that take a place in the queue for each body."""


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """The most that one JSON text may hold."""

    elements: int = MOST_ELEMENTS  # of arrays and objects, all together
    keys: int = CHAT_KEYS
    containers: int = MOST_CONTAINERS  # arrays and objects
    depth: int = DEEPEST_JSON


def limits_of(path: str, context: int) -> JsonLimits | None:
    """Of the body that this route takes; None if it takes none. Prompts may be lists of ids: as many as
    `context` tokens for each of the most prompts, up to MOST_ELEMENTS in all."""
    ids = min(MAX_PROMPTS * context + OTHER_ELEMENTS, MOST_ELEMENTS)
    match path:
        case Path.COMPLETIONS | Path.EMBEDDINGS:
            return JsonLimits(ids, COMPLETION_KEYS)
        case Path.DETOKENIZE:
            return JsonLimits(keys=COMPLETION_KEYS)
        case Path.LOAD_ADAPTER | Path.UNLOAD_ADAPTER:
            return JsonLimits(SMALL, SMALL, SMALL)
    return JsonLimits() if path in CONVERSATIONS else None


class JsonScan:
    """Counts what a JSON text holds, piece by piece, outside of its strings."""

    def __init__(self, limits: JsonLimits) -> None:
        self._limits = limits
        self._in_string = False
        self._escape = b""  # a backslash at the end of the last piece
        self._depth = self._elements = self._keys = self._containers = 0
        self._number = 0  # characters so far of one that the last piece did not end

    def feed(self, piece: bytes) -> None:
        """Raises ApiError if the text so far passes a limit."""
        outside = self._outside(piece)
        found = outside.translate(None, NO_STRUCTURE)
        limits, opened = self._limits, found.count(b"[") + found.count(b"{")
        self._containers += opened
        self._keys += found.count(b":")
        self._elements += found.count(b",") + opened  # an opened one has a first element
        for count, limit, of in (
            (self._containers, limits.containers, "arrays and objects"),
            (self._keys, limits.keys, "keys"),
            (self._elements, limits.elements, "elements"),
        ):
            if count > limit:
                raise ApiError.bad_request(f"the JSON has more than {limit:,} {of}: send less")
        self._nest(found)
        self._measure(outside)

    def _outside(self, piece: bytes) -> bytes:
        """The piece without its strings."""
        text = (self._escape + piece).replace(rb"\\", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        parts = text.replace(rb"\"", b"").split(b'"')
        outside = parts[1 if self._in_string else 0 :: 2]
        if len(parts) % 2 == 0:
            self._in_string = not self._in_string
        return b'"'.join(outside)

    def _nest(self, found: bytes) -> None:
        brackets = found.translate(STEPS, NO_BRACKETS)
        depths = list(accumulate(memoryview(brackets).cast("b"), initial=self._depth))
        self._depth = depths[-1]
        if max(depths) > self._limits.depth:
            raise ApiError.bad_request(f"the JSON is nested more than {self._limits.depth} deep")
        if min(depths) < 0:
            raise ApiError.bad_request("the body is not valid JSON: a bracket closes nothing")

    def _measure(self, outside: bytes) -> None:
        words = outside.translate(TO_SPACES).split()
        lengths = [len(word) for word in words]
        if lengths and outside[0] not in SEPARATORS:
            lengths[0] += self._number
        if max(lengths, default=0) > LONGEST_NUMBER:
            raise ApiError.bad_request(
                f"the JSON has a number of more than {LONGEST_NUMBER} characters: shorten it"
            )
        ended = self._in_string or not outside or outside[-1] in SEPARATORS
        self._number = 0 if ended else lengths[-1]


async def feed(scan: JsonScan, part: bytes, turn: asyncio.Lock) -> None:
    """Scan what has arrived. Raises ApiError. `turn`: shared by all clients, so that of all their large
    parts one piece is scanned in a turn of the event loop: a hundred uploads hold it up no longer."""
    if len(part) <= INLINE:
        scan.feed(part)
        return
    for start in range(0, len(part), PIECE):
        async with turn:
            scan.feed(part[start : start + PIECE])
            await asyncio.sleep(0)


def parse(text: bytes) -> Any:
    """Raises ApiError. UTF-8 only: in another encoding the scan would have taken bytes of characters for
    quotes."""
    try:
        return finite.loads(text.decode("utf-8-sig", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ApiError.bad_request(f"the body is not valid JSON: {error}"[:LONGEST_TEXT]) from None


async def read(text: bytes) -> Any:
    """The JSON value of a scanned text. Large ones are parsed in a thread. Raises ApiError."""
    return await in_thread(len(text) > INLINE, parse, text)


async def model(kind: type[Model], value: Any, *, size: int) -> Model:
    """The request in a JSON value of so many bytes. Raises ApiError."""
    return await in_thread(size > INLINE, _model, kind, value)


async def in_thread(much: bool, work: Callable[..., Result], *given: Any) -> Result:
    """Long work does not hold up the event loop."""
    return await asyncio.to_thread(work, *given) if much else work(*given)


def _model(kind: type[Model], payload: Any) -> Model:
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        raise from_validation_error(error) from None
