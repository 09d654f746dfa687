"""Tokenizer files of other formats: the tokens are those of the programs that wrote them."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.checkpoints.sentencepiece import sentencepiece
from baton.checkpoints.tokenizer_json import Vocabulary
from baton.errors import ModelError
from baton.models.formats.bytelevel import byte_letters, byte_level
from baton.models.formats.encoding_file import read_encoding
from baton.models.formats.llama_vocabulary import PATTERN
from baton.text import Tokenizer
from tests.torch.foreign import (
    CHAT,
    RANKS,
    SPACE,
    SPLIT,
    Piece,
    encoding_file,
    pieces,
    sentencepiece_model,
)

SPECIAL = {text: len(RANKS) + at for at, text in enumerate(CHAT)}
TEXTS = st.text(st.sampled_from("theinga  \n'sTIü🌍12.\t"), max_size=40) | st.text(max_size=20)


def merged(parts: list[bytes], worth: Callable[[bytes], float]) -> list[bytes]:
    """Byte-pair encoding as it is defined: the best pair, the first of several, until none is left."""
    while len(parts) > 1:
        best, at = min((worth(parts[i] + parts[i + 1]), i) for i in range(len(parts) - 1))
        if best == math.inf:
            break
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts


def tokenizer(vocabulary: Vocabulary, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(vocabulary.json))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


# ---- byte-level, as tiktoken does it


@pytest.fixture(scope="module")
def bytes_tokenizer(folder: Path) -> Tokenizer:
    (folder / "tokenizer.pkl").write_bytes(encoding_file(RANKS, SPECIAL, SPLIT))
    found = read_encoding(folder / "tokenizer.pkl")
    vocabulary = byte_level(found.ranks, found.special, r"[^ ]+| [^ ]*", "<|bos|>", folder)
    return tokenizer(vocabulary, folder)


@settings(max_examples=60)
@given(text=TEXTS)
def test_words_are_merged_by_the_rank_of_what_comes_out(
    bytes_tokenizer: Tokenizer, text: str
) -> None:
    words = re.findall(r"[^ ]+| [^ ]*", text)
    expected = [SPECIAL["<|bos|>"]]
    for word in words:
        letters = [bytes([byte]) for byte in word.encode()]
        expected += [RANKS[each] for each in merged(letters, lambda it: RANKS.get(it, math.inf))]
    found = bytes_tokenizer.encode(text)
    assert found == expected
    assert bytes_tokenizer.decode(found) == text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (SPLIT, ["I", "'M", " ", "20", "24", " it", "'s", "\n", "\n", " ", " x", "!?"]),
        (PATTERN, ["I", "'M", " ", "202", "4", " it", "'s", "\n\n", " ", " x", "!?"]),
    ],
)  # fmt: skip
def test_text_is_cut_into_words_by_the_files_own_pattern(
    folder: Path, pattern: str, words: list[str]
) -> None:
    """Each word is a token of its own here, so the tokens are the words."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in dict.fromkeys(words):
        ranks.setdefault(word.encode(), len(ranks))
    vocabulary = byte_level(ranks, {"<|bos|>": len(ranks)}, pattern, "<|bos|>", folder)
    found = tokenizer(vocabulary, folder).encode("I'M 2024 it's\n\n  x!?")
    assert found[1:] == [ranks[word.encode()] for word in words]


def test_every_byte_has_a_visible_letter_of_its_own() -> None:
    letters = byte_letters()
    assert len(set(letters.values())) == 256
    assert all(letter.isprintable() and not letter.isspace() for letter in letters.values())
    assert (letters[ord("a")], letters[ord(" ")], letters[ord("\n")]) == ("a", "Ġ", "Ċ")


# ---- nanochat's tokenizer.pkl

GOOD = encoding_file(RANKS, SPECIAL, SPLIT)


def refused(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_encoding(path)


def test_the_four_values_of_an_encoding_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    for protocol in (4, 5):
        path.write_bytes(GOOD[:1] + bytes([protocol]) + GOOD[2:])
        found = read_encoding(path)
        assert (found.pattern, found.ranks, found.special) == (SPLIT, RANKS, SPECIAL)


def test_code_in_a_tokenizer_is_refused_and_never_run(tmp_path: Path) -> None:
    path, canary = tmp_path / "tokenizer.pkl", tmp_path / "ran"
    name = str(canary).encode()
    argument = b"\x8c%c%s" % (len(name), name)
    call = b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + argument + b"\x85R."
    refused(path, call, r"names os\.mkdir, which may be code that runs")
    refused(path, b"\x80\x04cos\nmkdir\n" + argument + b"\x85R.", "contains more than data")
    refused(path, GOOD[:-1] + argument + b"\x85R.", "contains more than data")
    refused(path, GOOD.replace(b"tiktoken.core", b"subprocess..."), "which may be code that runs")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is cut short"),
        (GOOD[:-1], "it is cut short"),
        (GOOD + b"x", "does not end where it should"),
        (b"\x80\x02" + GOOD[2:], "protocol is not 4 or 5"),
        (b"\x80\x04}.", "it holds no tiktoken Encoding"),
        (b"\x80\x04N.", "contains more than data"),
        (b"\x80\x04h\x07.", "it is broken"),
        (b"\x80\x04u.", "it is broken"),
        (b"\x80\x04}K\x01K\x02s.", "it is broken"),
        (b"\x80\x04\x8c\x02\xff\xff.", "it is broken"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "it is cut short"),
        (GOOD.replace(b"mergeable_ranks", b"mergeable_rankz"), "its tokens are missing"),
        (GOOD.replace(b"pat_str", b"pat_sto"), "its pat_str is missing"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b.",
         "names tiktoken's own 'gpt2' and does not hold its tokens"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81.", "its Encoding has no values"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93}\x81.", "calls a function"),
    ],
)  # fmt: skip
def test_what_is_no_plain_encoding_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    refused(tmp_path / "tokenizer.pkl", data, message)


