"""Folders that only loading finds out about: damaged weights, numbers that cannot be, other tokenizers.
Through the door of the library, LocalCluster; what the names and headers tell is in tests/pure."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baton.cache import entries
from baton.engine.loading import load_model
from baton.errors import BatonError, ModelError
from baton.local import LocalCluster, LocalOptions
from baton.model_files import resolve_model
from baton.models.convert import convert_folder
from baton.text import Tokenizer
from tests.torch.families import save_checkpoint
from tests.torch.foreign import sentencepiece_model

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
TOGETHER = "fetch both again from one place"
Change = Callable[[Path], object]


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def value(name: str, number: float, at: int = 5) -> Change:
    return weights(lambda found: found[name].view(-1)[at].fill_(number))


def config(**changes: Any) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        known = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in known.items() if value is not ...}
        path.write_text(json.dumps(kept))

    return edit


REFUSED: dict[str, tuple[Change, str]] = {
    "a wrong shape": (
        weights(lambda found: found.update({NORM: torch.zeros(7)})),
        f"{{folder}} does not match its config.json: {NORM} is [7] in the checkpoint and must be [64]; "
        + TOGETHER,
    ),
    "many wrong shapes": (
        config(intermediate_size=100),
        "{folder} does not match its config.json: model.layers.0.mlp.down_proj.weight is [64, 96] in the "
        f"checkpoint and must be [64, 100] (and 5 more); {TOGETHER}",
    ),
    "NaN": (
        value(UP, float("nan")),
        f"{{folder}} is damaged: its weight {UP} holds NaN, which is not a number; fetch or convert the "
        "model again",
    ),
    "infinite": (
        value(UP, float("inf")),
        f"{{folder}} cannot be loaded: its weight {UP} holds infinite numbers in float32; if the "
        "checkpoint has finite ones, use bfloat16 or float32",
    ),
    "a thousand million layers": (
        config(num_hidden_layers=10**9),
        "{folder} does not match its config.json: num_hidden_layers is 1,000,000,000, and the checkpoint "
        f"has 102,720 numbers; {TOGETHER}",
    ),
    "a model of a million million numbers": (
        config(intermediate_size=2**31),
        "{folder} does not match its config.json, which describes 824,633,786,688 weights: the "
        f"checkpoint has 102,720; {TOGETHER}",
    ),
    "a newer tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "BPE3"}}'),
        f"{{folder}}/tokenizer.json is not read by tokenizers {version('tokenizers')}: it was made by a "
        "newer version (then update tokenizers), or is damaged (then fetch it again); it says: ",
    ),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": '),
        "{folder}/tokenizer.json is broken, it is not JSON: ",
    ),
    "a tokenizer without a model": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "{folder}/tokenizer.json is not a tokenizer.json: it has no model; fetch it again",
    ),
    "a window of nothing": (
        config(sliding_window=[None]),
        "{folder} cannot be served: sliding_window in config.json is [None], but must be null or a whole "
        "number above 0",
    ),
    "no layers": (
        config(num_hidden_layers=0),
        "{folder} cannot be served: num_hidden_layers in config.json is 0, but must be a whole number "
        "above 0",
    ),
    "a text for a number": (
        config(hidden_size="wide"),
        "{folder} cannot be loaded: hidden_size in config.json is 'wide', but must be a whole number "
        "above 0",
    ),
    "no heads": (
        config(num_attention_heads=0),
        "{folder} cannot be loaded: num_attention_heads in config.json is 0, but must be a whole number "
        "above 0",
    ),
    "a context of one token": (
        config(max_position_embeddings=1),
        "{folder}: by its config.json a text has 1 token; a prompt and an answer need 2",
    ),
    "an epsilon that is not a number": (
        config(rms_norm_eps=float("nan")),
        "LlamaForCausalLM cannot be served: in prefill the model's own logits are NaN, which is not a "
        "number, in float32; correct its config.json, or fetch the model again, or try float32",
    ),
    "heads of less than nothing": (
        config(head_dim=-1),
        "{folder} cannot be loaded: head_dim in config.json is -1, but must be a whole number above 0",
    ),
    "an unknown activation": (
        config(hidden_act="sillu"),
        "{folder} cannot be loaded: hidden_act in config.json is 'sillu', which transformers does not "
        "know",
    ),
    "an unknown dtype": (
        config(dtype="float17"),
        "{folder} cannot be loaded: dtype in config.json is 'float17', but must be one of auto, "
        "bfloat16, float16, float32, float64",
    ),
}
OPEN = (": ",)  # what follows are the words of a library


@pytest.mark.parametrize("what", REFUSED)
def test_a_damaged_model_is_said_in_one_line(what: str, tmp_path: Path) -> None:
    change, line = REFUSED[what]
    folder = save_checkpoint("llama", tmp_path / "model")
    change(folder)
    with pytest.raises(BatonError) as caught:
        LocalCluster(LocalOptions(str(folder), dtype="float32", device="cpu"))
    said, expected = str(caught.value), line.replace("{folder}", str(folder))
    assert said.startswith(expected) if expected.endswith(OPEN) else said == expected
    assert "\n" not in said
    assert type(caught.value) is ModelError


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path)
    value(UP, 1e6)(folder)
    with pytest.raises(ModelError, match=f"{UP} holds infinite numbers in float16"):
        load_model(resolve_model(str(folder)), CPU, torch.float16)


def test_a_bias_may_forbid_a_token(tmp_path: Path) -> None:
    folder = save_checkpoint("gpt2", tmp_path)
    value("transformer.ln_f.bias", float("-inf"))(folder)
    assert load_model(resolve_model(str(folder)), CPU, torch.float32)


# ---- accepted, as transformers accepts them


def without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def sharded(folder: Path, into: str) -> None:
    """The checkpoint in two files, with their index."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / into).mkdir(exist_ok=True)
    where: dict[str, str] = {}
    for number, names in enumerate((sorted(found)[::2], sorted(found)[1::2]), 1):
        file = Path(into) / f"model-{number:05d}-of-00002.safetensors"
        each = {name: found[name] for name in names}
        save_file(each, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file.as_posix())
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bare(folder: Path) -> None:
    """A checkpoint of LlamaModel, without the head: tied to the embedding, and names without `model.`"""
    weights(lambda found: found.pop("lm_head.weight", None))(folder)
    found = load_file(folder / "model.safetensors")
    found = {name.removeprefix("model."): each for name, each in found.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config(architectures=["LlamaModel"], tie_word_embeddings=True)(folder)


ACCEPTED: dict[str, Change] = {
    "shards in a folder": lambda folder: sharded(folder, "shards"),
    "a stale index": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "gone.safetensors"}}'
    ),
    "no context": config(max_position_embeddings=...),
    "no dtype": config(dtype=..., torch_dtype=...),
    "null dtype": config(dtype=None),
    "no architectures": config(architectures=None),
    "the bare model": bare,
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_transformers_loads_is_loaded(what: str, tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model")
    ACCEPTED[what](folder)
    ours = load_model(resolve_model(str(folder)), CPU, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_a_null_context_is_the_default_of_the_family(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path)
    config(max_position_embeddings=None)(folder)
    files = resolve_model(str(folder))
    model = load_model(files, CPU, torch.float32)
    assert model.config.max_position_embeddings == files.max_positions == 2048


# ---- tokenizer.model


def with_sentencepiece(folder: Path, **settings: Any) -> Path:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baton" / "tokenizers"


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path, cache: Path) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"))
    files = resolve_model(str(folder))
    assert files.tokenizer_file.parent.parent == cache
    tokenizer = Tokenizer(files.tokenizer_file)
    ids = tokenizer.encode("the hat in ütah")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "the hat in ütah"
    assert load_model(files, CPU, torch.float32)


def test_what_is_made_is_kept_and_follows_its_sources(tmp_path: Path, cache: Path) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"))
    first, again = resolve_model(str(folder)), resolve_model(str(folder))
    assert (first.tokenizer_file, first.fingerprint) == (again.tokenizer_file, again.fingerprint)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    changed = resolve_model(str(folder))
    assert changed.fingerprint == first.fingerprint
    assert changed.tokenizer_file != first.tokenizer_file
    made = {each.tokenizer_file.parent for each in (first, changed)}
    assert set(cache.iterdir()) == made == {each.path for each in entries()}
    for each in made:
        assert {path.name for path in each.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_the_settings_beside_it_count(tmp_path: Path, cache: Path) -> None:
    folder = with_sentencepiece(
        save_checkpoint("llama", tmp_path / "model"),
        add_eos_token=True,
        eos_token={"content": "<|end|>", "special": True},
        added_tokens_decoder={"300": {"content": "<|end|>", "special": True}},
    )
    (folder / "added_tokens.json").write_text('{"<|user|>": 302}')
    tokenizer = Tokenizer(resolve_model(str(folder)).tokenizer_file)
    assert tokenizer.encode("<|user|>the")[:2] == [1, 302]
    assert tokenizer.encode("the")[-1] == 300
    assert tokenizer.decode([300], special=True) == "<|end|>"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_space_follows_special_tokens_in_legacy_tokenizers(
    legacy: bool, tmp_path: Path, cache: Path
) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"), legacy=legacy)
    tokenizer = Tokenizer(resolve_model(str(folder)).tokenizer_file)
    assert len(tokenizer.encode("</s>the", special=False)) == (2 if legacy else 3)
    assert len(tokenizer.encode(" the", special=False)) == 1  # and no second space before a space


@pytest.mark.parametrize(
    ("settings", "added", "line"),
    [
        ({"added_tokens_decoder": {"-1": {"content": "x"}}}, "{}",
         "{folder}: the added token 'x' must have a text and an id below 16,777,216, got '-1'"),
        ({}, '{"": 3}',
         "{folder}: the added token '' must have a text and an id below 16,777,216, got '3'"),
        ({}, '{"the": 300, "he": 299}',
         "{folder} gives the token 'he' two ids, 260 in tokenizer.model and 299: its tokenizer files are "
         "of different models"),
        ({"bos_token": "<begin>"}, "{}",
         "{folder}: tokenizer_config.json names '<begin>', which is no token of tokenizer.model"),
        ({"legacy": [[[[]]]], "added_tokens_decoder": [1], "bos_token": 5}, "[",
         "{folder} is incomplete: added_tokens.json cannot be read: it is not JSON: "),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_line(
    settings: Any, added: str, line: str, tmp_path: Path, cache: Path
) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"), **settings)
    (folder / "added_tokens.json").write_text(added)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    said, expected = str(caught.value), line.replace("{folder}", str(folder))
    assert said.startswith(expected) if expected.endswith(OPEN) else said == expected


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept: .*; set XDG_CACHE_HOME to a folder"):
        resolve_model(str(folder))


def test_another_kind_of_sentencepiece_is_named(tmp_path: Path, cache: Path) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(trainer={3: 1}))
    with pytest.raises(ModelError, match=r"is not a BPE model: .* put a tokenizer\.json beside it"):
        resolve_model(str(folder))


# ---- the advised commands


def test_a_folder_that_can_be_served_is_not_converted(tmp_path: Path, cache: Path) -> None:
    folder = with_sentencepiece(save_checkpoint("llama", tmp_path / "model"))
    with pytest.raises(ModelError) as caught:
        convert_folder(folder, tmp_path / "new")
    assert str(caught.value) == (
        f"there is nothing to convert in {folder}: it holds safetensors already, and can be used with "
        f"--model {folder}"
    )
    assert not (tmp_path / "new").exists()


def old_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    letters = {letter: number for number, letter in enumerate("abcĠ")}
    (folder / "vocab.json").write_text(json.dumps(letters | {"ab": 4, "<|endoftext|>": 5}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def lost_index(folder: Path) -> None:
    sharded(folder, ".")
    (folder / "model.safetensors.index.json").unlink()


def other_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_with_sentencepiece(folder: Path) -> None:
    pickled(folder)
    with_sentencepiece(folder)


@pytest.mark.parametrize(
    "change", [old_tokenizer, lost_index, other_name, pickled, pickled_with_sentencepiece]
)
def test_the_advised_convert_makes_a_model(change: Change, tmp_path: Path, cache: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    change(folder)
    with pytest.raises(ModelError, match=f"run python main.py convert {folder} OUT"):
        resolve_model(str(folder))
    convert_folder(folder, tmp_path / "new")
    files = resolve_model(str(tmp_path / "new"))
    assert files.tokenizer_file == tmp_path / "new" / "tokenizer.json"
    Tokenizer(files.tokenizer_file)
    found: dict[str, torch.Tensor] = {}
    for path in files.weights:
        found |= load_file(path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], each) for name, each in whole.items())


def test_shards_of_which_one_is_lost_are_not_converted(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model")
    lost_index(folder)
    (folder / "extra.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match="several safetensors files, no index"):
        convert_folder(folder, tmp_path / "new")


def test_an_adapter_is_not_converted_either(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match="is a LoRA adapter and not a whole model"):
        convert_folder(tmp_path, tmp_path / "new")
