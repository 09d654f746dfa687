"""Text of a server that knows no ids: the same ids however it comes, and the same text from them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import RequestError
from baton.text import Tokenizer
from decode_worker.upstream.texts import LONGEST_WORD, Reader, Texts, Untellable, words
from tests.pure.test_text_kinds import SENTENCES, TEXTS, made

LOSSLESS = ("byte level", "llama 2", "gemma", "metaspace first")


def read(texts: Texts, *parts: str) -> list[int]:
    """The ids of an answer that comes in these parts."""
    reader = Reader(texts)
    found = [token for part in parts for token in reader.feed(part, ends=False)]
    return found + reader.feed("", ends=True)


@given(TEXTS | SENTENCES)
def test_words_make_the_text_and_depend_on_what_came_before_alone(text: str) -> None:
    found = words(text)
    assert "".join(found) == text
    assert all(0 < len(word) <= LONGEST_WORD for word in found)
    for index in range(len(text)):
        assert words(text[:index])[:-1] == found[: max(0, len(words(text[:index])) - 1)]


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=SENTENCES | TEXTS, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_the_ids_are_the_same_however_the_text_comes_and_say_it(
    kind: str, text: str, cuts: list[int]
) -> None:
    texts = Texts(made(kind))
    begin = texts.tokenizer.encode("So", special=False)
    try:
        whole = read(texts, text)
    except Untellable:
        assert any(not texts.lossless(each) for each in text)
        return
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[a:b] for a, b in pairwise(places)]
    assert read(texts, *parts) == whole
    assert texts.tokenizer.decode([*begin, *whole], special=True) == f"So{text}"


def test_the_last_word_waits_for_more() -> None:
    reader = Reader(Texts(made("byte level")))
    assert reader.feed(" qu", ends=False) == []
    assert reader.feed("ick brown", ends=False) == list(reader.texts.ids(" quick"))
    assert reader.feed("", ends=True) == list(reader.texts.ids(" brown"))


@pytest.mark.parametrize(
    ("kind", "adds"), [*((kind, True) for kind in LOSSLESS), ("byte level", False)]
)
def test_a_prompt_goes_out_as_the_text_that_it_was(kind: str, adds: bool) -> None:
    texts = Texts(made(kind), adds)
    ids = texts.tokenizer.encode("The quick brown fox", special=True)
    sent = texts.prompt(ids)
    assert texts.tokenizer.encode(sent, special=adds) == ids
    more = [*ids, *texts.ids(" jump")]
    assert texts.prompt(more, len(more) - len(ids)) == f"{sent} jump"


def test_ids_that_are_no_text_are_refused() -> None:
    texts = Texts(made("byte level"))
    fox: list[int] = [texts.tokenizer.encode(letter, special=False)[0] for letter in "fox"]
    half = texts.tokenizer.encode("語", special=False)[:1]
    for ids in ([*fox, *half], []):
        with pytest.raises(RequestError, match="takes text alone"):
            texts.prompt(ids)


def test_a_tokenizer_that_loses_a_part_of_the_text_is_known_by_it() -> None:
    assert Texts(made("byte level")).lossless("Naïve  FAÇADE")
    lossy: Tokenizer = made("WordPiece")
    assert not Texts(lossy).lossless("Naïve  FAÇADE")
