"""Text as it grows, for every kind of tokenizer: wherever ids are cut, the pieces are the whole text."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from baton.checkpoints.cleanup import CleanedText, clean, decided
from baton.params import GenerationParams
from baton.text import REPLACEMENT, TextStream, Tokenizer
from tests.depth import deep

SPEECH = [
    "The quick brown fox doesn't jump over 'the' lazy dog, does it? Yes! It's not.",
    "naïve café über straße niño coração", "Привет, мир! Как дела?", "日本語です。日本の本",
    "中文字符测试",
    "한국어 문장입니다", "हिन्दी में लिखा हुआ पाठ", "👩‍👩‍👧‍👦 🇩🇪 👍🏽 🙂", "שלום עולם", "مرحبا بالعالم",
    "a\tb\nc  d   e", "function f(x) { return x + 1; }",
]  # fmt: skip
"""What the vocabularies below are trained on."""
LETTERS = (
    "abcdefz ABZ  .,'!?▁#\n\t\r\0\x1b\u200b0123éßñ\u0301\u0308ЖяΩ日本語字한국어हिन्दीकक्षा"
    "👩\u200d👧🙂🇩🇪👍🏽\ufe0fשלוםمرحبا\u202e\u2028\ufeff\ufffd\U0010ffff"
)
TEXTS = st.text(st.sampled_from(LETTERS), max_size=24) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=16
)
SENTENCES = st.lists(st.sampled_from(SPEECH), max_size=3).map(" ".join)
SPECIAL = ["<unk>", "<s>", "</s>", "<sep>"]


def pieces_of(model: str, split: pre_tokenizers.PreTokenizer) -> dict[str, object]:
    """A model trained on SPEECH, as JSON."""
    trained: Callable[..., FastTokenizer] = FastTokenizer
    if model == "BPE":
        made = trained(models.BPE())
        trainer: trainers.Trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    else:
        made = trained(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=220, show_progress=False)
    made.pre_tokenizer = split
    made.train_from_iterator(SPEECH, trainer)
    return dict(json.loads(made.to_str())["model"])


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def with_bytes(scheme: str) -> models.Model:
    """A BPE as SentencePiece makes them: special tokens, bytes, pieces."""
    found = pieces_of("BPE", pre_tokenizers.Metaspace(prepend_scheme=scheme))
    words = [*SPECIAL, *BYTES, *(word for word in found["vocab"] if word not in SPECIAL)]  # type: ignore[attr-defined]
    return models.BPE(
        {word: index for index, word in enumerate(dict.fromkeys(words))},
        [tuple(pair) for pair in found["merges"]],  # type: ignore[attr-defined]
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip


def byte_level() -> FastTokenizer:
    """GPT-2, Llama 3, Qwen. Its merges join the end of a character with the beginning of the next."""
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([*SPEECH, "本日" * 40, "字語" * 40], trainer)
    return made


def llama_2() -> FastTokenizer:
    """Without a pre-tokenizer: spaces are normalized, a text begins with one."""
    made = FastTokenizer(with_bytes("always"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return made


def gemma() -> FastTokenizer:
    """Without a space at the beginning."""
    made = FastTokenizer(with_bytes("never"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def metaspace(scheme: str) -> Callable[[], FastTokenizer]:
    def make() -> FastTokenizer:
        made = FastTokenizer(with_bytes(scheme))
        made.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=scheme != "never"
        )
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
        )
        return made

    return make


def word_piece(*, cleanup: bool) -> Callable[[], FastTokenizer]:
    def make() -> FastTokenizer:
        made = FastTokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
        made.train_from_iterator(
            SPEECH,
            trainers.WordPieceTrainer(
                vocab_size=260, special_tokens=["<unk>"], show_progress=False
            ),
        )
        return made

    return make


def unigram(*, bytes_too: bool) -> Callable[[], FastTokenizer]:
    def make() -> FastTokenizer:
        found = pieces_of("Unigram", pre_tokenizers.Metaspace())
        pieces = [("<unk>", 0.0), *((each, -20.0) for each in BYTES if bytes_too)]
        pieces += [(each, score) for each, score in found["vocab"] if each != "<unk>"]  # type: ignore[attr-defined]
        made = FastTokenizer(models.Unigram(pieces, 0, bytes_too))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.ByteFallback()] if bytes_too else []
        made.decoder = decoders.Sequence([*steps, decoders.Metaspace()])
        return made

    return make


def suffixes() -> FastTokenizer:
    """GPT-1: a word's last token ends in </w>, and the space comes with the next word."""
    made = FastTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    made.train_from_iterator(
        SPEECH,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return made


def undecoded() -> FastTokenizer:
    """No decoder: spaces between all tokens."""
    made = FastTokenizer(
        models.WordLevel({"<unk>": 0, "the": 1, "a": 2, "日本": 3}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


KINDS: dict[str, Callable[[], FastTokenizer]] = {
    "byte level": byte_level,
    "llama 2": llama_2,
    "gemma": gemma,
    "metaspace always": metaspace("always"),
    "metaspace first": metaspace("first"),
    "metaspace never": metaspace("never"),
    "WordPiece": word_piece(cleanup=False),
    "WordPiece cleaned up": word_piece(cleanup=True),
    "Unigram": unigram(bytes_too=False),
    "Unigram with bytes": unigram(bytes_too=True),
    "suffixes": suffixes,
    "no decoder": undecoded,
}
WITH_BYTES = ["byte level", "llama 2", "gemma", "metaspace always", "metaspace first",
              "metaspace never", "Unigram with bytes"]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


CLEANED = ("WordPiece", "Unigram", "Unigram with bytes", "no decoder")
"""Kinds that transformers cleans up if tokenizer_config.json says so."""
TIGHT = st.text(st.sampled_from(" .?!,'ntmsvrex"), max_size=24)


@cache
def made(kind: str, *, cleans: bool = False) -> Tokenizer:
    """Texts begin with <s>, as most models' do."""
    fast = KINDS[kind]()
    fast.add_special_tokens(SPECIAL)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        fast.save(str(file))
        if cleans:
            settings_file = file.with_name("tokenizer_config.json")
            settings_file.write_text('{"clean_up_tokenization_spaces": true}')
        return Tokenizer(file)


def params(stop: Sequence[str] = (), *, special: bool = False) -> GenerationParams:
    return GenerationParams(9, stop=tuple(stop), keep_special=special)


def parts(ids: Sequence[int], cuts: Sequence[int]) -> Iterator[Sequence[int]]:
    borders = sorted(each % (len(ids) + 1) for each in cuts)
    yield from (ids[a:b] for a, b in zip([0, *borders], [*borders, len(ids)], strict=True))


@every_kind
@settings(max_examples=deep(100, usual=40))
@given(TEXTS | SENTENCES, TEXTS, st.lists(st.integers(0, 99), max_size=6), st.booleans(), st.data())
def test_wherever_ids_are_cut_the_pieces_are_the_text_of_all(
    kind: str, text: str, after: str, cuts: list[int], special: bool, data: st.DataObject
) -> None:
    tokenizer = made(kind)
    sep = tokenizer.encode("<sep>", special=False)
    ids = [*tokenizer.encode(text), *sep * data.draw(st.integers(0, 9)), *tokenizer.encode(after)]
    at = data.draw(st.integers(0, len(ids)))
    prompt, answer = ids[:at], ids[at:]
    whole = tokenizer.decode(ids, special=special)
    stream = TextStream(tokenizer, prompt, params(special=special))
    pieces = [stream.push(part) for part in parts(answer, cuts)]
    before = tokenizer.decode_whole(prompt, special=special)
    assert before + "".join(pieces) + stream.finish() == whole
    at_once = TextStream(tokenizer, prompt, params(special=special))
    assert at_once.push(answer) + at_once.finish() == whole[len(before) :]


@every_kind
@settings(max_examples=40)
@given(TEXTS | SENTENCES, st.data())
def test_half_a_character_waits_until_the_answer_ends(
    kind: str, text: str, data: st.DataObject
) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(text)
    begin, end = sorted(data.draw(st.integers(0, len(ids))) for _ in range(2))
    stream = TextStream(tokenizer, ids[:begin], params())
    told = tokenizer.decode_whole(ids[:begin])
    for each in ids[begin:end]:
        told += stream.push([each])
        assert tokenizer.decode(ids).startswith(told.rstrip(" ") if kind == "suffixes" else told)
    assert set(stream.finish()) <= {REPLACEMENT}


@every_kind
@settings(max_examples=40)
@given(TEXTS | SENTENCES, st.data())
def test_an_answer_ends_before_a_stop_string_wherever_characters_and_tokens_end(
    kind: str, text: str, data: st.DataObject
) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(text)
    at = data.draw(st.integers(0, len(ids)))
    answer = tokenizer.decode(ids)[len(tokenizer.decode_whole(ids[:at])) :]
    first = data.draw(st.integers(0, len(answer)))
    stop = answer[first : first + data.draw(st.integers(1, 3))]
    stream = TextStream(tokenizer, ids[:at], params([stop] if stop else []))
    heard = stream.take(ids[at:])
    assert heard.text + stream.finish() == (answer[: answer.find(stop)] if stop else answer)
    if stop:
        assert stream.stopped
        shorter = TextStream(tokenizer, ids[:at], params([stop]))
        shorter.take(ids[at : at + heard.tokens - 1])
        assert not shorter.stopped


@every_kind
@given(st.lists(st.integers(0, 500), max_size=12), st.integers(0, 12), st.lists(st.integers(0, 99)))
def test_ids_that_are_no_text_give_the_same_in_one_piece_and_in_many(
    kind: str, ids: list[int], at: int, cuts: list[int]
) -> None:
    tokenizer = made(kind)
    stream = TextStream(tokenizer, ids[:at], params())
    told = "".join(stream.push(part) for part in parts(ids[at:], cuts)) + stream.finish()
    at_once = TextStream(tokenizer, ids[:at], params())
    assert told == at_once.push(ids[at:]) + at_once.finish()
    if kind not in WITH_BYTES or kind == "byte level":
        assert tokenizer.decode_whole(ids[:at]) + told == tokenizer.decode(ids)


@settings(max_examples=deep(300, usual=100))
@given(st.lists(TIGHT, max_size=6))
def test_text_in_pieces_is_cleaned_up_as_the_whole_is(pieces: list[str]) -> None:
    stream = CleanedText()
    told = [stream.add(each) for each in pieces]
    assert "".join(told) + stream.add("", final=True) == clean("".join(pieces))


def test_only_what_may_be_cleaned_up_waits() -> None:
    stream = CleanedText()
    told = [
        stream.add(each)
        for each in ("Yes", " , I", " do", " n", "'t", " v", "an", " '", " in", " it")
    ]
    assert told == ["Yes", ", I", " do", "", "n't", "", " van", "", "'in", " it"]


@pytest.mark.parametrize("kind", CLEANED)
@settings(max_examples=60)
@given(TEXTS | SENTENCES | TIGHT, st.lists(st.integers(0, 99), max_size=6), st.data())
def test_an_answer_is_cleaned_up_wherever_ids_are_cut(
    kind: str, text: str, cuts: list[int], data: st.DataObject
) -> None:
    tokenizer = made(kind, cleans=True)
    ids = tokenizer.encode(text)
    at = data.draw(st.integers(0, len(ids)))
    prompt = tokenizer.decode_whole_loose(ids[:at])
    stream = TextStream(tokenizer, ids[:at], params())
    told = "".join(stream.push(part) for part in parts(ids[at:], cuts)) + stream.finish()
    assert told == clean(tokenizer.decode_loose(ids)[len(prompt) :])
    if decided(prompt) == len(prompt):
        assert tokenizer.decode_whole(ids[:at]) + told == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_an_answer_that_goes_on_in_another_script_begins_with_its_first_character(
    kind: str,
) -> None:
    tokenizer = made(kind)
    for text, answer in (("日字", "語です"), ("चक्षु", "ज्ञान"), ("꿈", "뀀"), ("🦊🦊", "🦜 ok")):
        ids = tokenizer.encode(text + answer)
        said = [tokenizer.decode_whole(ids[:at]) for at in range(len(ids) + 1)]
        at = max(at for at in range(len(said)) if text.startswith(said[at]))
        stream = TextStream(tokenizer, ids[:at], params())
        pieces = [stream.push([each]) for each in ids[at:]]
        assert said[at] + "".join(pieces) == text + answer
        assert REPLACEMENT not in "".join(pieces)


@pytest.mark.parametrize("kind", [kind for kind in WITH_BYTES if kind != "byte level"])
def test_bytes_that_are_no_character_spoil_none_beside_them(kind: str) -> None:
    tokenizer = made(kind)
    vocabulary = tokenizer._tokenizer.get_vocab()

    def ids(raw: bytes) -> list[int]:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in raw]

    stream = TextStream(tokenizer, ids(b"\xa5\xe6\x97" + "é".encode()), params())
    spoken = ids("日".encode() + b"\xf0\x9f" + "語".encode() + b"\xff")
    assert [stream.push([each]) for each in spoken] == [
        "", "", "日", "", "", "\ufffd\ufffd", "", "語", "\ufffd"
    ]  # fmt: skip


def test_the_context_is_looked_for_far_back_but_not_for_ever() -> None:
    tokenizer = made("llama 2")
    (sep,) = tokenizer.encode("<sep>", special=False)
    one, two = tokenizer.encode("one", special=False), tokenizer.encode("two", special=False)
    for far, begin in ((3000, " t"), (5000, "t")):
        stream = TextStream(tokenizer, [*one, *[sep] * far], params())
        assert (stream.push(two) + stream.finish()).startswith(begin)
