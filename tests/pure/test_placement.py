"""Which workers a request goes to."""

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.prefix import HASH_BYTES
from router.affinity import Affinity
from router.placement import (
    DecodeChoice,
    PrefillChoice,
    choose_decode,
    choose_prefill,
)

NAMES = st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)
DECODES = NAMES.flatmap(
    lambda names: st.tuples(
        *[st.builds(DecodeChoice, st.just(n), st.integers(-2, 9), st.integers(0, 4)) for n in names]
    )
)
PREFILLS = NAMES.flatmap(
    lambda names: st.tuples(
        *[
            st.builds(PrefillChoice, st.just(n), st.integers(0, 9), st.frozensets(st.sampled_from("xy")))
            for n in names
        ]
    )
)  # fmt: skip


def test_the_least_busy_decode_worker_with_room_is_chosen() -> None:
    choices = [DecodeChoice("a", 2, 0), DecodeChoice("b", 5, 3), DecodeChoice("c", 5, 1)]
    assert choose_decode(choices, 3) == "c"
    assert choose_decode(choices, 2) == "a"
    assert choose_decode(choices, 6) is None


def test_ties_go_to_the_most_room_then_to_the_name() -> None:
    assert choose_decode([DecodeChoice("a", 5, 1), DecodeChoice("b", 9, 1)], 1) == "b"
    assert choose_decode([DecodeChoice("b", 5, 1), DecodeChoice("a", 5, 1)], 1) == "a"


def test_what_is_cached_outweighs_some_requests_but_not_any_number() -> None:
    idle, full = DecodeChoice("a", 9, 0), DecodeChoice("b", 9, 3, cached=1.0)
    assert choose_decode([idle, full], 1) == "b"
    assert choose_decode([idle, DecodeChoice("b", 9, 5, cached=1.0)], 1) == "a"
    assert choose_decode([idle, DecodeChoice("b", 9, 3, cached=0.5)], 1) == "a"
    assert choose_decode([idle, DecodeChoice("b", 0, 0, cached=1.0)], 1) == "a"


def test_blocks_are_looked_for_where_they_were_sent_last() -> None:
    affinity = Affinity()
    a, b, c, d = (sha256(bytes([i])).digest()[:HASH_BYTES] for i in range(4))
    affinity.sent([a, b, c], "x")
    assert [affinity.there([a, b, d], w) for w in "xy"] == [2, 0]
    affinity.sent([a, d], "y")
    assert [affinity.there([a, b, c], w) for w in "xy"] == [0, 1]
    assert [affinity.there([b, c], w) for w in "xy"] == [2, 0]


def test_a_block_takes_the_slot_of_another_and_is_not_taken_for_it() -> None:
    affinity = Affinity(slots=4)
    sent = [sha256(bytes([i])).digest()[:HASH_BYTES] for i in range(100)]
    affinity.sent(sent, "x")
    left = [each for each in sent if affinity.there([each], "x")]
    assert len({int.from_bytes(each, "little") % 4 for each in left}) == len(left) == 4
    assert not any(affinity.there([each], "y") for each in sent)


@given(DECODES, st.integers(0, 9))
def test_the_chosen_decode_worker_has_room_and_nobody_with_room_has_less_to_do(
    choices: tuple[DecodeChoice, ...], blocks: int
) -> None:
    fitting = {c.worker: c for c in choices if c.free_blocks >= blocks}
    chosen = choose_decode(choices, blocks)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert fitting[chosen].running == min(c.running for c in fitting.values())


@given(DECODES, st.integers(0, 9))
def test_equal_clusters_place_equally(choices: tuple[DecodeChoice, ...], blocks: int) -> None:
    assert choose_decode(choices, blocks) == choose_decode(choices[::-1], blocks)


@given(PREFILLS)
def test_the_chosen_prefill_worker_can_write_there_and_has_the_least_to_do(
    choices: tuple[PrefillChoice, ...],
) -> None:
    able = {c.worker: c for c in choices if "x" in c.reaches}
    chosen = choose_prefill(choices, "x")
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert able[chosen].waiting_tokens == min(c.waiting_tokens for c in able.values())
    assert chosen == choose_prefill(choices[::-1], "x")
