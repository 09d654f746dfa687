"""Folders as people have them: one that is no model is refused in one exact line, which says what it
is and what to do; one that transformers loads is accepted."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from baton.checkpoints.jsonfile import DEEPEST
from baton.errors import ModelError
from baton.model_files import DOWNLOADED, NOT_DOWNLOADED, resolve_model
from tests.pure.test_model_files import LLAMA, safetensors, write_config

TRANSFORMERS = version("transformers")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
WHOLE = safetensors([1.0, 2.0])
Change = Callable[[Path], object]


def model(folder: Path) -> Path:
    """A whole model; the rows below change it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    (folder / "model.safetensors").write_bytes(WHOLE)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder


def config(**changes: Any) -> Change:
    return lambda folder: write_config(folder, **changes)


def without(*keys: str) -> Change:
    kept = {key: value for key, value in LLAMA.items() if key not in keys}
    return lambda folder: (folder / "config.json").write_text(json.dumps(kept))


def only(**files: str | bytes) -> Change:
    """The folder holds these files and nothing else; __ stands for a dot, and ___ for a slash."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        put(**files)(folder)

    return change


def put(**files: str | bytes) -> Change:
    def change(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("___", "/").replace("__", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def gone(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def renamed(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def a_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def a_link(name: str, to: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return change


def adapter(**about: Any) -> Change:
    return only(adapter_config__json=json.dumps(about), adapter_model__safetensors=WHOLE)


CAUSAL = "is not a causal language model"
CONVERT = "run python main.py convert {folder} OUT and use OUT"
BROKEN_GGUF = "is a broken GGUF file: it ends in the middle of its header; fetch it again"
SAFETENSORS = "use the same model in safetensors"
MERGE = "with peft's merge_and_unload(), save that with its tokenizer, and use the result"
FETCH = "fetch the model again"
NOT_READ = "{folder} is not a model folder: config.json cannot be read:"
T5 = config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
VISION = "one that also takes images or sound"
ANOTHER = "use a causal language model of another family"
TWO_WAY = "which cannot be served: it is not a decoder-only language model but"

UNSAID = """
    model.layers.0.mlp.up_proj.weight F8_E4M3
    lm_head.weight F8_E5M2
    model.layers.0.mlp.up_proj.qweight I32
    a.weight_packed I32
    a.weight I8
    b.weight U8
    x.gate_up_proj_blocks U8
    a.w F4
