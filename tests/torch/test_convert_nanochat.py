"""nanochat's checkpoints: what comes out computes what nanochat computes; the rest is refused."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from baton.cli import main
from baton.errors import InputError, ModelError, RequestError
from baton.model_files import resolve_model
from baton.models.convert import convert_folder
from baton.models.formats.nanochat import CHAT_TEMPLATE
from baton.server.templates import ChatTemplate, CompiledTemplate, Conversation
from baton.text import Tokenizer
from tests.torch.foreign import (
    CHAT,
    RANKS,
    SPLIT,
    encoding_file,
    nanochat_logits,
    nanochat_tensors,
    write_nanochat,
)
from tests.torch.served import check_logits, texts
from tests.torch.test_native_program import library

BOS, ASSISTANT_END = 266, 270
ONES, ZEROS = torch.ones(3), torch.zeros(3)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def refused(folder: Path, message: str, tokenizer: Path | None = None) -> None:
    out = folder.parent / "new"
    with pytest.raises(ModelError, match=message) as error:
        convert_folder(folder, out, tokenizer)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(folder.parent)) == [folder.name]


@pytest.mark.parametrize("rows", [275, 320], ids=["rows as tokens", "rows rounded up to 64"])
def test_the_logits_are_nanochats(tmp_path: Path, rows: int) -> None:
    tensors = nanochat_tensors(rows=rows)
    folder = write_nanochat(tmp_path / "d3", tensors)
    said = convert_folder(folder, tmp_path / "new")
    assert said.startswith(f"20 tensors of {folder} (nanochat, model_000650.pt) are in")
    ids = texts(275)
    expected = [nanochat_logits(tensors, each) for each in ids]
    assert max(each.abs().max() for each in expected) > 10  # the cap is felt
    check_logits(tmp_path / "new", expected, ids, library=library())


def test_nothing_is_rounded_and_names_of_compiled_models_are_understood(tmp_path: Path) -> None:
    tensors = nanochat_tensors()
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.bfloat16)
    named = {f"_orig_mod.{name}": each for name, each in tensors.items()}
    convert_folder(write_nanochat(tmp_path / "d3", named), tmp_path / "new")
    assert config_of(tmp_path / "new")["dtype"] == "float32"
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])


def test_the_last_of_several_steps_is_taken(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "d3", step=9000)
    write_nanochat(folder, nanochat_tensors(dtype=torch.bfloat16), step=10000)
    torch.save({"state": {}}, folder / "optim_010000_rank0.pt")
    said = convert_folder(folder, tmp_path / "new")
    assert "nanochat, model_010000.pt" in said
    assert "\nstep 10,000 was taken, the last of 2" in said
    assert config_of(tmp_path / "new")["dtype"] == "bfloat16"


def test_the_tokenizer_is_found_where_nanochat_keeps_it(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "base" / "base_checkpoints" / "d3")
    kept = tmp_path / "base" / "tokenizer" / "tokenizer.pkl"
    kept.parent.mkdir()
    (folder / "tokenizer.pkl").rename(kept)
    assert f"\nthe tokenizer was read from {kept}" in convert_folder(folder, tmp_path / "new")


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "d3")
    convert_folder(folder, tmp_path / "first")
    (folder / "tokenizer.pkl").unlink()
    made = tmp_path / "first" / "tokenizer.json"
    convert_folder(folder, tmp_path / "second", made)
    assert json.loads((tmp_path / "second" / "tokenizer.json").read_text()) == json.loads(
        made.read_text()
    )


def test_a_text_begins_with_bos_and_an_answer_ends(tmp_path: Path) -> None:
    convert_folder(write_nanochat(tmp_path / "d3"), tmp_path / "new")
    files = resolve_model(str(tmp_path / "new"))
    assert sorted(files.eos_token_ids) == [BOS, ASSISTANT_END]
    assert files.max_positions == 64
    ours = Tokenizer(files.tokenizer_file).encode("the thing")
    assert ours == [BOS, RANKS[b"the"], *(RANKS[each] for each in (b" ", b"th", b"ing"))]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs("the thing").input_ids == ours
    assert theirs.bos_token_id == BOS


def chat(*messages: dict[str, str], more: bool = True) -> str:
    template = CompiledTemplate(ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|bos|>"}))
    return template.render(Conversation(messages, more))


def test_a_chat_is_spelled_as_nanochat_spells_it() -> None:
    system, user, answer, again = (
        {"role": role, "content": text}
        for role, text in [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]
    )  # fmt: skip
    first = "<|bos|><|user_start|>Hi<|user_end|>"
    turn = "<|assistant_start|>Yes?<|assistant_end|><|user_start|>Bye<|user_end|>"
    assert chat(user, more=False) == first
    assert chat(user, answer, again) == first + turn + "<|assistant_start|>"
    assert chat(system, user, more=False) == first.replace("Hi", "Be kind.\n\nHi")
    assert chat(user, system, more=False) == chat(system, user, more=False)  # moved to the front
    for wrong in ([answer], [user, user], [system], [system, answer]):
        with pytest.raises(RequestError, match="the chat template refuses"):
            chat(*wrong)


def test_without_chat_tokens_there_is_no_template(tmp_path: Path) -> None:
    tensors = nanochat_tensors(rows=267)
    folder = write_nanochat(tmp_path / "d3", tensors, special=["<|bos|>"], vocab_size=267)
    assert "there is no chat template" in convert_folder(folder, tmp_path / "new")
    assert not (tmp_path / "new" / "chat_template.jinja").exists()
    assert config_of(tmp_path / "new")["eos_token_id"] == [BOS]


def test_parts_that_change_nothing_are_left_out(tmp_path: Path) -> None:
    tensors = nanochat_tensors() | {"resid_lambdas": ONES, "x0_lambdas": ZEROS}
    folder = write_nanochat(tmp_path / "d3", tensors, window_pattern="L")
    assert "resid_lambdas and x0_lambdas have no effect" in convert_folder(folder, tmp_path / "new")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"resid_lambdas": ONES * 1.1, "x0_lambdas": ZEROS}, "resid_lambdas"),
        ({"resid_lambdas": ONES, "x0_lambdas": ONES}, "x0_lambdas"),
        ({"value_embeds.2.weight": torch.ones(275, 16)}, "value_embeds"),
        (
            {
                "smear_gate.weight": torch.ones(1, 24),
                "smear_lambda": torch.zeros(1),
                "backout_lambda": torch.zeros(1),
                "transformer.h.2.attn.ve_gate.weight": torch.ones(2, 12),
            },
            "attn.ve_gate, backout_lambda, smear_gate, smear_lambda",
        ),
    ],
)
def test_what_newer_nanochats_have_is_refused_by_name(
    tmp_path: Path, more: dict[str, torch.Tensor], parts: str
) -> None:
    folder = write_nanochat(tmp_path / "d3", nanochat_tensors() | more)
    refused(folder, f"needs {parts}, which transformers' NanoChat model does not have")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"window_pattern": "SSSL"}, "window_pattern 'SSSL' gives layers a sliding window"),
        ({"window_pattern": 3}, "window_pattern must consist of S and L"),
        ({"moe": 8}, "model_config has moe, which is not known here"),
        ({"n_layer": 0}, "n_layer must be a number above 0"),
        ({"n_layer": 2.5}, "n_layer must be a whole number"),
        ({"n_layer": float("inf")}, "n_layer must be a number above 0"),
        ({"n_layer": 10**9}, "does not hold the 1,000,000,000 layers"),
        ({"n_layer": 4}, r"lacks transformer\.h\.3\.attn"),
        ({"n_layer": 2}, r"has transformer\.h\.2\..* beyond the 2 layers"),
        ({"n_head": 3}, "do not divide into each other"),
        ({"n_kv_head": 1}, r"attn\.c_k\.weight is \[16, 32\], .* needs \[8, 32\]"),
        ({"n_embd": None}, "lacks n_embd"),
        ({"vocab_size": 100}, r"transformer\.wte\.weight is \[275, 32\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    refused(write_nanochat(tmp_path / "d3", **config), message)


def test_a_window_on_the_last_layer_alone_is_none(tmp_path: Path) -> None:
    convert_folder(write_nanochat(tmp_path / "d3", window_pattern="LLS"), tmp_path / "new")


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "d3")
    meta, pkl = folder / "meta_000650.json", folder / "tokenizer.pkl"
    kept = meta.read_bytes(), pkl.read_bytes()
    for broken in (b"{", b"[]", b"{}", b'{"model_config": 3}', b"\xff", b"[" * 10**5):
        meta.write_bytes(broken)
        refused(folder, r"meta_000650\.json")
    meta.unlink()
    refused(folder, r"does not say the model's shape: meta_000650\.json is missing")
    meta.write_bytes(kept[0])
    pkl.unlink()
    refused(folder, r"there is no tokenizer\.pkl or tokenizer\.json .* --tokenizer FILE")
    pkl.write_bytes(kept[1])
    model = folder / "model_000650.pt"
    model.write_bytes(model.read_bytes()[:5000])
    refused(folder, r"model_000650\.pt is not read: it is broken")


def test_the_command_says_one_line_and_leaves_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_nanochat(tmp_path / "d3", window_pattern="S")
    assert main.main(["convert", str(folder), str(tmp_path / "new")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    tokenizer = str(folder / "tokenizer.pkl")
    write_nanochat(folder)
    command = ["convert", str(folder), str(tmp_path / "new"), "--tokenizer", tokenizer]
    assert main.main(command) == 0
    assert "use it with --model" in capsys.readouterr().out


def test_a_tokenizer_for_a_folder_of_hugging_faces_is_refused(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "d3")
    tokenizer = folder / "tokenizer.pkl"
    with pytest.raises(InputError, match="is not a file"):
        convert_folder(folder, tmp_path / "new", folder)
    (folder / "model_000650.pt").rename(folder / "model.pt")
    with pytest.raises(InputError, match="--tokenizer is for nanochat's and LLaMA's folders"):
        convert_folder(folder, tmp_path / "new", tokenizer)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    tensors = nanochat_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    refused(write_nanochat(tmp_path / "d3", tensors), r"lm_head\.weight holds int8")


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "d3", special=CHAT[:-1])
    refused(folder, "has 274 tokens and .* says 275: it is another model's tokenizer")
    numbered = {f"<|x{at}|>": len(RANKS) + at for at in range(9)}
    (folder / "tokenizer.pkl").write_bytes(encoding_file(RANKS, numbered, SPLIT))
    refused(folder, r"has no token <\|bos\|>")
    numbered = {text: len(RANKS) + at for at, text in enumerate(CHAT)}
    (folder / "tokenizer.pkl").write_bytes(encoding_file(RANKS, numbered, "(unclosed"))
    refused(folder, r"no tokenizer can be made from .*tokenizer\.pkl")


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    folder = write_nanochat(tmp_path / "d3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))  # weights do not fit, json does
    try:
        with pytest.raises(InputError, match=r"cannot write .*new: "):
            convert_folder(folder, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["d3"]
