"""Tokenizers of GGUF files: the ids are those of the tokenizer that the file was made from, and of
transformers' own reading; chat templates and ends go over."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from baton.gguf.folder import contents
from baton.gguf.pre_tokenizers import KINDS, PreTokenizer
from baton.model_files import resolve_model
from baton.server.templates import CompiledTemplate, Conversation, read_template
from baton.text import Tokenizer as Served
from tests.torch.foreign import LETTERS, PIECES, pieces
from tests.torch.gguf_files import CHAT, Written, byte_level_values, write_gguf

CORPUS = """The relay's runners don't stop: they'll hand over 1234567 batons, 89 of them WOODEN; I'M sure.
Ça va? Straße, naïve café, ÉCOLE. 日本語のテ、한국어. def f(x):\n\treturn x  # a+b==c\r\n\r\n   ok
<think>no</think> https://example.org/a_b?c=1&d=2 ... !!! (see [1]) 50% $3.14 {"a": null}"""
SAMPLES = [
    CORPUS, "", " ", "  two  spaces ", "\n\n\n", "a\r\n\tb", "x'Ll we'VE", "3141592653", "１２³¾",
    "ＡＢＣ", "a<|end|>b", "<|end|>", "ok<think> no</think>", "🏃🏽‍♀️ run",
    "e\u0301te\u0301", "\u3000wide",
]  # fmt: skip
TEXT = st.text(st.sampled_from([*CORPUS, *"0123456789'\r\n\t  ÉßДя한日𝔘"]), max_size=40)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("gguf").setLevel(logging.ERROR)


