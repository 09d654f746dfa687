"""Folders whose tokens and chat templates stand in several files: as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from baton.errors import ModelError
from baton.grammar import Grammars, json_object, regex
from baton.params import GenerationParams
from baton.server.templates import CompiledTemplate, Conversation, read_template
from baton.text import TextStream, Tokenizer, chat_ends

END, TURN, CALL = "<|im_end|>", "<|im_start|>", "<tool_call>"
TEXT = f"{TURN}user\nhello  world {CALL} {{}} {END} <|endoftext|><mine>the<pad>{END}"


def token(content: str, **flags: bool) -> dict[str, Any]:
    usual = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **usual, "special": True, **flags}


def folder_with(folder: Path, about: dict[str, Any], **others: Any) -> Path:
    """A byte-level tokenizer of 300 tokens, the last of which is <mine>; <|endoftext|> is special."""
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["hello world the other"] * 3, trainer)
    held = json.loads(made.to_str())
    held["model"]["vocab"]["<mine>"] = len(held["model"]["vocab"])
    made = FastTokenizer.from_str(json.dumps(held))
    made.add_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<pad>", special=True)])
    made.save(str(folder / "tokenizer.json"))
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **about}
    for name, content in {"tokenizer_config": whole, "config": {}, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


LATER = {f"{400 + 7 * i}": token(text) for i, text in enumerate((TURN, END))}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all in tokenizer.json": ({}, {}),
    "added_tokens_decoder": ({"added_tokens_decoder": LATER}, {}),
    "added_tokens_decoder with flags": (
        {"added_tokens_decoder": {
            "300": token(CALL, special=False, lstrip=True),
            "301": token(END, rstrip=True, normalized=True), "302": token("<mine>"),
        }},
        {},
    ),
    "other flags than tokenizer.json's": (
        {"added_tokens_decoder": {"1": token("<|endoftext|>", lstrip=True, special=False)}}, {}
    ),
    "named only": (
        {"eos_token": END, "bos_token": {"__type": "AddedToken", **token(TURN)}, "pad_token": None,
         "image_token": CALL, "unk_token": "<mine>"},
        {},
    ),
    "named and listed": ({"eos_token": END, "added_tokens_decoder": LATER}, {}),
    "additional_special_tokens": ({"additional_special_tokens": [TURN, END, "<mine>"]}, {}),
    "extra_special_tokens": ({"extra_special_tokens": {"call_token": CALL, "turn_token": TURN}}, {}),
    "added_tokens.json": ({}, {"added_tokens": {TURN: 303, END: 302, CALL: 309}}),
    "added_tokens.json and special_tokens_map.json": (
        {"eos_token": "<pad>"},
        {"added_tokens": {TURN: 303, END: 302, CALL: 309},
         "special_tokens_map": {"eos_token": token(END), "additional_special_tokens": [TURN]}},
    ),
    "special_tokens_map.json with more special ones": (
        {"additional_special_tokens": [CALL]},
        {"added_tokens": {TURN: 303, END: 302, CALL: 309},
         "special_tokens_map": {"extra_special_tokens": [TURN], "bos_token": "<mine>"}},
    ),
    "special_tokens_map.json that counts no more": (
        {"added_tokens_decoder": LATER}, {"special_tokens_map": {"eos_token": END, "pad_token": CALL}}
    ),
    "an id that tokenizer.json has": ({}, {"added_tokens": {"<|endoftext|>": 300, END: 301, TURN: 302}}),
    "special tokens are split": (
        {"added_tokens_decoder": LATER, "split_special_tokens": True, "eos_token": END}, {}
    ),
}  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.reasoning_content }}{{ m.content }}"
    "{{ eos_token }}{{ call_token }}{{ pad_token }}{% endfor %}"
)


@pytest.fixture(params=FOLDERS)
def both(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Path, Tokenizer, PreTrainedTokenizerBase]:
    about, others = FOLDERS[request.param]
    folder = folder_with(tmp_path, {"chat_template": CHAT, **about}, **others)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return folder, Tokenizer(folder / "tokenizer.json"), theirs


def test_tokens_are_transformers_own(
    both: tuple[Path, Tokenizer, PreTrainedTokenizerBase],
) -> None:
    folder, ours, theirs = both
    ids = theirs.encode(TEXT)
    assert ours.encode(TEXT) == ids
    for special in (True, False):
        assert ours.decode(ids, special=special) == theirs.decode(
            ids, skip_special_tokens=not special
        )
    assert ours.end_id == theirs.eos_token_id
    template = read_template(folder)
    assert template is not None
    messages = [{"role": "assistant", "reasoning_content": "2 + 2", "content": "4"}]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert CompiledTemplate(template).render(Conversation(messages)) == expected


def test_a_token_that_is_added_is_one_and_no_text(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"added_tokens_decoder": LATER, "eos_token": END})
    ours = Tokenizer(folder / "tokenizer.json")
    (end,) = ours.encode(END)
    assert ours.end_id == end
    stream = TextStream(ours, ours.encode("the"), GenerationParams(9))
    assert stream.push([*ours.encode("hello"), end]) + stream.finish() == "hello"


@pytest.mark.parametrize("kind", ["list", "files", "no default"])
def test_of_several_templates_transformers_choice(kind: str, tmp_path: Path) -> None:
    named = {"tool_use": "T{{ tools | length }}", "rag": "R", "default": "D{{ tools }}"}
    if kind == "no default":
        del named["default"]
    about = {"chat_template": [{"name": n, "template": t} for n, t in named.items()]}
    if kind == "files":
        about = {"chat_template": "counts no more"}
    folder = folder_with(tmp_path, about)
    if kind == "files":
        (folder / "chat_template.jinja").write_text(named.pop("default"))
        (folder / "additional_chat_templates").mkdir()
        for name, text in named.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = read_template(folder)
    assert template is not None
    ours = CompiledTemplate(template)
    messages = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for offered in (None, tools):
        try:
            expected = theirs.apply_chat_template(messages, tools=offered, tokenize=False)
        except ValueError:
            with pytest.raises(
                Exception, match=r"templates \(rag, tool_use\) and none is its default"
            ):
                ours.render(Conversation(messages, tools=offered))
            assert (kind, offered) == ("no default", None)
        else:
            assert ours.render(Conversation(messages, tools=offered)) == expected


def test_a_chat_ends_at_the_end_of_its_tokenizer_too(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"added_tokens_decoder": LATER, "eos_token": token(END)})
    ours = Tokenizer(folder / "tokenizer.json")
    (end,) = ours.encode(END)
    assert chat_ends(ours, (300, 7), end + 1) == (end,)
    assert chat_ends(ours, (300, end), end + 1) == ()
    assert chat_ends(ours, (300,), end) == ()  # the model has no logit for it
    assert (
        chat_ends(Tokenizer(folder_with(tmp_path, {"eos_token": None}) / "tokenizer.json"), (), 9)
        == ()
    )
    chat = GenerationParams(9, stop_token_ids=(5, end)).stopping_at((end,))
    assert chat.stop_token_ids == (5, end)
    assert GenerationParams(9, ignore_eos=True).stopping_at((end,)).stop_token_ids == ()


def test_a_grammar_lets_a_chat_end_where_the_text_may_end(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"added_tokens_decoder": LATER, "eos_token": END})
    file = folder / "tokenizer.json"
    ours = Tokenizer(file)
    (end,) = ours.encode(END)
    grammars = Grammars(file, 310, (300,))
    for stops, may in (((300, end), True), ((300,), False), ((), False)):
        guide = grammars.open(regex("[a-z]+"), stop_token_ids=stops)
        assert not guide.mask()[end // 8] >> end % 8 & 1
        assert guide.accept(ours.encode("h")[0])
        assert (guide.mask()[end // 8] >> end % 8 & 1) == may
        assert guide.mask()[300 // 8] >> 300 % 8 & 1
        assert guide.accept(end) == guide.finished == may
    guide = grammars.open(json_object())
    assert not guide.accept(ours.encode(TURN)[0])


@pytest.mark.parametrize(
    ("about", "others", "why"),
    [
        ({"added_tokens_decoder": {"1": "x"}}, {}, "must be an object with a content, got 'x'"),
        ({"added_tokens_decoder": {"x": token("x")}}, {}, "id of an added token must be a number"),
        ({"added_tokens_decoder": [1]}, {}, "added tokens must be an object, got list"),
        ({}, {"added_tokens": {"x": None}}, r"added_tokens\.json: the id of an added token"),
    ],
)
def test_what_is_no_token_is_named(
    about: dict[str, Any], others: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, about, **others)
    with pytest.raises(ModelError, match=why):
        Tokenizer(folder / "tokenizer.json")
