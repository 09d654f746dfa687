"""Text as it grows: never half a character, never part of a stop string, in the end all of it."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from baton.errors import ModelError
from baton.params import GenerationParams
from baton.text import REPLACEMENT, TextStream, Tokenizer

FILE = Path(__file__).resolve().parents[2] / "baton" / "models" / "demo" / "tokenizer.json"
PROMPT = "The cat"
ANY = GenerationParams(9)


@cache
def demo() -> Tokenizer:
    return Tokenizer(FILE)


def cut(ids: list[int], data: st.DataObject) -> list[list[int]]:
    """The ids in pieces of any length."""
    borders = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    return [ids[a:b] for a, b in zip([0, *borders], [*borders, len(ids)], strict=True)]


def streamed(ids: list[int], pieces: list[list[int]], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(demo(), demo().encode(PROMPT), GenerationParams(9, stop=stop))
    out = [stream.push(piece) for piece in pieces]
    return [*out, stream.finish()]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SPOKEN = st.text(st.sampled_from("ab .,'\n\té€漢🙂\u0301"), max_size=30)


@given(TEXTS | SPOKEN, st.data())
def test_the_pieces_are_the_text_however_it_is_cut(text: str, data: st.DataObject) -> None:
    ids = demo().encode(text)
    prompt = demo().encode(PROMPT)
    whole = demo().decode(prompt + ids)
    assert demo().decode(prompt) + "".join(streamed(ids, cut(ids, data))) == whole


@given(SPOKEN)
def test_a_character_comes_whole_or_not_yet(text: str) -> None:
    ids = demo().encode(text)
    for piece in streamed(ids, [[each] for each in ids]):
        assert REPLACEMENT not in piece


def test_an_emoji_of_several_tokens_comes_with_its_last_one() -> None:
    ids = demo().encode("🙂")
    assert len(ids) > 1
    assert streamed(ids, [[each] for each in ids]) == [*[""] * (len(ids) - 1), "🙂", ""]


def test_a_character_that_never_gets_whole_is_said_to_be_none() -> None:
    ids = demo().encode("a🙂")[:-1]
    assert "".join(streamed(ids, [ids])) == "a" + REPLACEMENT


@settings(max_examples=150)
@given(
    st.text(st.sampled_from("abc "), max_size=25),
    st.lists(st.text(st.sampled_from("abc "), min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    ids = demo().encode(text)
    whole = demo().decode(ids)
    # Tokens end somewhere: a stop is seen with the token that completes it, so the earliest found
    # in what had come by then is where the text ends.
    got = "".join(streamed(ids, [[each] for each in ids], tuple(stops)))
    found = [whole.find(stop) for stop in stops if stop in whole]
    if not found:
        assert got == whole
    else:
        assert whole.startswith(got)
        assert not any(stop in got for stop in stops)
        ends = {whole.find(s) for s in stops if s in whole}
        assert len(got) in ends
        earliest_complete = min(whole.find(s) + len(s) for s in stops if s in whole)
        assert len(got) <= earliest_complete


def test_a_stop_string_across_tokens_is_seen_and_none_of_it_shown() -> None:
    ids = demo().encode("one two three")
    pieces = streamed(ids, [[each] for each in ids], ("wo th",))
    assert "".join(pieces) == "one t"


def test_nothing_comes_after_the_stop() -> None:
    stream = TextStream(demo(), demo().encode(PROMPT), GenerationParams(9, stop=("b",)))
    assert stream.push(demo().encode("abc")) == "a"
    assert stream.stopped
    assert stream.push(demo().encode("xyz")) == ""
    assert stream.finish() == ""


def test_the_very_first_character_may_be_the_stop() -> None:
    stream = TextStream(demo(), demo().encode(PROMPT), GenerationParams(9, stop=("a",)))
    assert stream.push(demo().encode("abc")) == ""
    assert stream.stopped


def test_what_may_become_a_stop_string_waits_until_it_is_decided() -> None:
    stream = TextStream(demo(), demo().encode(PROMPT), GenerationParams(9, stop=("END.",)))
    assert stream.push(demo().encode("x EN")) == "x "
    assert stream.push(demo().encode("T")) == "ENT"
    assert stream.push(demo().encode("EN")) == ""
    assert stream.finish() == "EN"
    assert not stream.stopped


def test_the_longest_beginning_of_any_stop_string_is_held_back() -> None:
    stream = TextStream(demo(), demo().encode(PROMPT), GenerationParams(9, stop=("aab", "abx")))
    assert stream.push(demo().encode("aa")) == ""
    assert stream.push(demo().encode("a")) == "a"
    assert stream.push(demo().encode("b")) == ""
    assert stream.stopped


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    stream = TextStream(demo(), demo().encode(PROMPT), GenerationParams(9, stop=("cat",)))
    assert stream.push(demo().encode(" sat")) == " sat"
    assert not stream.stopped


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    ids = demo().encode("one two")
    stream = TextStream(demo(), demo().encode(PROMPT), ANY)
    got = stream.push([ids[0], 10**6, *ids[1:], 2**31 - 1]) + stream.finish()
    assert got == "one two"


@settings(max_examples=200)
@given(st.lists(st.integers(0, 700), max_size=12), st.data())
def test_any_ids_at_all_give_text_and_no_exception(ids: list[int], data: st.DataObject) -> None:
    assert isinstance("".join(streamed(ids, cut(ids, data))), str)


def byte_ids(raw: bytes) -> list[int]:
    """One token for each byte, as a model that babbles would give them."""
    shown = {ord(c) if ord(c) < 256 else None: c for c in pre_tokenizers.ByteLevel.alphabet()}
    plain = [b for b in range(256) if b in shown]
    rest = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    vocabulary = FastTokenizer.from_file(str(FILE)).get_vocab()
    return [vocabulary[table[b]] for b in raw]


def test_a_character_after_broken_bytes_comes_whole_too() -> None:
    ids = byte_ids(b"\xe2\xe2\xe2" + "é".encode())
    got = "".join(streamed(ids, [[each] for each in ids]))
    assert got == REPLACEMENT * 3 + "é"


def with_word_spaces(folder: Path) -> Tokenizer:
    """A tokenizer of the Llama kind: a space belongs to the word after it; the first has none."""
    vocabulary = {"<unk>": 0, "▁one": 1, "▁two": 2, "▁three": 3, "<sep>": 4}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.add_special_tokens(["<sep>"])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("(?=▁)"), "isolated")]
    )
    fast.decoder = decoders.Metaspace()
    file = folder / "tokenizer.json"
    fast.save(str(file))
    return Tokenizer(file)


def test_spaces_between_words_survive_the_stream(tmp_path: Path) -> None:
    tokenizer = with_word_spaces(tmp_path)
    stream = TextStream(tokenizer, [1], ANY)
    assert [stream.push([2]), stream.push([3]), stream.finish()] == [" two", " three", ""]


def test_a_special_token_in_between_costs_no_space(tmp_path: Path) -> None:
    tokenizer = with_word_spaces(tmp_path)
    stream = TextStream(tokenizer, [1], ANY)
    got = "".join(stream.push([each]) for each in (2, 4, 3)) + stream.finish()
    assert tokenizer.decode([1]) + got == tokenizer.decode([1, 2, 4, 3])


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"tokenizer\.json is not a tokenizer\.json: it has no model"
    ):
        Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match="nowhere"):
        Tokenizer(tmp_path / "nowhere.json")
