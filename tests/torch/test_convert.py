"""Converting: the same numbers come out, whatever shape the checkpoint had; nothing in it is run."""

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import InputError, ModelError
from baton.models.convert import INDEX, convert_folder

CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "transformer.wte.weight": torch.randn(6, 4, generator=generator),
        "transformer.h.0.bias": torch.randn(4, generator=generator).to(torch.bfloat16),
        "transformer.h.0.empty": torch.empty(0, 4),
        "transformer.h.0.other_empty": torch.empty(0, 4),
    }


def folder_with(tmp_path, files, **config):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        torch.save(content, folder / name)
    return folder


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_one_file_becomes_one_file(tmp_path):
    folder = folder_with(tmp_path, {"pytorch_model.bin": weights(), "training_args.bin": {}})
    (folder / "modeling_evil.py").write_text("")
    out = tmp_path / "new"
    said = convert_folder(folder, out)
    equal(load_file(out / "model.safetensors"), weights())
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert said == f"4 tensors of {folder} are in {out}; use it with --model {out}"
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


@pytest.mark.parametrize("name", ["model.pt", "consolidated.00.pth", "weights.bin"])
def test_any_single_checkpoint_file_will_do(tmp_path, name):
    convert_folder(folder_with(tmp_path, {name: weights()}), tmp_path / "new")
    equal(load_file(tmp_path / "new" / "model.safetensors"), weights())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_weights_inside_a_wrapper_are_found(tmp_path, wrapper):
    folder = folder_with(tmp_path, {"model.pt": {wrapper: weights(), "epoch": 3}})
    convert_folder(folder, tmp_path / "new")
    equal(load_file(tmp_path / "new" / "model.safetensors"), weights())


def test_the_format_from_before_zip_is_read_too(tmp_path):
    folder = folder_with(tmp_path, {})
    path = folder / "pytorch_model.bin"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    convert_folder(folder, tmp_path / "new")
    equal(load_file(tmp_path / "new" / "model.safetensors"), weights())


