"""Messages to bytes and back: msgpack of [name, field, field, ...], every field checked on arrival.

Received data is never executed. A peer's bytes become a message whose fields have the types and bounds
that its dataclass declares and pass its rules, or they raise ProtocolError.
"""

import sys
import types
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgpack

from baton.bounds import INT_MAX, Range, Size
from baton.errors import ProtocolError, RequestError
from baton.wire.messages import LOCAL, Malformed, Message

MAX_MESSAGE_BYTES = 64 << 20
"""Larger messages are refused on both sides. KV blocks have transports of their own."""

_ANSWERED = {
    "Submit": "request",
    "Hello": "protocol",
    "LoadAdapter": "request",
    "UnloadAdapter": "request",
}
"""Malformed messages that still get an answer, and the field that the answer needs."""
MAX_ABOUT_CHARACTERS, MAX_WHY_CHARACTERS = 256, 300

_SCALARS = frozenset((str, int, float, bytes, bool, type(None)))
_BY_NAME: dict[str, type] = {kind.__name__: kind for kind in get_args(Message) if kind not in LOCAL}


def encode(message: Message) -> bytes:
    """The message as msgpack: its class name, then its fields in order."""
    packed: bytes = msgpack.packb(
        [type(message).__name__, *_plain_fields(message)], use_bin_type=True
    )
    if len(packed) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(packed):,} bytes is larger than the limit of "
            f"{MAX_MESSAGE_BYTES:,}"
        )
    return packed


def decode(data: bytes) -> Message:
    """The message these bytes are, or ProtocolError."""
    try:
        name, *values = _unpacked(data)
        kind = _BY_NAME[name]
        message: Message = _builder(kind)(tuple(values))
        return message
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"not a message: {type(error).__name__}: {error}"[:200]) from error


def decode_malformed(data: bytes, error: ProtocolError) -> Malformed | None:
    """What the receiver needs to answer a message that decode() refused with `error`: its sender waits
    for an answer. None if the message is too damaged, or of a kind that is not answered."""
    try:
        name, *values = _unpacked(data)
    except ProtocolError:
        return None
    if not isinstance(name, str) or name not in _ANSWERED:
        return None
    place = _names(_BY_NAME[name]).index(_ANSWERED[name])
    about = values[place] if place < len(values) else None
    if type(about) not in (str, int) or len(str(about)) > MAX_ABOUT_CHARACTERS:
        return None
    if not about or not str(about).isprintable():  # no name of a request: no answer could carry it
        return None
    why = error.__cause__ if isinstance(error.__cause__, RequestError) else error
    return Malformed(name, str(about), str(why)[:MAX_WHY_CHARACTERS])


def _unpacked(data: bytes) -> tuple[Any, ...]:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data):,} bytes, limit {MAX_MESSAGE_BYTES:,}")
    try:
        parts = msgpack.unpackb(
            data, use_list=False, ext_hook=_refuse_ext, object_pairs_hook=_unique_keys
        )
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises half a dozen unrelated types on hostile bytes
        raise ProtocolError(f"not a message: {type(error).__name__}: {error}"[:200]) from error
    if not isinstance(parts, tuple) or not parts:
        raise ProtocolError(f"a message is a list with a name, got {type(parts).__name__}")
    return parts


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _plain_fields(value: Any) -> list[Any]:
    return [_plain(getattr(value, name)) for name in _names(value.__class__)]


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is tuple:
        if value and type(value[0]) is int:  # token ids
            return value
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value):
        return _plain_fields(value)
    return value  # msgpack raises for other types


Check = Callable[[Any], Any]
"""Converts a value of one field to its type, or raises ProtocolError, which names the field."""


@cache
def _builder(kind: type) -> Callable[[tuple[Any, ...]], Any]:
    """Makes such a message from its fields' values. Cached: thousands of messages arrive a second."""
    hints = get_type_hints(kind, include_extras=True)
    names = _names(kind)
    checks = [_check(hints[name], f"{kind.__name__}.{name}") for name in names]
    by_name = any(field.kw_only for field in fields(kind))

    def build(values: tuple[Any, ...]) -> Any:
        if len(values) != len(checks):
            raise ProtocolError(f"{kind.__name__} has {len(checks)} fields, got {len(values)}")
        checked = [check(value) for check, value in zip(checks, values, strict=True)]
        try:
            return kind(**dict(zip(names, checked, strict=True))) if by_name else kind(*checked)
        except (ValueError, RequestError) as error:  # a rule of the class itself
            raise ProtocolError(f"{kind.__name__}: {error}") from error

    return build


