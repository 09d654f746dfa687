"""Every field of every message has bounds, and values at and past them are taken or refused by name."""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.bounds import Range, Size
from baton.errors import ProtocolError
from baton.wire import messages as msg
from baton.wire.codec import decode, encode
from sampler.params import RULES, SamplingParams
from tests.depth import deep
from tests.pure.golden import recorded

KINDS = sorted({*get_args(msg.Message)} - {*msg.LOCAL}, key=lambda kind: kind.__name__)
EDGES = [
    -(2**63), -(2**31), -2, -1, 0, -0.0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64 - 1, math.nan, math.inf, -math.inf, 1e308, 5e-324, True, None,
    "", "x", "a\nb", "\x00", "x" * 257, "x" * 70_000, "\u202e", b"", b"x" * 65, [], [1],
    [-1], [2**31], [True], [0] * 20, [1] * 20 + [2**31], [1] * 20 + [2**32], [1] * 20 + [True],
    [1] * 20 + [1.0], [0.5] * 20 + [math.nan], [math.nan] + [0.5] * 20, [math.inf] * 3, [[]],
    [-1.0, math.nan], ["x" * 400], [b"x" * 65],
    [b"x"] * 20 + [b"x" * 65], [b"x"] * 20 + ["x"], {}, {"k": 1}, {"k" * 300: 1}, {"k": math.nan},
]  # fmt: skip
MANY = 1 << 18
LONG = [[1] * MANY, [0.5] * MANY, ["x"] * MANY, [b"x"] * MANY, [[]] * MANY, "x" * MANY]


def sound(kind: type) -> list[Any]:
    """One message of this kind as it travels, from the recorded encodings."""
    parts: list[Any] = msgpack.unpackb(
        bytes.fromhex(recorded("wire.json")["messages"][kind.__name__]), strict_map_key=False
    )
    return parts


