"""Fields: the types that requests are made of, strict where JSON is loose, and what is said when one is
wrong."""

import re
from typing import Annotated

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from baton.params import MAX_STOP_CHARACTERS
from baton.server.faults import Fault

DEEPEST_JSON = 32
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)  # the last may have no end
ONE_KIND = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
PAIR = b"[]"
SHOWN = 80
LONGEST = 300


# Strict numbers refuse true and "1" by themselves; a strict float takes whole numbers.
Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def id_of(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise Fault.bad_request(
            f"logit_bias is for token ids, and {key[:SHOWN]!r} is none", "logit_bias"
        )
    return int(key)


def fault_of(error: RequestValidationError | ValidationError) -> Fault:
    """The first thing that is wrong, in one line, with the field's name."""
    first = error.errors()[0]
    where = [str(each) for each in first["loc"] if each != "body"]
    told = str(first["msg"]).removeprefix("Value error, ")
    if not where and ": " in told:  # of several fields: it names the one itself
        name, _, told = told.partition(": ")
        where = [name]
    param = where[0] if where else None
    if first["type"] == "json_invalid":
        return Fault.bad_request(f"the body is no JSON: {told}"[:LONGEST])
    given = repr(first.get("input"))[:SHOWN]
    path = ".".join(where)[:SHOWN]
    text = f"{path}: {told}, got {given}" if path else f"{told}, got {given}"
    return Fault.bad_request(text[:LONGEST], param)


def depth_ok(data: bytes) -> bool:
    """Is this JSON nested at most DEEPEST_JSON deep? Counts brackets outside of strings: what holds
    nothing any more is taken away, a level at a time. What is no JSON is somebody else's to refuse."""
    if data.count(b"[") + data.count(b"{") <= DEEPEST_JSON:
        return True
    left = STRING.sub(b"", data).translate(ONE_KIND, NO_BRACKETS)
    for _ in range(DEEPEST_JSON):
        if PAIR not in left:
            break
        left = left.replace(PAIR, b"")
    return PAIR not in left and left.count(b"[") <= DEEPEST_JSON
