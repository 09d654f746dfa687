"""Folders as people have them: one that is no model is refused in one exact line, which says what it
is and what to do."""

from importlib.metadata import version
from pathlib import Path

import pytest

from baton.checkpoints.jsonfile import DEEPEST
from baton.errors import ModelError
from baton.model_files import resolve_model
from tests.pure.folders import (
    ANOTHER,
    BROKEN_GGUF,
    CAUSAL,
    CONVERT,
    FETCH,
    MERGE,
    NOT_READ,
    POINTER,
    SAFETENSORS,
    T5,
    TWO_WAY,
    VISION,
    WHOLE,
    Change,
    a_folder,
    a_link,
    adapter,
    both,
    config,
    gone,
    model,
    only,
    put,
    renamed,
    without,
)
from tests.pure.test_model_files import LLAMA, safetensors

TRANSFORMERS = version("transformers")

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
        "{folder} is a LoRA adapter and not a whole model: serve its base model with --lora "
        "NAME={folder}, or merge it into its base model, "
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
            ("bitsandbytes, 4 bits", "quantization_config", {"load_in_4bit": True}),
            ("modelopt", "quantization_config", {"quant_method": "modelopt", "bits": "many"}),
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
        config(text_config=LLAMA | {"quantization_config": {"quant_method": "hqq"}}),
        "{folder} is quantized (hqq): use the same model in bf16, fp16 or fp32",
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