def _check(hint: Any, where: str) -> Check:
    """For values of the type `hint`. They are converted only where msgpack does not keep the type."""
    if isinstance(hint, type):
        return (_check_nested if is_dataclass(hint) else _check_scalar)(hint, where)
    origin = get_origin(hint)
    if origin is Annotated:
        kind, bound = get_args(hint)
        if isinstance(bound, Range):
            return (_check_whole if kind is int else _check_real)(bound, where)
        return _check_sized(kind, bound, where)
    if origin is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            return _check_tuple(items[0], Size(0, sys.maxsize), where)
        return _check_fixed(items, where)
    if origin in (types.UnionType, Union):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        if len(arms) > 1:
            return _check_either(arms, where)
        inner = _check(arms[0], where)
        return lambda value: None if value is None else inner(value)
    raise TypeError(f"the codec does not support {hint}")


def _check_scalar(kind: type, where: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise _unlike(value, kind, where)

    return check


def _check_nested(kind: type, where: str) -> Check:
    build = _builder(kind)

    def check(value: Any) -> Any:
        if type(value) is not tuple:
            raise _unlike(value, kind, where)
        return build(value)

    return check


def _unlike(value: Any, kind: type, where: str) -> ProtocolError:
    return ProtocolError(f"{where} must be {kind.__name__}, got {type(value).__name__}")


# ---- numbers


def _check_whole(bound: Range, where: str) -> Check:
    least, most = int(bound.least), int(bound.most)

    def check(value: Any) -> Any:
        if type(value) is int and least <= value <= most:
            return value
        raise _outside(value, int, bound, where)

    return check


def _check_real(bound: Range, where: str) -> Check:
    least, most = bound.least, bound.most

    def check(value: Any) -> Any:
        if type(value) is float and least <= value <= most:  # false for NaN
            return value
        if type(value) is int and least <= value <= most:
            return float(value)
        raise _outside(value, float, bound, where)

    return check


def _outside(value: Any, kind: type, bound: Range, where: str) -> ProtocolError:
    if type(value) not in (kind, int):
        return _unlike(value, kind, where)
    return ProtocolError(f"{where} must be {bound.least:.12g} to {bound.most:.12g}, got {value}")


# ---- what has a length


def _check_sized(kind: Any, bound: Size, where: str) -> Check:
    if get_origin(kind) is Mapping:
        return _check_mapping(bound, where)
    if kind in (str, bytes):
        return _check_name(bound, where) if bound.printable else _check_text(kind, bound, where)
    item = get_args(kind)[0]
    of, limits = get_args(item) if get_origin(item) is Annotated else (item, None)
    if of is int and limits == Range(0, INT_MAX):
        return _check_ids(bound, where)
    if of is float:
        return _check_reals(item, limits, bound, where)
    if of is bytes:
        return _check_digests(item, limits, bound, where)
    return _check_tuple(item, bound, where)


def _check_text(kind: Any, bound: Size, where: str) -> Check:
    least, most = bound.least, bound.most

    def check(value: Any) -> Any:
        if type(value) is kind and least <= len(value) <= most:
            return value
        raise _unsized(value, kind, bound, where)

    return check


def _check_name(bound: Size, where: str) -> Check:
    least, most = bound.least, bound.most

    def check(value: Any) -> Any:
        if type(value) is str and least <= len(value) <= most and value.isprintable():
            return value
        if type(value) is str and least <= len(value) <= most:
            raise ProtocolError(f"{where} must be printable, got {value!r:.80}")
        raise _unsized(value, str, bound, where)

    return check


def _unsized(value: Any, kind: Any, bound: Size, where: str) -> ProtocolError:
    if type(value) is not kind:
        wanted = "a list" if kind is tuple else kind.__name__
        return ProtocolError(f"{where} must be {wanted}, got {type(value).__name__}")
    units: dict[Any, str] = {str: "characters", bytes: "bytes"}
    limits = f"{bound.least:,} to {bound.most:,} {units.get(kind, 'items')}"
    return ProtocolError(f"{where} must have {limits}, got {len(value):,}")


def _check_tuple(item: Any, bound: Size, where: str) -> Check:
    inner, least, most = _check(item, where), bound.least, bound.most

    def check(value: Any) -> Any:
        if type(value) is tuple and least <= len(value) <= most:
            return tuple([inner(each) for each in value]) if value else value
        raise _unsized(value, tuple, bound, where)

    return check


SHORT_LIST = 8
"""Up to so many items a loop is faster."""
_HIGHEST_BYTE = 3 if sys.byteorder == "little" else 0


def _check_ids(bound: Size, where: str) -> Check:
    """Token and block ids, 0 to 2**31 - 1: the long lists, checked without a step of Python for each."""
    least, most = bound.least, bound.most

    def check(value: Any) -> Any:
        if type(value) is not tuple or not least <= len(value) <= most:
            raise _unsized(value, tuple, bound, where)
        if len(value) > SHORT_LIST and _are_ids(value):
            return value
        for each in value:
            if type(each) is not int:
                raise ProtocolError(f"{where} must hold integers only, got {type(each).__name__}")
            if not 0 <= each <= INT_MAX:
                raise ProtocolError(f"{where} must hold 0 to {INT_MAX}, got {each}")
        return value

    return check


def _are_ids(value: Sequence[Any]) -> bool:
    try:
        unsigned = array("I", value).tobytes()  # raises for all but 0 to 2**32 - 1, and for reals
    except (OverflowError, TypeError):
        return False
    below = unsigned[_HIGHEST_BYTE::4].isascii()  # no highest bit is set
    return below and [*map(type, value)].count(int) == len(value)  # a bool passes for an integer


def _check_reals(item: Any, bound: Range, size: Size, where: str) -> Check:
    slow, low, high = _check_tuple(item, size, where), bound.least, bound.most
    most = size.most

    def check(value: Any) -> Any:
        if value == ():
            return value
        if type(value) is tuple and len(value) <= most and {*map(type, value)} == {float}:
            total = sum(value)  # NaN if one of them is: min() and max() may pass over it
            if total == total and low <= min(value) and max(value) <= high:
                return value
        return slow(value)

    return check


def _check_digests(item: Any, size: Size, bound: Size, where: str) -> Check:
    """Block hashes: hundreds for a long prompt, checked without a step of Python for each."""
    slow, short, long = _check_tuple(item, bound, where), size.least, size.most
    least, most = bound.least, bound.most

    def check(value: Any) -> Any:
        if type(value) is tuple and least <= len(value) <= most and {*map(type, value)} == {bytes}:
            lengths = {*map(len, value)}
            if short <= min(lengths) and max(lengths) <= long:
                return value
        return slow(value)

    return check


def _check_fixed(items: tuple[Any, ...], where: str) -> Check:
    """For tuples of fixed length, such as pairs."""
    inner = [_check(item, where) for item in items]

    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(inner):
            raise ProtocolError(f"{where} must hold lists of {len(inner)}")
        return tuple([one(each) for one, each in zip(inner, value, strict=True)])

    return check


def _check_either(arms: list[Any], where: str) -> Check:
    """For a scalar or a list: the prompt as text or as token ids."""
    inner = {_kind_of(arm): _check(arm, where) for arm in arms}
    names = " or ".join("list" if kind is tuple else str(kind.__name__) for kind in inner)

    def check(value: Any) -> Any:
        if (one := inner.get(type(value))) is None:
            raise ProtocolError(f"{where} must be {names}, got {type(value).__name__}")
        return one(value)

    return check


def _kind_of(hint: Any) -> Any:
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(kind) or kind


MAX_KEY_CHARACTERS = 256
MAX_PLAIN = 2**16
"""Of one value of a mapping: characters, bytes or items. A CUDA handle has some dozens of bytes, one for
each layer."""


def _check_mapping(bound: Size, where: str) -> Check:
    """A flat mapping of names to scalars or lists of scalars, for Region.address."""

    def check(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise ProtocolError(f"{where} must be a map, got {type(value).__name__}")
        if not bound.least <= len(value) <= bound.most:
            raise _unsized(value, dict, bound, where)
        for key, each in value.items():
            items = each if type(each) is tuple else (each,)
            short = type(key) is str and len(key) <= MAX_KEY_CHARACTERS and len(items) <= MAX_PLAIN
            if not short or not all(map(_is_plain, items)):
                rule = "must be a plain value or a list of them, of limited size"
                raise ProtocolError(f"{where}[{key!r:.40}] {rule}")
        return {k: list(v) if type(v) is tuple else v for k, v in value.items()}

    return check


def _is_plain(value: Any) -> bool:
    """Within the bounds of a value of a mapping. A whole number may be any that msgpack holds."""
    if type(value) in (str, bytes):
        return len(value) <= MAX_PLAIN
    return type(value) in (int, bool, type(None)) or (type(value) is float and isfinite(value))


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ProtocolError("a map names a key twice")
    return mapping


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ProtocolError(f"msgpack extension type {code} is not allowed")
