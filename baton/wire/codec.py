"""Messages to bytes and back: msgpack of [name, field, field, ...], every field checked on arrival.

Received data is never executed. A peer's bytes become a message whose fields have the types that its
dataclass declares and pass its rules, or they raise ProtocolError.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

from baton.errors import ProtocolError, RequestError
from baton.wire.messages import LOCAL, Malformed, Message

MAX_MESSAGE_BYTES = 64 << 20
"""Larger messages are refused on both sides. KV blocks have transports of their own."""

_ANSWERED = {"Submit": "request", "Hello": "protocol"}
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
    if (
        not str(about) or not str(about).isprintable()
    ):  # no name of a request: no answer could carry it
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


Check = Callable[[Any, str], Any]
"""Converts a value of the named field to its type, or raises ProtocolError."""


@cache
def _builder(kind: type) -> Callable[[tuple[Any, ...]], Any]:
    """Makes such a message from its fields' values. Cached: thousands of messages arrive a second."""
    hints = get_type_hints(kind)
    names = _names(kind)
    checks = [(_check(hints[name]), f"{kind.__name__}.{name}") for name in names]
    by_name = any(field.kw_only for field in fields(kind))

    def build(values: tuple[Any, ...]) -> Any:
        if len(values) != len(checks):
            raise ProtocolError(f"{kind.__name__} has {len(checks)} fields, got {len(values)}")
        checked = [
            check(value, where) for value, (check, where) in zip(values, checks, strict=True)
        ]
        try:
            return kind(**dict(zip(names, checked, strict=True))) if by_name else kind(*checked)
        except (ValueError, RequestError) as error:  # a rule of the class itself
            raise ProtocolError(f"{kind.__name__}: {error}") from error

    return build


@cache
def _check(hint: Any) -> Check:
    """For values of the type `hint`. They are converted only where msgpack does not keep the type."""
    if isinstance(hint, type):
        return _check_nested(hint) if is_dataclass(hint) else _check_scalar(hint)
    origin = get_origin(hint)
    if origin is tuple:
        items = get_args(hint)
        return _check_tuple(items[0]) if items[-1] is Ellipsis else _check_fixed(items)
    if origin is Mapping:
        return _checked_mapping
    if origin in (types.UnionType, Union):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        if len(arms) > 1:
            return _check_either(arms)
        inner = _check(arms[0])
        return lambda value, where: None if value is None else inner(value, where)
    raise TypeError(f"the codec does not support {hint}")


def _check_scalar(kind: type) -> Check:
    def check(value: Any, where: str) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise ProtocolError(f"{where} must be {kind.__name__}, got {type(value).__name__}")

    return check


def _check_nested(kind: type) -> Check:
    def check(value: Any, where: str) -> Any:
        if not isinstance(value, tuple):
            raise ProtocolError(f"{where} must be {kind.__name__}, got {type(value).__name__}")
        return _builder(kind)(value)

    return check


def _check_tuple(item: Any) -> Check:
    inner = _check(item)

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, tuple):
            raise ProtocolError(f"{where} must be a list, got {type(value).__name__}")
        if item is int:  # token ids: the one long list, checked without a call for each
            if not set(map(type, value)) <= {int}:
                raise ProtocolError(f"{where} must hold integers only")
            return value
        return tuple([inner(each, where) for each in value])

    return check


def _check_fixed(items: tuple[Any, ...]) -> Check:
    """For tuples of fixed length, such as pairs."""
    inner = [_check(item) for item in items]

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, tuple) or len(value) != len(inner):
            raise ProtocolError(f"{where} must hold lists of {len(inner)}")
        return tuple([one(each, where) for one, each in zip(inner, value, strict=True)])

    return check


def _check_either(arms: list[Any]) -> Check:
    """For a scalar or a list: the prompt as text or as token ids."""
    inner = {get_origin(arm) or arm: _check(arm) for arm in arms}
    names = " or ".join("list" if kind is tuple else str(kind.__name__) for kind in inner)

    def check(value: Any, where: str) -> Any:
        if (one := inner.get(type(value))) is None:
            raise ProtocolError(f"{where} must be {names}, got {type(value).__name__}")
        return one(value, where)

    return check


def _checked_mapping(value: Any, where: str) -> dict[str, Any]:
    """A flat mapping of names to scalars or lists of scalars, for Region.address."""
    if not isinstance(value, dict):
        raise ProtocolError(f"{where} must be a map, got {type(value).__name__}")
    for key, each in value.items():
        items = each if isinstance(each, tuple) else (each,)
        if type(key) is not str or any(
            type(item) not in (str, int, float, bytes, bool, type(None)) for item in items
        ):
            raise ProtocolError(f"{where}[{key!r:.40}] must be a plain value or a list of them")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ProtocolError("a map names a key twice")
    return mapping


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ProtocolError(f"msgpack extension type {code} is not allowed")