def test_shards_stay_shards_with_an_index(tmp_path):
    known = weights()
    names = list(known)
    first = {name: known[name] for name in names[:1]}
    second = {name: known[name] for name in names[1:]}
    files = {"pytorch_model-1.bin": first, "pytorch_model-2.bin": second}
    folder = folder_with(tmp_path, files)
    where = {**dict.fromkeys(first, "pytorch_model-1.bin")}
    where |= dict.fromkeys(second, "pytorch_model-2.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    out = tmp_path / "new"
    convert_folder(folder, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 4 * 4 + 4 * 2
    found = {}
    for name in set(index["weight_map"].values()):
        found |= load_file(out / name)
    equal(found, known)
    assert set(index["weight_map"]) == set(known)
    assert not (out / INDEX).exists()


def tied_weights():
    known = weights()
    return known | {"lm_head.weight": known["transformer.wte.weight"]}


def test_tied_tensors_are_written_once_if_the_config_ties_them(tmp_path):
    folder = folder_with(tmp_path, {"model.pt": tied_weights()}, tie_word_embeddings=True)
    convert_folder(folder, tmp_path / "new")
    equal(load_file(tmp_path / "new" / "model.safetensors"), weights())


def test_tied_tensors_are_written_twice_if_the_config_does_not_say_so(tmp_path):
    folder = folder_with(tmp_path, {"model.pt": tied_weights()}, tie_word_embeddings=False)
    convert_folder(folder, tmp_path / "new")
    equal(load_file(tmp_path / "new" / "model.safetensors"), tied_weights())


def test_views_of_one_tensor_come_out_whole_and_apart(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    views = {"a": base.T, "b": base[1:], "c": base[:, :2]}
    convert_folder(folder_with(tmp_path, {"model.pt": views}), tmp_path / "new")
    equal(load_file(tmp_path / "new" / "model.safetensors"), views)


class Canary:
    """Unpickling this would make a folder: what a hostile checkpoint does, but tame."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path):
    canary = tmp_path / "ran"
    folder = folder_with(tmp_path, {"model.pt": {"w": Canary(canary)}})
    with pytest.raises(ModelError, match=r"model\.pt is not read: .* may be code that runs"):
        convert_folder(folder, tmp_path / "new")
    assert not canary.exists()
    assert sorted(os.listdir(tmp_path)) == ["old"]


def test_a_broken_file_is_named(tmp_path):
    folder = folder_with(tmp_path, {"model.pt": weights()})
    data = (folder / "model.pt").read_bytes()
    for broken in (b"", b"rubbish", data[: len(data) // 2]):
        (folder / "model.pt").write_bytes(broken)
        with pytest.raises(ModelError, match=r"model\.pt is not read: it is broken"):
            convert_folder(folder, tmp_path / "new")
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ModelError, match=r"model\.pt is not read"):
        convert_folder(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "does not hold named tensors"),
        ({}, "does not hold named tensors"),
        ({"a": torch.zeros(1), "lr": 0.1}, "values that are not tensors: lr"),
    ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path, content, message):
    with pytest.raises(ModelError, match=message):
        convert_folder(folder_with(tmp_path, {"model.pt": content}), tmp_path / "new")


def test_folders_that_cannot_be_are_refused(tmp_path):
    folder = folder_with(tmp_path, {"model.pt": weights()})
    with pytest.raises(InputError, match="is not a folder"):
        convert_folder(tmp_path / "gone", tmp_path / "new")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        convert_folder(folder, folder)
    with pytest.raises(InputError, match=r"no, the folder for new, does not exist"):
        convert_folder(folder, tmp_path / "no" / "new")
    (tmp_path / "empty").mkdir()
    convert_folder(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_folders_with_nothing_to_convert_are_refused(tmp_path):
    folder = folder_with(tmp_path, {}, vocab_size=6)
    new = tmp_path / "new"
    with pytest.raises(ModelError, match=r"it has no \.bin, \.pt, \.pth file"):
        convert_folder(folder, new)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is empty"):
        convert_folder(folder, new)
    save_file(weights(), folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"holds safetensors already, .* with --model {folder}"):
        convert_folder(folder, new)
    torch.save(weights(), folder / "a.pt")
    torch.save(weights(), folder / "b.pt")
    with pytest.raises(ModelError, match=r"several checkpoints .*: a\.pt, b\.pt; leave one"):
        convert_folder(folder, new)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"is not a model folder: config\.json is missing"):
        convert_folder(folder, new)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"w": "../../etc/passwd"}}, "which is not a file in its folder"),
        (
            {"weight_map": {"w": "gone.bin"}},
            r"lacks gone\.bin, which pytorch_model\.bin\.index\.json names",
        ),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    folder = folder_with(tmp_path, {})
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        convert_folder(folder, tmp_path / "new")


def test_a_tokenizer_from_before_tokenizer_json_is_made_new(tmp_path):
    folder = folder_with(tmp_path, {"pytorch_model.bin": weights()})
    (folder / "tokenizer.json").unlink()
    letters = {letter: number for number, letter in enumerate("abcĠ")}
    (folder / "vocab.json").write_text(json.dumps(letters | {"ab": 4, "<|endoftext|>": 5}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    said = convert_folder(folder, tmp_path / "new")
    assert "tokenizer.json was made from the tokenizer files there" in said
    from baton.text import Tokenizer

    assert Tokenizer(tmp_path / "new" / "tokenizer.json").encode("abc") == [4, 2]


@pytest.mark.parametrize("vocabulary", [None, "{"])
def test_a_tokenizer_that_cannot_be_made_is_a_note(tmp_path, vocabulary):
    folder = folder_with(tmp_path, {"pytorch_model.bin": weights()})
    (folder / "tokenizer.json").unlink()
    if vocabulary is not None:
        (folder / "vocab.json").write_text(vocabulary)
        (folder / "merges.txt").write_text("")
    assert "\nnote: " in convert_folder(folder, tmp_path / "new")
    assert not (tmp_path / "new" / "tokenizer.json").exists()