@settings(max_examples=60)
@given(cut=st.integers(0, len(GOOD)), noise=st.binary(max_size=12), keep=st.booleans())
def test_damage_is_a_model_error_or_does_no_harm(
    folder: Path, cut: int, noise: bytes, keep: bool
) -> None:
    path = folder / "damaged.pkl"
    path.write_bytes(GOOD[:cut] + noise + (GOOD[cut + len(noise) :] if keep else b""))
    try:
        found = read_encoding(path)
    except ModelError:
        return
    assert all(isinstance(token, bytes) for token in found.ranks)


# ---- SentencePiece


@pytest.fixture(scope="module")
def pieces_tokenizer(folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return tokenizer(sentencepiece(folder / "tokenizer.model"), folder)


def spelled(text: str) -> list[int]:
    """SentencePiece's BPE as it is defined: the best score first, bytes for what has no piece."""
    known = pieces()
    place = {piece: at for at, (piece, _, kind) in enumerate(known) if kind == 1}
    parts = [letter.encode() for letter in (SPACE + text.replace(" ", SPACE) if text else "")]
    ids = []
    for part in merged(parts, lambda it: _cost(known, place.get(it.decode()))):
        at = place.get(part.decode())
        ids += [3 + byte for byte in part] if at is None else [at]
    return ids


def _cost(known: Sequence[Piece], at: int | None) -> float:
    return math.inf if at is None else -known[at][1]


@settings(max_examples=60)
@given(text=TEXTS)
def test_pieces_are_merged_by_score(pieces_tokenizer: Tokenizer, text: str) -> None:
    if any(name in text for name in ("<s>", "</s>", "<unk>")):
        return  # these are special tokens, as in Hugging Face's own files
    found = pieces_tokenizer.encode(text)
    assert found == [1, *spelled(text)]
    assert pieces_tokenizer.decode(found) == text.replace(SPACE, " ")


def test_a_text_without_a_leading_space_can_be_asked_for(folder: Path) -> None:
    path = folder / "plain.model"
    path.write_bytes(sentencepiece_model(normalizer={3: 0}))
    plain = tokenizer(sentencepiece(path), folder)
    assert plain.decode(plain.encode("the")) == "the"
    assert len(plain.encode("the")) == 3  # <s>, t, he


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (sentencepiece_model(trainer={3: 1}), "is not a BPE model"),
        (sentencepiece_model(trainer={35: 0}), "does not fall back to bytes"),
        (sentencepiece_model(pieces()[:200]), "does not fall back to bytes"),
        (sentencepiece_model(normalizer={2: b"table"}), "normalizes text by a table"),
        (sentencepiece_model(normalizer={4: 1}), "removes spaces"),
        (sentencepiece_model(normalizer={5: 0}), "does not escape spaces"),
        (sentencepiece_model(trainer={24: 1}), "puts spaces behind words"),
        (sentencepiece_model([*pieces(), ("x", 0.0, 5)]), "has unused pieces"),
        (sentencepiece_model([*pieces(), ("", 0.0, 1)]), "has an empty piece"),
        (sentencepiece_model([*pieces(), ("x" * 5000, 0.0, 1)]), "has a very long piece"),
        (
            sentencepiece_model([*pieces(), ("x", 0.0, 9)]),
            "not a SentencePiece model, or is broken",
        ),
        (sentencepiece_model(trainer={41: (1 << 64) - 1}), "lacks a piece for unknown text"),
        (sentencepiece_model()[:-1], "not a SentencePiece model, or is broken"),
    ],
)
def test_other_kinds_of_model_are_refused_by_name(
    tmp_path: Path, model: bytes, message: str
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    with pytest.raises(ModelError, match=message):
        sentencepiece(path)


def test_a_piece_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model([*pieces(), ("he", -99.0, 1)]))
    with pytest.raises(ModelError, match="has the piece 'he' twice"):
        sentencepiece(path)


@settings(max_examples=60)
@given(data=st.binary(max_size=60), cut=st.integers(0, 3000))
def test_damage_to_a_model_is_a_model_error(folder: Path, data: bytes, cut: int) -> None:
    path = folder / "damaged.model"
    whole = sentencepiece_model()
    path.write_bytes(whole[:cut] + data + whole[cut + len(data) :])
    try:
        found = sentencepiece(path)
    except ModelError:
        return
    assert found.size