""".strip().splitlines()
"""Tensors of quantized weights, and their dtypes."""

REFUSED: dict[str, tuple[Change, str]] = {
    # ---- other things than a model
    "LoRA": (
        adapter(peft_type="LORA", base_model_name_or_path="meta-llama/Llama-2-7b"),
        "{folder} is a LoRA adapter and not a whole model: merge it into its base model, "
        f"meta-llama/Llama-2-7b, {MERGE}",
    ),
    "another adapter": (
        adapter(peft_type=5, base_model_name_or_path=None),
        f"{{folder}} is an adapter and not a whole model: merge it into its base model {MERGE}",
    ),
    "an adapter with a config": (
        both(adapter(peft_type="IA3"), config()),
        f"{{folder}} is an adapter (IA3) and not a whole model: merge it into its base model {MERGE}",
    ),
    "GGUF": (
        only(model_Q4_1__gguf=b"GGUF\x03"),
        f"{{folder}}/model_Q4_1.gguf {BROKEN_GGUF}",
    ),
    "GGUF with a config": (
        both(gone("model.safetensors"), put(m__gguf=b"GGUF")),
        f"{{folder}}/m.gguf {BROKEN_GGUF}",
    ),
    "a diffusion pipeline": (
        only(model_index__json="{}", unet___config__json="{}"),
        "{folder} is a diffusion pipeline (it has model_index.json), which makes images: use a language "
        "model",
    ),
    "a part of one": (
        put(config__json='{"_class_name": "UNet2DConditionModel", "sample_size": 64}'),
        "{folder} is UNet2DConditionModel, a part of a diffusion pipeline, which makes images: use a "
        "language model",
    ),
    "timm": (
        put(config__json='{"architecture": "resnet18", "pretrained_cfg": {}}'),
        "{folder} is resnet18 of timm, a model for images",
    ),
    "ONNX": (
        both(gone("model.safetensors"), put(onnx___model__onnx=b"\x08")),
        f"{{folder}} holds ONNX (onnx/model.onnx) but no model.safetensors: {SAFETENSORS}",
    ),
    "ONNX without a config": (
        only(model__onnx=b"\x08"),
        f"{{folder}} holds ONNX (model.onnx), which is not read: {SAFETENSORS}",
    ),
    "OpenVINO": (
        both(
            gone("model.safetensors"), put(openvino_model__xml="<net>", openvino_model__bin=b"\0")
        ),
        f"{{folder}} holds OpenVINO (openvino_model.xml) but no model.safetensors: {SAFETENSORS}",
    ),
    "TensorFlow": (
        renamed("model.safetensors", "tf_model.h5"),
        f"{{folder}} holds TensorFlow (tf_model.h5) but no model.safetensors: {SAFETENSORS}",
    ),
    "a pickle": (
        renamed("model.safetensors", "pytorch_model.bin"),
        "{folder} has pytorch_model.bin, a pickle, which is never loaded, but no model.safetensors: "
        + CONVERT,
    ),
    "what a training leaves": (
        both(gone("model.safetensors"), put(training_args__bin=b"\x80\x02")),
        f"{{folder}} holds no weights: model.safetensors is missing; {FETCH}",
    ),
    "weights of another name": (
        renamed("model.safetensors", "model.fp16.safetensors"),
        f"{{folder}} has model.fp16.safetensors but no model.safetensors: {CONVERT}",
    ),
    "LLaMA's own": (
        only(params__json="{}", consolidated__00__pth=b"PK\x03\x04"),
        f"{{folder}} is a checkpoint in LLaMA's own format: {CONVERT}",
    ),
    "nanochat's own": (
        only(meta_000650__json="{}", model_000650__pt=b"PK\x03\x04"),
        f"{{folder}} is a checkpoint in nanochat's own format: {CONVERT}",
    ),
    "a folder above": (
        only(checkpoint_500___config__json="{}"),
        "{folder} is not a model folder: config.json is missing; {folder}/checkpoint_500 has one",
    ),
    "a folder of the cache": (
        only(blobs___x="", snapshots___y=""),
        "{folder} is not a model folder: config.json is missing; it is a part of the Hugging Face cache: "
        "use model instead",
    ),
    "a tokenizer alone": (
        gone("config.json", "model.safetensors"),
        "{folder} is not a model folder: config.json is missing; it has a tokenizer and no model: fetch "
        "the model's other files",
    ),
    "empty": (only(), "{folder} is not a model folder: config.json is missing, it is empty"),
    # ---- other kinds of model
    "an encoder": (
        config(model_type="bert", architectures=["BertForMaskedLM"]),
        f"{{folder}} is BertForMaskedLM, {TWO_WAY} an encoder, which continues no text; {ANOTHER}",
    ),
    "an encoder of another family": (
        config(model_type="modernbert", architectures=None),
        f"{{folder}} is a model of the family modernbert, {TWO_WAY} an encoder, which continues no text; "
        f"{ANOTHER}",
    ),
    "an encoder-decoder": (
        T5,
        f"{{folder}} is T5ForConditionalGeneration, {TWO_WAY} an encoder-decoder; {ANOTHER}",
    ),
    "one of another family": (
        config(model_type="led", architectures=["LEDForConditionalGeneration"]),
        f"{{folder}} is LEDForConditionalGeneration, {TWO_WAY} an encoder-decoder; {ANOTHER}",
    ),
    "a vision model": (
        config(
            model_type="llava",
            architectures=["LlavaForConditionalGeneration"],
            vision_config={"model_type": "clip_vision_model"},
            text_config={"model_type": "llama"},
        ),
        f"{{folder}} is LlavaForConditionalGeneration, {TWO_WAY} {VISION}; {ANOTHER}",
    ),
    "a vision model that transformers also lists as causal": (
        config(model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"]),
        f"{{folder}} is Gemma3ForConditionalGeneration, {TWO_WAY} {VISION}; {ANOTHER}",
    ),
    "a speech model": (
        config(model_type="wav2vec2", architectures=["Wav2Vec2ForCTC"]),
        f"{{folder}} {CAUSAL}: config.json names Wav2Vec2ForCTC, and transformers has none for wav2vec2, "
        "only other kinds of model",
    ),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        f"{{folder}} {CAUSAL}: it is LlamaForSequenceClassification, a classifier or reward model; use "
        "the model it was made from",
    ),
    "a running state": (
        config(model_type="mamba", architectures=["MambaForCausalLM"]),
        "{folder} is MambaForCausalLM, which cannot be served: it keeps a running state beside, or "
        f"instead of, keys and values; {ANOTHER}",
    ),
    "an unknown family": (
        config(model_type="llama_of_tomorrow"),
        "{folder} is of the family 'llama_of_tomorrow' (model_type in config.json), which transformers "
        f"{TRANSFORMERS} does not know: update transformers if the model is newer, or use another",
    ),
    "code of its own": (
        config(model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling.Homemade"}),
        "{folder} needs Python code from its own folder (auto_map in config.json): such code is never "
        "run here; use a model that transformers knows by itself",
    ),
    "no family": (
        without("model_type"),
        "{folder}: config.json has no model_type, which says the architecture: add "
        '"model_type": "llama", the family of LlamaForCausalLM',
    ),
    **{
        f"quantized: {how}": (
            config(**{key: about}),
            f"{{folder}} is quantized ({how}): use the same model in bf16, fp16 or fp32",
        )
        for how, key, about in (
            ("gptq, 4 bits", "quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("awq, 4 bits", "quantization_config", {"quant_method": "awq", "w_bit": 4}),
            ("bitsandbytes, 4 bits", "quantization_config", {"load_in_4bit": True}),
            ("fp8", "quantization_config", {"quant_method": "fp8", "bits": "many"}),
            ("compressed-tensors", "compression_config", {"format": "pack-quantized"}),
            ("MLX, 4 bits", "quantization", {"group_size": 64, "bits": 4}),
            ("of an unknown kind", "quantization_config", {"quant_method": [1], "a": 1}),
            ("yes", "quantization_config", "yes"),
        )
    },
    "another vocabulary": (
        put(model__safetensors=safetensors([1.0, 2.0], name="model.embed_tokens.weight")),
        "{folder} does not match its config.json: model.embed_tokens.weight is [2] in the checkpoint, "
        "and vocab_size is 320; fetch both again from one place",
    ),
    **{
        f"quantized, and unsaid: {tensor} {dtype}": (
            put(model__safetensors=safetensors([1.0], name=tensor, dtype=dtype)),
            f"{{folder}} is quantized ({tensor} holds {dtype}), though its config.json does not say so: "
            "use the same model in bf16, fp16 or fp32",
        )
        for tensor, dtype in (each.split() for each in UNSAID)
    },
    "quantized inside": (
        config(text_config=LLAMA | {"quantization_config": {"quant_method": "mxfp4"}}),
        "{folder} is quantized (mxfp4): use the same model in bf16, fp16 or fp32",
    ),
    # ---- files that are not what they should be
    "a config of 200,000 [": (
        put(config__json="[" * 200_000),
        f"{NOT_READ} it has more than {DEEPEST} objects or arrays within each other",
    ),
    "a config that is too deep": (
        put(config__json='{"a": ' * 300 + "1" + "}" * 300),
        f"{NOT_READ} it has more than {DEEPEST} objects or arrays within each other",
    ),
    "a deep generation_config": (
        put(generation_config__json="[" * 200_000),
        "{folder} is incomplete: generation_config.json cannot be read: it has more than "
        f"{DEEPEST} objects or arrays within each other",
    ),
    "a deep index": (
        both(gone("model.safetensors"), put(model__safetensors__index__json="[" * 200_000)),
        "{folder} is incomplete: model.safetensors.index.json cannot be read: it has more than "
        f"{DEEPEST} objects or arrays within each other",
    ),
    "a deep header": (
        put(model__safetensors=(100_000).to_bytes(8, "little") + b"[" * 100_000),
        "{folder}/model.safetensors is broken, or no safetensors file: fetch it again",
    ),
    "a deep tokenizer_config": (
        both(
            put(tokenizer_config__json="[" * 200_000),
            config(model_type="gpt-sw3", max_position_embeddings=None),
        ),
        "{folder} is incomplete: tokenizer_config.json cannot be read: it has more than "
        f"{DEEPEST} objects or arrays within each other",
    ),
    "a config that is a list": (
        put(config__json="[1]"),
        "{folder} is not a model folder: config.json must hold a JSON object, not an array",
    ),
    "a config that is a number": (
        put(config__json="1"),
        "{folder} is not a model folder: config.json must hold a JSON object, not a number",
    ),
    "an empty config": (put(config__json=""), f"{NOT_READ} it is empty"),
    "a config that is a pointer": (
        put(config__json=POINTER),
        f"{NOT_READ} it is a Git LFS pointer (run `git lfs pull` in its folder)",
    ),
    "a config that is a folder": (a_folder("config.json"), f"{NOT_READ} Is a directory"),
    "a config that reading fails for": (
        a_link("config.json", "/proc/self/mem"),
        f"{NOT_READ} Input/output error",
    ),
    "a config whose link leads nowhere": (
        a_link("config.json", "../blobs/1"),
        "{folder} is not a model folder: config.json is missing",
    ),
    "weights that are a folder": (
        a_folder("model.safetensors"),
        "{folder}/model.safetensors, which holds the weights, is a folder and must be a file: "
        + FETCH,
    ),
    "weights whose link leads nowhere": (
        a_link("model.safetensors", "../blobs/1"),
        "{folder}/model.safetensors is a link to ../blobs/1, which is not there",
    ),
    "weights that reading fails for": (
        a_link("model.safetensors", "/proc/self/mem"),
        "{folder}/model.safetensors cannot be read: Input/output error",
    ),
    "empty weights": (
        put(model__safetensors=b""),
        "{folder}/model.safetensors is empty, not a safetensors file: fetch it again",
    ),
    "truncated weights": (
        put(model__safetensors=WHOLE[:-1]),
        f"{{folder}}/model.safetensors is {len(WHOLE) - 1} bytes, its header says {len(WHOLE)}: fetch it "
        "again",
    ),
    "weights that are a pointer": (
        put(model__safetensors=POINTER),
        "{folder}/model.safetensors is a Git LFS pointer (run `git lfs pull` in its folder), not a "
        "safetensors file: fetch it again",
    ),
    "weights that are a pickle": (
        put(model__safetensors=b"PK\x03\x04" + bytes(100)),
        "{folder}/model.safetensors is a zip archive, as PyTorch's pickles are, not a safetensors file: "
        "fetch it again",
    ),
    "no weights": (
        gone("model.safetensors"),
        f"{{folder}} holds no weights: model.safetensors is missing; {FETCH}",
    ),
    "a tokenizer that is a pointer": (
        put(tokenizer__json=POINTER),
        "{folder}/tokenizer.json is a Git LFS pointer (run `git lfs pull` in its folder), not a "
        "tokenizer: fetch it again",
    ),
    "a tokenizer that is a folder": (
        a_folder("tokenizer.json"),
        "{folder}/tokenizer.json cannot be read: Is a directory",
    ),
    "a tokenizer from before tokenizer.json": (
        both(gone("tokenizer.json"), put(vocab__json="{}", merges__txt="")),
        f"{{folder}} has no tokenizer.json: {CONVERT}, which gets one made from the vocabulary there",
    ),
    "a tokenizer of Mistral's": (
        both(gone("tokenizer.json"), put(tekken__json="{}")),
        "{folder} has no tokenizer.json, and tekken.json is of a kind that is not read: fetch "
        "tokenizer.json from the model's publisher, or from another copy of the model",
    ),
    "no tokenizer": (
        gone("tokenizer.json"),
        "{folder} has no tokenizer: tokenizer.json is missing, and tokenizer.model and vocab.json, from "
        f"which it could be made, are too; {FETCH}",
    ),
    "a context that is no number": (
        config(max_position_embeddings=1.5),
        "{folder}: max_position_embeddings in config.json must be a whole number above 0 and below "
        "2,147,483,648, got '1.5'",
    ),
    "a vocabulary that is true": (
        config(vocab_size=True),
        "{folder}: vocab_size in config.json must be a whole number above 0 and below 2,147,483,648, got "
        "'True'",
    ),
    "an end that is a text": (
        config(eos_token_id=["</s>"]),
        "{folder}: eos_token_id must be a token id or a list of them, got \"['</s>']\"",
    ),
    "a sampling default that cannot be": (
        put(generation_config__json='{"temperature": "hot"}'),
        "{folder}/generation_config.json cannot be used: temperature must be a number, got 'hot'; "
        "correct it, or delete it",
    ),
    "a deep added_tokens": (
        put(added_tokens__json="[" * 200_000),
        "{folder} is incomplete: added_tokens.json cannot be read: it has more than "
        f"{DEEPEST} objects or arrays within each other",
    ),
    "shards outside": (
        both(
            renamed("model.safetensors", "m.safetensors"),
            put(model__safetensors__index__json='{"weight_map": {"w": "../m.safetensors"}}'),
        ),
        "{folder}/model.safetensors.index.json names '../m.safetensors', which is not a file in its "
        "folder",
    ),
    "weights named outside": (
        config(transformers_weights="../model.safetensors"),
        "{folder}: transformers_weights in config.json must name a file in that folder",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_model_is_said_in_one_line(what: str, tmp_path: Path) -> None:
    change, line = REFUSED[what]
    folder = model(tmp_path / "model")
    change(folder)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    assert str(caught.value) == line.replace("{folder}", str(folder))
    assert caught.value.exit_code == 3


INDEX = json.dumps({"weight_map": {"w": "shards/model-00001-of-00001.safetensors"}})


def in_a_subfolder(folder: Path) -> None:
    (folder / "shards").mkdir()
    target = folder / "shards" / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors.index.json").write_text(INDEX)


ACCEPTED: dict[str, tuple[Change, dict[str, Any]]] = {
    "no architectures": (without("architectures"), {"architecture": "LlamaForCausalLM"}),
    "null architectures": (config(architectures=None), {"architecture": "LlamaForCausalLM"}),
    "empty architectures": (config(architectures=[]), {"architecture": "LlamaForCausalLM"}),
    "architectures of null": (config(architectures=[None]), {"architecture": "LlamaForCausalLM"}),
    "the bare model": (config(architectures=["LlamaModel"]), {"architecture": "LlamaModel"}),
    "a class of a fork": (config(architectures=["MyLlama"]), {"architecture": "MyLlama"}),
    "a stale index": (
        put(model__safetensors__index__json='{"weight_map": {"w": "gone.safetensors"}}'),
        {},
    ),
    "a broken index": (put(model__safetensors__index__json="{"), {}),
    "shards in a folder": (in_a_subfolder, {}),
    "weights that config.json names": (
        both(
            renamed("model.safetensors", "mine.safetensors"),
            config(transformers_weights="mine.safetensors"),
        ),
        {},
    ),
    "no context": (without("max_position_embeddings"), {"max_positions": 2048}),
    "null context": (config(max_position_embeddings=None), {"max_positions": 2048}),
    "another key": (
        both(config(max_position_embeddings=None, n_positions=77), put()),
        {"max_positions": 77},
    ),
    "the family's own default": (
        config(model_type="qwen2", architectures=None, max_position_embeddings=None),
        {"max_positions": 32768, "architecture": "Qwen2ForCausalLM"},
    ),
    "the tokenizer's limit": (
        both(
            config(model_type="gpt-sw3", max_position_embeddings=None),
            put(tokenizer_config__json='{"model_max_length": 640}'),
        ),
        {"max_positions": 640},
    ),
    "the window": (
        both(
            config(model_type="gpt-sw3", max_position_embeddings=None, sliding_window=96),
            put(tokenizer_config__json='{"model_max_length": 1e30}'),
        ),
        {"max_positions": 96},
    ),
    "nothing about the context": (
        config(model_type="gpt-sw3", max_position_embeddings=None),
        {"max_positions": 2048},
    ),
    "a text_config": (
        put(config__json=json.dumps({"model_type": "llama", "text_config": LLAMA})),
        {"vocab_size": 320, "max_positions": 128, "eos_token_ids": (2,)},
    ),
    "no quantization": (config(quantization_config=None), {}),
    "an end that is no token": (config(eos_token_id=[-1, 2, 2, 999]), {"eos_token_ids": (2,)}),
    "code that transformers has itself": (config(auto_map={"AutoModel": "x.Y"}), {}),
    "a pickle beside": (put(pytorch_model__bin=b"\x80\x02"), {}),
    "GGUF beside": (put(model__gguf=b"GGUF"), {}),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_transformers_loads_is_accepted(what: str, tmp_path: Path) -> None:
    change, expected = ACCEPTED[what]
    folder = model(tmp_path / "model")
    change(folder)
    files = resolve_model(str(folder))
    assert {key: getattr(files, key) for key in expected} == expected
    assert [path.read_bytes() for path in files.weights] == [WHOLE]


def test_integers_that_are_no_weights_are_not_taken_for_quantized_ones(tmp_path: Path) -> None:
    mask = safetensors([1.0], name="transformer.h.0.attn.bias", dtype="U8")
    put(model__safetensors=mask)(model(tmp_path / "model"))
    assert resolve_model(str(tmp_path / "model")).weights


# ---- a file instead of a folder


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("m.gguf", b"GGUF", f"{{file}} {BROKEN_GGUF}"),
        ("m", b"GGUF\x03", f"{{file}} {BROKEN_GGUF}"),
        ("m.bin", b"PK\x03\x04", f"{{file}} is a pickle, which is never loaded: {CONVERT}"),
        ("m.pt", b"", f"{{file}} is a pickle, which is never loaded: {CONVERT}"),
        ("m", b"\x80\x02}q", f"{{file}} is a pickle, which is never loaded: {CONVERT}"),
        ("m.onnx", b"\x08", f"{{file}} is ONNX, which is not read: {SAFETENSORS}"),
        ("m.npz", b"PK\x03\x04", f"{{file}} is NumPy, which is not read: {SAFETENSORS}"),
        ("m.nemo", b"PK\x03\x04", f"{{file}} is NeMo, which is not read: {SAFETENSORS}"),
        ("ggml.bin", b"lmgg", "{file} is a GGML file, older than GGUF, which is not read: use the same "
                              "model in GGUF or safetensors"),
        ("m.zip", b"PK\x03\x04", "{file} is a zip archive: unpack it, and use the folder with its "
                                 "config.json"),
        ("model.safetensors", WHOLE, "{file} is a safetensors file: use its folder, {folder}"),
        ("m.txt", b"hello", "{file} is a file, and a model is a folder with config.json, "
                            "model.safetensors and tokenizer.json"),
    ],
)  # fmt: skip
def test_a_file_is_told_what_it_is(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder / name))
    said = line.replace("{file}", str(folder / name)).replace("{folder}", str(folder))
    assert str(caught.value) == said
    listed = tmp_path / "paths.yaml"
    listed.write_text(f"mine: {folder / name}")
    with pytest.raises(ModelError) as again:
        resolve_model("mine", paths_file=listed)
    assert str(again.value) == said


def test_a_pickle_without_a_config_is_not_sent_to_convert(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="convert its folder, which needs a config"):
        resolve_model(str(tmp_path / "m.bin"))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_a_name_that_can_be_no_path_is_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_an_advised_command_can_be_typed_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = model(tmp_path / "my model's")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    typed = str(caught.value).partition("convert ")[2].partition(" OUT")[0]
    assert typed == f"""'{tmp_path}/my model'"'"'s'"""


# ---- permissions


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so it becomes another user meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config.json", f"{NOT_READ} Permission denied"),
        ("model.safetensors", "{folder}/model.safetensors cannot be read: Permission denied"),
        ("tokenizer.json", "{folder}/tokenizer.json cannot be read: Permission denied"),
        (".", "{folder} cannot be read: Permission denied"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, line: str) -> None:
    with TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = model(Path(place).resolve() / "model")
        os.chmod(folder, 0o755)
        os.chmod(folder / name, 0)
        try:
            with as_nobody(), pytest.raises(ModelError) as caught:
                resolve_model(str(folder))
        finally:
            os.chmod(folder / name, 0o755)
    assert str(caught.value) == line.replace("{folder}", str(folder))


# ---- what is fetched


def test_all_that_serving_reads_is_fetched_and_not_the_same_weights_twice() -> None:
    wanted = [
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/tool_use.jinja", "shards/model-00001-of-00001.safetensors",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "README.md",
        "consolidated.safetensors", "onnx/config.json", "onnx/model.onnx", "model.fp16.safetensors",
        "modeling_mine.py", "model.gguf", "tf_model.h5", ".gitattributes",
    ]  # fmt: skip
    fetched = filter_repo_objects(
        [*wanted, *left], allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)
    )
    assert list(fetched) == wanted
