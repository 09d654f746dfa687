"""Bytes become a message whose every field is of its type, or a ProtocolError: there is no third way."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin
from typing import get_type_hints as bare_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.bounds import Range, Size
from baton.errors import ProtocolError
from baton.kv.grant import Grant
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.codec import MAX_MESSAGE_BYTES, MAX_WHY_CHARACTERS, decode, decode_malformed, encode
from sampler.params import SamplingParams
from tests.depth import deep

KINDS = sorted({*get_args(msg.Message)} - {*msg.LOCAL}, key=lambda kind: kind.__name__)
WHOLE = st.integers(-(2**63), 2**63 - 1)
REAL = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=12)
PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
NAME = st.text(PRINTABLE, min_size=1, max_size=12)
PLAIN = st.dictionaries(
    TEXT,
    st.one_of(
        TEXT, WHOLE, REAL, st.binary(max_size=8), st.booleans(),
        st.lists(WHOLE, max_size=3), st.lists(st.binary(max_size=4), max_size=3),
    ),
    max_size=4,
)  # fmt: skip
GRANTS = st.builds(
    Grant, NAME, NAME, NAME, st.integers(1, 2**63 - 1),
    st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=4).map(tuple),
)  # fmt: skip
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3).map(
        lambda chosen: tuple(chosen.items())
    ),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple),
    seed=WHOLE,
)
GENERATIONS = st.builds(
    GenerationParams, st.integers(1, 2**31 - 1), SAMPLINGS,
    stop=st.lists(st.text(min_size=1, max_size=4), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    logprobs=st.integers(-1, 20), keep_special=st.booleans(), cache_salt=TEXT,
)  # fmt: skip
RULED = {Grant: GRANTS, SamplingParams: SAMPLINGS, GenerationParams: GENERATIONS}
SIMPLEST = {
    Grant: Grant("w", "w/0", "r#0", 1, (0,)),
    SamplingParams: SamplingParams(),
    GenerationParams: GenerationParams(1, SamplingParams()),
}
SCALARS = {int: WHOLE, float: REAL, str: TEXT, bytes: st.binary(max_size=12), bool: st.booleans()}
UNLIKE = {
    int: [True, 1.0, "1", b"1", [], {}],
    float: ["1", b"1", True, [], {}],
    str: [1, b"x", 0.5, True, [], {}],
    bytes: ["x", 1, [], {}],
    bool: [0, 1, "true", []],
    tuple: ["abc", b"abc", 3, {}, True],
    Mapping: [[], "abc", 3, [["k", 1]], {1: 2}, {b"k": 1}, {"k": {}}, {"k": [[1]]}],
    "dataclass": [{}, "abc", 3, [], [[]], [1] * 40],
}


def get_type_hints(kind: type) -> dict[str, Any]:
    return bare_type_hints(kind, include_extras=True)


def bounded(hint: Any) -> tuple[Any, Any]:
    """The type, and its bound or None."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint, None)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Every value a field of this type can hold; lists and text up to a short length."""
    hint, bound = bounded(hint)
    if hint in RULED:
        return RULED[hint]
    if isinstance(bound, Range):
        if hint is int:
            return st.integers(int(bound.least), int(bound.most))
        return st.floats(bound.least, bound.most)
    if isinstance(bound, Size) and hint is str:
        letters = PRINTABLE if bound.printable else st.characters(exclude_categories=("Cs",))
        return st.text(letters, min_size=bound.least, max_size=12)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, *[values(hints[field.name]) for field in fields(hint)])
    if isinstance(hint, type):
        return SCALARS[hint]
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is Mapping:
        return PLAIN
    assert get_origin(hint) in (types.UnionType, Union), hint
    return st.one_of(*[st.none() if a is type(None) else values(a) for a in get_args(hint)])


def unlike(hint: Any) -> list[Any]:
    """Values a field of this type cannot hold, as they would come off the wire."""
    hint, _ = bounded(hint)
    if get_origin(hint) in (types.UnionType, Union):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        if len(arms) > 1:  # a scalar or a list
            return [1, 0.5, True, {}, b"x", [None], ["x"], None]
        return unlike(arms[0])
    if get_origin(hint) is tuple:
        inside = [[each] for each in unlike(get_args(hint)[0])]
        return [*UNLIKE[tuple], *inside, None]
    if get_origin(hint) is Mapping:
        return [*UNLIKE[Mapping], None]
    return [*UNLIKE["dataclass" if is_dataclass(hint) else hint], None]


def sample(kind: type) -> Any:
    """One message of this kind, the simplest."""
    return minimal(kind)


def minimal(hint: Any) -> Any:
    hint, bound = bounded(hint)
    if hint in SIMPLEST:
        return SIMPLEST[hint]
    if isinstance(bound, Range):
        return hint(max(0, bound.least))
    if isinstance(bound, Size) and hint is str:
        return "x" * bound.least
    if isinstance(hint, type) and is_dataclass(hint):
        return hint(*[minimal(each) for each in get_type_hints(hint).values()])
    if isinstance(hint, type):
        return hint()
    if get_origin(hint) is tuple:
        return ()
    if get_origin(hint) is Mapping:
        return {}
    return None if type(None) in get_args(hint) else minimal(get_args(hint)[0])


def refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def packed(*parts: Any) -> bytes:
    result: bytes = msgpack.packb(list(parts), use_bin_type=True)
    return result


def parts_of(message: Any) -> list[Any]:
    result: list[Any] = msgpack.unpackb(encode(message))
    return result


SENT = [kind for kind in KINDS if kind not in msg.LOCAL]


@pytest.mark.parametrize("kind", SENT, ids=lambda kind: kind.__name__)
def test_what_was_sent_is_what_arrives(kind: type) -> None:
    @settings(max_examples=25)
    @given(values(kind))
    def there_and_back(message: Any) -> None:
        arrived = decode(encode(message))
        assert arrived == message
        assert type(arrived) is kind
        assert encode(arrived) == encode(message)

    there_and_back()


@pytest.mark.parametrize("kind", msg.LOCAL, ids=lambda kind: kind.__name__)
def test_what_only_the_loop_may_say_is_not_taken_from_a_socket(kind: type) -> None:
    refused(encode(sample(kind)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_field_of_another_type_is_refused(kind: type) -> None:
    hints = get_type_hints(kind)
    parts = parts_of(sample(kind))
    for place, field in enumerate(fields(kind), start=1):
        optional = type(None) in get_args(hints[field.name])
        for wrong in unlike(hints[field.name]):
            if wrong is None and optional:
                continue
            refused(packed(*parts[:place], wrong, *parts[place + 1 :]))


def test_the_refusal_names_the_field_and_both_types() -> None:
    with pytest.raises(ProtocolError, match=r"^Reserve.tokens must be int, got str$"):
        decode(packed("Reserve", "r#0", "12", []))
    with pytest.raises(ProtocolError, match=r"^Grant.worker must be str, got int$"):
        decode(packed("Reserved", [1, "e", "r", 1, [], []]))
    with pytest.raises(ProtocolError, match=r"^Reserve has 3 fields, got 1$"):
        decode(packed("Reserve", "r#0"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_field_too_many_or_too_few_is_refused(kind: type) -> None:
    parts = parts_of(sample(kind))
    refused(packed(*parts, 1))
    refused(packed(*parts, None))
    if len(parts) > 1:
        refused(packed(*parts[:-1]))
        refused(packed(parts[0]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_half_a_message_is_none(kind: type) -> None:
    whole = encode(sample(kind))
    for length in range(len(whole)):
        refused(whole[:length])
    refused(whole + b"\xc0")


@settings(max_examples=deep(400, usual=100))
@given(st.binary(max_size=64))
def test_noise_is_refused(noise: bytes) -> None:
    refused(noise)


JSONISH = st.recursive(
    st.none() | st.booleans() | WHOLE | REAL | TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=deep(400, usual=100))
@given(st.sampled_from(KINDS), st.lists(JSONISH, max_size=18))
def test_a_known_name_with_anything_in_it_is_a_message_or_refused(
    kind: type, rest: list[Any]
) -> None:
    try:
        message = decode(packed(kind.__name__, *rest))
    except ProtocolError:
        return
    assert decode(encode(message)) == message


@settings(max_examples=deep(300, usual=100))
@given(st.sampled_from(KINDS), st.data())
def test_a_flipped_byte_gives_another_message_or_none(kind: type, data: st.DataObject) -> None:
    raw = bytearray(encode(sample(kind)))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        message = decode(bytes(raw))
    except ProtocolError:
        return
    assert isinstance(message, tuple(KINDS))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc0", b"\x90", packed(), packed("NoSuchMessage"), packed(1), packed(None),
        packed(["GetClusterInfo"]), packed({"GetClusterInfo": 1}), packed(b"GetClusterInfo"),
        packed("GetClusterInfo", 1),
        packed("Message"), packed("SamplingParams"), packed("Grant", "w", "e", "r", 1, []),
        packed("__class__"), msgpack.packb("GetClusterInfo"),
        b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        packed("Drop", msgpack.ExtType(1, b"x")), packed("Drop", msgpack.ExtType(127, b"\0" * 4)),
        b"\x92\xa4Drop\xa2\xff\xfe", b"\x91" * 10_000, b"\x92\xa4Drop" + b"\x91" * 900 + b"\x01",
        b"\x92\xa4Drop" + b"\x81\xa1k" * 900 + b"\x01", b"\x80\x04K\x01.",
    ],
    ids=range(26),
)  # fmt: skip
def test_hostile_bytes_are_refused(data: bytes) -> None:
    refused(data)


def test_a_map_is_no_message() -> None:
    refused(msgpack.packb({"GetClusterInfo": []}))


def test_a_timestamp_is_an_extension_and_refused_where_a_number_belongs() -> None:
    beat = parts_of(msg.Heartbeat("e", 1))
    refused(packed(*beat[:-1], msgpack.Timestamp(1)))


def test_a_grant_with_nonsense_in_it_is_refused() -> None:
    good = parts_of(msg.Reserved(Grant("w", "e", "r", 1, (1, 2))))
    assert decode(packed(*good)) == msg.Reserved(Grant("w", "e", "r", 1, (1, 2)))
    refused(packed("Reserved", ["w", "e", "r", 0, [1]]))
    refused(packed("Reserved", ["w", "e", "r", 1, [1, 1]]))


def test_a_whole_number_is_taken_where_a_real_one_belongs() -> None:
    parts = parts_of(msg.Attached("w", "e", "shm", 0.0, ""))
    parts[4] = 3
    message = decode(packed(*parts))
    assert isinstance(message, msg.Attached)
    assert type(message.gb_per_s) is float


def test_the_refusal_is_short_whatever_was_sent() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(packed("x" * 100_000))
    assert len(str(caught.value)) <= 200
    with pytest.raises(ProtocolError) as caught:
        decode(packed("Submit", "r", "p", None, 1, {"k" * 100_000: {}}, [], False))
    assert len(str(caught.value)) <= 200


def test_more_bytes_than_the_limit_are_refused_both_ways() -> None:
    refused(bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ProtocolError, match="larger than the limit"):
        encode(msg.Submit("r", "x" * MAX_MESSAGE_BYTES, GenerationParams(1)))


def test_a_map_that_names_a_key_twice_is_refused() -> None:
    twice = b"\x82\xa4seed\x01\xa4seed\x02"
    once = packed("Submit", "r", "p", None, 1, {"seed": 1}, [], False)
    refused(once.replace(b"\x81\xa4seed\x01", twice))


def test_messages_cannot_be_changed_once_made() -> None:
    for kind in KINDS:
        message = sample(kind)
        for field in fields(kind):
            with pytest.raises(AttributeError):
                setattr(message, field.name, None)


# ---- malformed messages that are answered


def malformed(data: bytes) -> msg.Malformed | None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    return decode_malformed(data, caught.value)


def test_a_submit_that_breaks_a_rule_names_its_request_and_the_rule() -> None:
    params = parts_of(msg.Submit("r1", "once", GenerationParams(1)))[3]
    params[0] = 0  # max_new_tokens
    assert malformed(
        packed("Submit", "r1", "once", params, "", "", 0.0, 0.0, 0, "", "")
    ) == msg.Malformed("Submit", "r1", "max_new_tokens must be at least 1, got 0")


def test_a_submit_of_another_version_names_its_request_and_the_difference() -> None:
    assert malformed(packed("Submit", "r1", "once", [1], "more")) == msg.Malformed(
        "Submit", "r1", "Submit has 10 fields, got 4"
    )


def test_a_change_of_adapters_that_breaks_a_rule_names_its_request_and_the_rule() -> None:
    found = malformed(packed("UnloadAdapter", "u1", "a\nb"))
    assert found is not None
    assert (found.kind, found.about) == ("UnloadAdapter", "u1")
    assert "name" in found.why


def test_a_hello_of_another_version_names_its_protocol() -> None:
    found = malformed(packed("Hello", "decode", "d1", "d1/0", 5, "host"))
    assert found == msg.Malformed("Hello", "5", f"Hello has {len(fields(msg.Hello))} fields, got 5")


@pytest.mark.parametrize(
    "data",
    [
        packed("Submit"), packed("Submit", 0.5, "once", []), packed("Submit", None, "once", []),
        packed("Submit", True, "once", []), packed("Submit", ["r1"], "once", []),
        packed("Submit", "r" * 1000, "once", []), packed("Drop", "r1", 2), packed(["Submit"], "r1"),
        packed("Hello", "decode", "d1"), packed(), packed(1), b"", b"\x91" * 10_000,
        encode(msg.Submit("r1", "once", GenerationParams(1)))[:-1],
    ],
    ids=range(14),
)  # fmt: skip
def test_whatever_else_is_malformed_is_not_answered(data: bytes) -> None:
    assert malformed(data) is None


@settings(max_examples=200)
@given(st.sampled_from(["Submit", "Hello"]), st.lists(JSONISH, max_size=18))
def test_the_answer_is_short_whatever_was_sent(name: str, rest: list[Any]) -> None:
    data = packed(name, *rest)
    try:
        decode(data)
    except ProtocolError as error:
        found = decode_malformed(data, error)
        assert found is None or len(found.why) <= MAX_WHY_CHARACTERS


@pytest.mark.parametrize("request_id", ["", "\0", "a\nb"])
def test_a_malformed_submit_whose_id_no_answer_could_carry_is_not_answered(request_id: str) -> None:
    data = msgpack.packb(["Submit", request_id, "hi", "no params"])
    assert decode_malformed(data, ProtocolError("")) is None