def places(parts: list[Any], at: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every value of a message, also those within its records and lists."""
    for index, each in enumerate(parts):
        if at or index:  # not its name
            yield (*at, index)
        if isinstance(each, list):
            yield from places(each, (*at, index))


def changed(parts: list[Any], at: tuple[int, ...], value: Any) -> list[Any]:
    index, *rest = at
    new = value if not rest else changed(parts[index], tuple(rest), value)
    return [*parts[:index], new, *parts[index + 1 :]]


PLACES = [(kind, at) for kind in KINDS for at in places(sound(kind))]


def arrives(parts: list[Any]) -> Any:
    """The message, or the refusal's text."""
    try:
        return decode(msgpack.packb(parts, use_bin_type=True))
    except ProtocolError as error:
        return str(error)


def assert_within(value: Any, hint: Any, where: str) -> None:
    """What arrived keeps the bounds that its type declares."""
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
        if isinstance(bound, Range):
            assert type(value) is hint, where
            assert bound.least <= value <= bound.most, where
        else:
            assert bound.least <= len(value) <= bound.most, where
            assert not bound.printable or value.isprintable(), where
    if hint is SamplingParams:
        assert all(holds(getattr(value, name)) for name, (_, _, holds) in RULES.items())
    elif is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            name = f"{where}.{field.name}"
            assert_within(getattr(value, field.name), hints[field.name], name)
    elif get_origin(hint) is tuple:
        for each in value:
            assert_within(each, get_args(hint)[0], where)
    elif get_origin(hint) in (types.UnionType, Union) and value is not None:
        arms = {_kind(arm): arm for arm in get_args(hint)}
        assert_within(value, arms.get(type(value), get_args(hint)[0]), where)


def _kind(hint: Any) -> Any:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(plain) or plain


def unbounded(hint: Any, where: str) -> Iterator[str]:
    """Parts of this type that could be anything. SamplingParams checks itself, by its RULES."""
    if get_origin(hint) is Annotated:
        kind, bound = get_args(hint)
        if not isinstance(bound, Range if kind in (int, float) else Size):
            yield f"{where}: {bound} does not bound {kind}"
        if get_origin(kind) is tuple:
            yield from unbounded(get_args(kind)[0], f"{where}[]")
    elif get_origin(hint) in (types.UnionType, Union):
        for arm in get_args(hint):
            yield from unbounded(arm, where)
    elif is_dataclass(hint) and hint is not SamplingParams:
        for name, each in get_type_hints(hint, include_extras=True).items():
            yield from unbounded(each, f"{where}.{name}")
    elif hint not in (bool, type(None), SamplingParams):
        yield f"{where}: {hint} has no bound"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_every_message_has_bounds(kind: type) -> None:
    assert not list(unbounded(kind, kind.__name__))


def test_the_walk_finds_what_has_none() -> None:
    hints = (
        int,
        float,
        str,
        bytes,
        tuple[int, ...],
        Mapping,
        Annotated[tuple[str, ...], Size(0, 1)],
    )
    for hint in (*hints, Annotated[int, Size(0, 1)], int | None):
        assert list(unbounded(hint, "x")), hint


@settings(max_examples=deep(3000, usual=500), deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from(EDGES))
def test_a_value_at_the_edge_is_taken_within_its_bounds_or_refused_by_name(
    place: tuple[type, tuple[int, ...]], value: Any
) -> None:
    kind, at = place
    found = arrives(changed(sound(kind), at, value))
    if isinstance(found, str):
        assert len(found) < 400
    else:
        assert_within(found, kind, kind.__name__)
        assert decode(encode(found)) == found


def of_each_type() -> dict[Any, tuple[type, int]]:
    """A message and a place in it for each type that a field of a message has."""
    return {
        hint: (kind, index)
        for kind in KINDS
        for index, hint in enumerate(get_type_hints(kind, include_extras=True).values(), start=1)
    }


@pytest.mark.parametrize(("kind", "index"), of_each_type().values())
def test_a_list_without_end_is_taken_within_its_bounds_or_refused(kind: type, index: int) -> None:
    for value in LONG:
        found = arrives(changed(sound(kind), (index,), value))
        assert isinstance(found, str | kind)


def edges(hint: Any) -> list[tuple[Any, bool]]:
    """Values at the edges of a field's bounds, and whether they are within."""
    if get_origin(hint) is not Annotated:
        return []
    kind, bound = get_args(hint)
    if kind is int:
        low, high = int(bound.least), int(bound.most)
        return [(low - 1, False), (low, True), (high, True), (high + 1, False)]
    if kind is float:
        return [
            (math.nextafter(bound.least, -math.inf), False)
            if math.isfinite(bound.least) else (math.nan, False),
            (bound.least, True), (bound.most, True), (bound.most * 1.01, False), (math.nan, False),
            (math.inf, False),
        ]  # fmt: skip
    if kind in (str, bytes) and bound.most <= 2**16:
        unit = "x" if kind is str else b"x"
        found = [(unit * bound.most, True), (unit * (bound.most + 1), False)]
        return (
            [*found, ("", bound.least == 0), ("\n", not bound.printable)] if kind is str else found
        )
    return []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_edges_of_every_field_are_where_they_are_declared(kind: type) -> None:
    hints = get_type_hints(kind, include_extras=True)
    for index, field in enumerate(fields(kind), start=1):
        for value, within in edges(hints[field.name]):
            found = arrives(changed(sound(kind), (index,), value))
            if within:
                assert isinstance(found, kind), (field.name, value, found)
            else:
                assert isinstance(found, str), (field.name, value)
                assert field.name in found


def test_the_refusal_names_the_field_the_value_and_the_limit() -> None:
    hello = sound(msg.Hello)
    assert (
        arrives(changed(hello, (6,), 2**31)) == "Hello.pid must be 1 to 2147483647, got 2147483648"
    )
    text = arrives(changed(hello, (2,), "x" * 300))
    assert text == "Hello.worker must have 1 to 256 characters, got 300"
    assert arrives(changed(hello, (2,), "a\nb")) == "Hello.worker must be printable, got 'a\\nb'"
    fill = sound(msg.Fill)
    for few in (0, 30):
        text = arrives(changed(fill, (2,), [5] * few + [-1]))
        assert text == "Fill.token_ids must hold 0 to 2147483647, got -1"


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(0, 40), st.sampled_from(
    [-1, -(2**63), 2**31, 2**32 - 1, 2**32, 2**64 - 1, True, False, 1.0, None, "1", [1]]
))  # fmt: skip
def test_one_bad_id_is_found_in_lists_of_any_length(ids: list[int], at: int, bad: Any) -> None:
    start = sound(msg.Start)
    assert isinstance(arrives(changed(start, (2,), ids)), msg.Start)
    ids.insert(at % (len(ids) + 1), bad)
    assert "Start.token_ids" in arrives(changed(start, (2,), ids))


@given(st.lists(st.floats(0, 1e7), max_size=20), st.integers(0, 20), st.sampled_from(
    [math.nan, math.inf, -math.inf, -1e-9, 1.1e7, True, None, "1"]
))  # fmt: skip
def test_one_bad_number_is_found_in_lists_of_any_length(
    ages: list[float], at: int, bad: Any
) -> None:
    emitted = sound(msg.Emitted)
    assert isinstance(arrives(changed(emitted, (5,), ages)), msg.Emitted)
    ages.insert(at % (len(ages) + 1), bad)
    assert "Emitted.ages" in arrives(changed(emitted, (5,), ages))


def test_a_logprob_may_be_minus_infinity_and_nothing_else_that_is_no_number() -> None:
    scored = sound(msg.PromptScored)
    kept = arrives(changed(scored, (2,), [[-math.inf, [1, 2], [-1.0, -math.inf]]]))
    assert kept.logprobs[0].top_values == (-1.0, -math.inf)
    for bad in (math.nan, math.inf):
        assert isinstance(arrives(changed(scored, (2,), [[bad, [], []]])), str)
        assert isinstance(arrives(changed(scored, (2,), [[-1.0, [1], [-1.0, bad]]])), str)
