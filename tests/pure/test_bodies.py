"""Bodies are counted before anything is built from them."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.server.api_error import ApiError
from baton.server.bodies import (
    COMPLETION_KEYS,
    DEEPEST_JSON,
    INLINE,
    LONGEST_NUMBER,
    MAX_BODY_BYTES,
    MOST_CONTAINERS,
    MOST_ELEMENTS,
    PIECE,
    JsonLimits,
    JsonScan,
    Path,
    feed,
    limits_of,
    model,
    parse,
    read,
)
from baton.server.conversation import MAX_MESSAGES
from baton.server.schema import MAX_PROMPTS, ChatRequest, CompletionRequest

CONTEXT = 2048
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def size(value: Any) -> tuple[int, int, int, int]:
    """Elements, keys, containers, depth, as a reader counts them."""
    if not isinstance(value, list | dict):
        return 0, 0, 0, 0
    inner = [size(each) for each in (value.values() if isinstance(value, dict) else value)]
    sums = [sum(each[i] for each in inner) for i in range(3)]
    keys = len(value) if isinstance(value, dict) else 0
    depth = 1 + max((each[3] for each in inner), default=0)
    return sums[0] + max(len(value), 1), sums[1] + keys, sums[2] + 1, depth


def passes(data: bytes, limits: JsonLimits, cuts: list[int] | None = None) -> bool:
    """`cuts`: where the text is cut into pieces."""
    scan = JsonScan(limits)
    ends = sorted({min(cut, len(data)) for cut in cuts or ()} | {len(data)})
    try:
        for start, end in zip([0, *ends], ends, strict=False):
            scan.feed(data[start:end])
    except ApiError:
        return False
    return True


@given(JSON, st.booleans(), st.sampled_from([None, 1]), st.lists(st.integers(0, 400)))
def test_what_is_counted_is_what_is_there_wherever_it_is_cut(
    value: Any, ascii_only: bool, indent: int | None, cuts: list[int]
) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    elements, keys, containers, depth = size(value)
    exact = JsonLimits(elements, keys, containers, depth)
    assert passes(data, exact, cuts)
    for less in (
        JsonLimits(elements - 1, keys, containers, depth),
        JsonLimits(elements, keys - 1, containers, depth),
        JsonLimits(elements, keys, containers - 1, depth),
        JsonLimits(elements, keys, containers, depth - 1),
    ):
        assert not passes(data, less, cuts) or not containers or (less.keys < 0 and not keys)


@given(st.lists(st.sampled_from([b'"', b"\\", b"a", b"[", b"1", b","]), max_size=60))
def test_what_a_parser_reads_is_within_what_was_counted(parts: list[bytes]) -> None:
    """Of any bytes, valid or not, cut anywhere: the parser builds no more than was counted."""
    data = b"[" + b"".join(parts) + b"]"
    try:
        value = json.loads(data)
    except ValueError:
        return
    elements, keys, containers, depth = size(value)
    cuts = list(range(len(data)))
    assert passes(data, JsonLimits(elements, keys, containers, depth), cuts)
    assert not passes(data, JsonLimits(elements - 1, keys, containers, depth), cuts)


LOADS = {
    "empty lists": b'{"prompt":[' + b"[]," * 1_000_000 + b"[]]}",
    "no JSON": b"[" * 31 + b"[]," * 1_000_000,
    "biases": b'{"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}}",
    "unknown keys": b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}",
    "ids": b'{"prompt":[' + b"5," * 1_900_000 + b"5]}",
    "zeros in an object": b'{"prompt":{"a":[' + b"0," * 1_900_000 + b"0]}}",
    "depth": b"[" * 1_000_000 + b"]" * 1_000_000,
    "empty strings": b'["' + b'","' * 1_000_000 + b'"]',
    "closing brackets": b"]" * 4_000_000,
    "one number": b"9" * 4_000_000,
    "long numbers": b"[" + b",".join([b"9" * 4_200] * 900) + b"]",
    "numbers without an end": b"[1" + b"1 " * 10 + b"." + b"5" * 3_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("path", list(Path))
def test_a_load_is_refused_at_its_first_excess(name: str, path: Path) -> None:
    limits = limits_of(path, CONTEXT)
    assert limits is not None
    scan = JsonScan(limits)
    data = LOADS[name]
    seen = 0

    def feed_all() -> None:
        nonlocal seen
        for seen in range(0, len(data), PIECE):
            scan.feed(data[seen : seen + PIECE])

    with pytest.raises(ApiError) as refused:
        feed_all()
    assert refused.value.status == 400
    assert any(character.isdigit() for character in refused.value.message) or "bracket" in str(
        refused
    )
    most = PIECE * 2 if name in ("depth", "closing brackets", "one number") else len(data) // 2
    assert seen < most, "it was read on"


def test_what_is_allowed_passes() -> None:
    limits = limits_of(Path.COMPLETIONS, CONTEXT)
    assert limits is not None
    prompts = {
        "prompt": [[1000] * 1000] * MAX_PROMPTS,
        "logit_bias": {str(i): 1 for i in range(1024)},
    }
    assert passes(json.dumps(prompts).encode(), limits)
    assert passes(json.dumps({"prompt": "a" * (MAX_BODY_BYTES - 20)}).encode(), limits)
    assert passes(json.dumps({"prompt": '"\\' * 500_000}).encode(), limits)
    parts = [{"type": "text", "text": "a"}]
    turns = {"messages": [{"role": "user", "content": parts, "name": "b"}] * MAX_MESSAGES}
    chat = limits_of(Path.CHAT, CONTEXT)
    assert chat is not None
    assert passes(json.dumps(turns, indent=1).encode(), chat)


def test_ids_may_be_as_many_as_the_served_context_lets_be() -> None:
    small, large = limits_of(Path.COMPLETIONS, 16), limits_of(Path.COMPLETIONS, 1 << 20)
    assert small is not None
    assert large is not None
    assert MAX_PROMPTS * 16 < small.elements < large.elements == MOST_ELEMENTS
    assert limits_of("/v1/models", 16) is None


def test_each_limit_is_named() -> None:
    limits = limits_of(Path.COMPLETIONS, 1 << 20)
    assert limits is not None
    for data, named in (
        (b"[" * (DEEPEST_JSON + 1), f"{DEEPEST_JSON} deep"),
        (b"[" + b"1," * MOST_ELEMENTS + b"1]", f"{MOST_ELEMENTS:,} elements"),
        (b"{" + b'"a":1,' * COMPLETION_KEYS + b'"b":1}', f"{COMPLETION_KEYS:,} keys"),
        (b"[" + b"[]," * MOST_CONTAINERS + b"1]", f"{MOST_CONTAINERS:,} arrays"),
        (b"[" + b"1" * (LONGEST_NUMBER + 1), f"{LONGEST_NUMBER} characters"),
    ):
        with pytest.raises(ApiError, match=named):
            JsonScan(limits).feed(data)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b'"\xff"', "[1]".encode("utf-16"), b"nan", b"[1,]", b'{"a"}']
)
def test_what_is_no_json_in_utf_8_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError, match="not valid JSON"):
        parse(data)


def test_a_byte_order_mark_and_half_a_pair_are_read_as_before() -> None:
    assert parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse(b'"\\ud800"') == "\ud800"


def test_others_get_their_turn_meanwhile() -> None:
    async def work() -> int:
        data = json.dumps({"prompt": "a" * 3_000_000}).encode()
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        limits = limits_of(Path.STREAM, CONTEXT)
        assert limits is not None
        await feed(JsonScan(limits), data, asyncio.Lock())
        found = turns
        value = await read(data)
        request = await model(CompletionRequest, value, size=len(data))
        assert request.prompt == "a" * 3_000_000
        assert turns > found, "parsed in the event loop"
        counting.cancel()
        return found

    assert asyncio.run(work()) >= 3_000_000 // PIECE


def test_many_uploads_at_once_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece of all of them in a turn of the event loop. Small ones do not stand in that line."""
    scanned, scan = [0], JsonScan.feed  # large pieces, by turn

    def counted(self: JsonScan, piece: bytes) -> None:
        scanned[-1] += len(piece) > INLINE
        scan(self, piece)

    monkeypatch.setattr(JsonScan, "feed", counted)

    async def turns() -> None:
        while True:
            scanned.append(0)
            await asyncio.sleep(0)

    async def work() -> None:
        counting, turn = asyncio.create_task(turns()), asyncio.Lock()
        large = b'"' + b"a" * (8 * PIECE)
        uploads = [
            asyncio.create_task(feed(JsonScan(JsonLimits()), large, turn)) for _ in range(30)
        ]
        await asyncio.sleep(0)
        await feed(JsonScan(JsonLimits()), b" " * INLINE, turn)
        assert not any(each.done() for each in uploads), "the small one had to wait"
        uploads[0].cancel()  # whoever leaves keeps nobody waiting
        await asyncio.wait(uploads)
        counting.cancel()
        assert max(scanned) == 1
        assert sum(scanned) >= 29 * 8

    asyncio.run(work())


def test_errors_in_a_large_request_are_those_of_a_small_one() -> None:
    async def work() -> None:
        wrong = {"messages": [{"role": "user", "content": "a"}] * 9000 + [3]}
        for many in (1, 100_000):
            with pytest.raises(ApiError) as refused:
                await model(ChatRequest, wrong, size=many)
            assert refused.value.param == "messages"
            assert len(refused.value.message) <= 300

    asyncio.run(work())