def trained(splits: Sequence[pre_tokenizers.PreTokenizer]) -> Tokenizer:
    """Byte-level BPE of the corpus with a control token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 2, trainer)
    return tokenizer


def level(*, regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def by_regex(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), level(regex=False)]


PUBLISHED = {  # as the models' own tokenizer.json have it
    "gpt-2": [level(regex=True)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), level(regex=True)],
    **{name: by_regex(GGUF_PRE_TOKENIZER_SPLITS[name])
       for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o")},
}  # fmt: skip


def made_from(folder: Path, tokenizer: Tokenizer, pre: str) -> tuple[Path, Served]:
    path = folder / "model.gguf"
    write_gguf(path, "llama", Written(values=byte_level_values(tokenizer, pre)))
    return path, Served(resolve_model(str(path)).tokenizer_file)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(
    tmp_path: Path, pre: str
) -> None:
    original = trained(PUBLISHED[pre])
    path, served = made_from(tmp_path, original, pre)
    begins = [0] if pre in ("llama-bpe", "tekken") else []
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)

    @given(TEXT)
    def check(text: str) -> None:
        ids = original.encode(text).ids
        assert served.encode(text) == begins + ids
        assert served.decode(ids, special=True) == original.decode(ids, skip_special_tokens=False)
        assert theirs.encode(text, add_special_tokens=False) == ids

    check()
    for text in SAMPLES:
        assert served.encode(text, special=False) == original.encode(text).ids


@pytest.mark.parametrize("name", sorted(set(GGUF_PRE_TOKENIZER_SPLITS) & set(KINDS)))
def test_every_kind_that_transformers_knows_has_its_pattern(name: str) -> None:
    assert KINDS[name].patterns == (GGUF_PRE_TOKENIZER_SPLITS[name],)


@pytest.mark.parametrize(
    "kind",
    sorted({each for each in KINDS.values()}, key=str),
    ids=lambda kind: str(len(kind.patterns)),
)
def test_every_kind_splits_and_loses_nothing(kind: PreTokenizer) -> None:
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
             "normalizer": None, "pre_tokenizer": kind.json(), "post_processor": None, "decoder": None,
             "model": {"type": "BPE", "vocab": {}, "merges": []}}  # fmt: skip
    split = Tokenizer.from_str(json.dumps(whole)).pre_tokenizer
    for text in SAMPLES:
        ends = [place for _, place in split.pre_tokenize_str(text)]
        assert [a for a, _ in ends] == [0, *(b for _, b in ends)][: len(ends)]


SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": [text for text, _, _ in pieces()],
    "tokenizer.ggml.scores": [score for _, score, _ in pieces()],
    "tokenizer.ggml.token_type": [kind for _, _, kind in pieces()],
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
WORDS = st.text(
    st.sampled_from([*LETTERS, *"".join(PIECES), " ", " ", "é", "日", "\n"]), max_size=30
)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
def test_sentencepiece_ids_are_those_of_transformers_reading(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "model.gguf"
    settings = dict(vocab_size=len(pieces()))
    write_gguf(path, arch, Written(values=SENTENCEPIECE, settings=settings))
    served = Served(resolve_model(str(path)).tokenizer_file)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)

    @given(WORDS)
    def check(text: str) -> None:
        ids = theirs.encode(text)
        assert served.encode(text) == ids
        assert ids[0] == 1
        assert served.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()
    for text in ("", " ", "a  b", "<s>a</s> b", "日本 é\n"):
        assert served.encode(text) == theirs.encode(text)


def test_a_file_says_whether_a_space_and_a_beginning_go_before_a_text(tmp_path: Path) -> None:
    found = []
    for space, begin, end in ((True, True, False), (False, False, True)):
        values = SENTENCEPIECE | {
            "tokenizer.ggml.add_space_prefix": space,
            "tokenizer.ggml.add_bos_token": begin,
            "tokenizer.ggml.add_eos_token": end,
        }
        path = tmp_path / f"{space}.gguf"
        write_gguf(path, "llama", Written(values=values, settings=dict(vocab_size=len(pieces()))))
        served = Served(resolve_model(str(path)).tokenizer_file)
        ids = served.encode("the")
        assert served.decode(ids) == "the"
        found.append([served.decode([each], special=True) for each in ids])
    assert found[0][0] == "<s>"
    assert "</s>" not in found[0]
    assert found[1][-1] == "</s>"
    assert "<s>" not in found[1]
    assert len("".join(found[0])) > len("<s>the") - 1


def test_added_tokens_of_each_type_are_whole_and_only_control_tokens_are_special(
    tmp_path: Path,
) -> None:
    values = byte_level_values(trained(PUBLISHED["qwen2"]), "qwen2")
    values["tokenizer.ggml.tokens"] += ["<think>", "<｜turn｜>", "   ", "[PAD]"]
    values["tokenizer.ggml.token_type"] += [4, 3, 4, 5]
    path = tmp_path / "model.gguf"
    size = len(values["tokenizer.ggml.tokens"])
    write_gguf(path, "llama", Written(values=values, settings=dict(vocab_size=size)))
    served = Served(resolve_model(str(path)).tokenizer_file)
    think, turn, spaces = size - 4, size - 3, size - 2
    ids = served.encode("a<think>b<｜turn｜>c   d")
    assert [each for each in ids if each >= think] == [think, turn, spaces]
    assert served.decode(ids) == "a<think>bc   d"
    assert served.decode(ids, special=True) == "a<think>b<｜turn｜>c   d"
    assert size - 1 not in served.encode("[PAD]")  # unused: never met in a text


def test_ends_and_templates_go_over(tmp_path: Path) -> None:
    tools = "{{ tools | length }}"
    values = byte_level_values(trained(PUBLISHED["qwen2"]), "qwen2") | {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 6,
        "tokenizer.ggml.padding_token_id": 7,
        "tokenizer.chat_template.tool_use": tools,
        "tokenizer.chat_templates": ["tool_use"],
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", Written(values=values))
    files = resolve_model(str(path))
    assert files.eos_token_ids == (0, 5, 6)
    template = read_template(files.folder)
    assert template is not None
    assert template.source == {"default": CHAT, "tool_use": tools}
    assert template.tokens["eos_token"] == "<|end|>"
    messages = [{"role": "user", "content": "hi"}]
    assert CompiledTemplate(template).render(Conversation(messages)) == "<user>hi"
    assert contents(path)["tokenizer_config.json"]["chat_template"] == [
        {"name": "default", "template": CHAT},
        {"name": "tool_use", "template": tools},
    ]


def test_the_token_that_a_chat_template_ends_turns_with_is_an_end(tmp_path: Path) -> None:
    values = byte_level_values(trained(PUBLISHED["qwen2"]), "qwen2")
    values["tokenizer.ggml.tokens"] += ["<|im_end|>", "<|eot_id|>"]
    values["tokenizer.ggml.token_type"] += [3, 3]
    values["tokenizer.chat_template"] = CHAT + "<|im_end|>"
    size = len(values["tokenizer.ggml.tokens"])
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", Written(values=values, settings=dict(vocab_size=size)))
    assert resolve_model(str(path)).eos_token_ids == (0, size - 2)
