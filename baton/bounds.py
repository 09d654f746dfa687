"""Bounds of what comes from other processes, declared with the type of each field.

    pid: Pid            # Annotated[int, Range(1, 2**31 - 1)]

baton/wire/codec.py checks them when a message arrives, so no code behind it meets a number or a list that
its types allow and its work does not. A field of a message without bounds fails a test. Bounds are wide:
they keep nonsense out. What a *sound* message may ask of this cluster is checked where it is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the most a number may be. NaN is in no range."""

    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Size:
    """How many characters, bytes or items there may be."""

    least: int
    most: int
    printable: bool = False  # text only: no control characters


INT_MAX = 2**31 - 1
LIST_MAX = 2**22
INFINITY = float("inf")

# ---- numbers

Pid = Annotated[int, Range(1, INT_MAX)]
OptionalPid = Annotated[int, Range(0, INT_MAX)]
Protocol = Annotated[int, Range(0, INT_MAX)]
Tokens = Annotated[int, Range(0, INT_MAX)]
Blocks = Annotated[int, Range(0, INT_MAX)]
Bytes = Annotated[int, Range(0, 2**53)]
Count = Annotated[int, Range(0, 2**63 - 1)]
"""Totals that the receiver only adds up or shows."""
Seconds = Annotated[float, Range(0, 1e7)]
"""A length of time: at most some months."""
TotalSeconds = Annotated[float, Range(0, 1e12)]
"""A point on a monotonic clock, or many Seconds added."""
Rate = Annotated[float, Range(0, 1e9)]
Score = Annotated[float, Range(-INFINITY, 1e9)]
"""A logprob: minus infinity for a token that the model excludes."""

# ---- text

Name = Annotated[str, Size(1, 256, printable=True)]
"""Of a request, a worker, an epoch, a role, a code: it is logged and compared."""
RunName = Annotated[str, Size(1, 320, printable=True)]
"""A request's Name, #, and a number."""
OptionalName = Annotated[str, Size(0, 256, printable=True)]
Line = Annotated[str, Size(0, 2**16)]
"""For people: a reason, a device, a path."""
Vector = Annotated[bytes, Size(0, 2**20)]
"""Numbers in float32, in this machine's order of bytes: little-endian everywhere."""
Content = Annotated[str, Size(0, 2**26)]
"""A prompt or generated text."""

# ---- lists

TokenId = Annotated[int, Range(0, INT_MAX)]
Ids = Annotated[tuple[TokenId, ...], Size(0, LIST_MAX)]
BlockIds = Annotated[tuple[Annotated[int, Range(0, INT_MAX)], ...], Size(0, LIST_MAX)]
Digest = Annotated[bytes, Size(0, 64)]
Plain = Annotated[
    Mapping[str, str | int | float | bytes | bool | list[int] | list[bytes]], Size(0, 64)
]
"""Names of up to 256 characters, and plain values or lists of them: see baton/wire/codec.py."""

REASON_MAX = 1000


def short(reason: str) -> str:
    """A Line from elsewhere, cut so that it fits into a longer one: what exceeds its bounds would be
    refused by whoever waits for it."""
    return reason if len(reason) <= REASON_MAX else f"{reason[:REASON_MAX]} ..."
