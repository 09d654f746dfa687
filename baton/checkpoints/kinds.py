"""What a folder or a file is that is not a model in safetensors: one line each, with a way out.

Decided from the names in the folder and, for an adapter, from its small JSON file.
"""

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from shlex import quote

from baton.checkpoints.jsonfile import GGML, head_of, read_object, reason, what_it_is
from baton.errors import ModelError
from baton.package import COMMAND

PICKLES = (".bin", ".pt", ".pth")
LEFT_OVERS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "openvino_")
"""Files with these endings that are no pickled weights begin so."""
ADAPTER = "adapter_config.json"
DIFFUSION = "model_index.json"
NANOCHAT = re.compile(r"model_(\d{6,})\.pt")
SAME_IN_SAFETENSORS = "use the same model in safetensors"
OTHERS = (  # endings of files with weights that nothing here reads
    (".onnx", "ONNX"),
    (".h5", "TensorFlow"),
    (".msgpack", "Flax"),
    ("openvino_model.xml", "OpenVINO"),
    (".tflite", "TensorFlow Lite"),
    (".mlpackage", "Core ML"),
    (".mlmodel", "Core ML"),
    (".engine", "TensorRT"),
    (".npz", "NumPy"),
    (".ggml", "GGML"),
    (".nemo", "NeMo"),
    (".llamafile", "a llamafile"),
)
MOST_NAMES = 10_000  # whose folders are looked into


def is_utf8(name: str) -> bool:
    """Whether a name is text, as messages and libraries want it. The system allows any bytes in one."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def names_in(folder: Path) -> list[str]:
    """The names in a folder and in the folders inside it, those of the folder itself first. ModelError
    if it cannot be read."""
    try:
        found = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {reason(error)}") from error
    for name in found[:MOST_NAMES]:
        with suppress(OSError):  # a folder inside that cannot be read decides nothing
            if not name.startswith(".") and (folder / name).is_dir():
                found += [f"{name}/{each.name}" for each in (folder / name).iterdir()]
    return found


def without_config(folder: Path, names: Collection[str]) -> str:
    """What to say of a folder without config.json."""
    if ADAPTER in names:
        return adapter(folder)
    if DIFFUSION in names:
        return (
            f"{folder} is a diffusion pipeline (it has {DIFFUSION}), which makes images: use a "
            "language model"
        )
    if other := _other_weights(names):
        return f"{folder} holds {other}, which is not read: {SAME_IN_SAFETENSORS}"
    own = any(name.startswith("consolidated.") for name in names) and "params.json" in names
    nanochat = any(NANOCHAT.fullmatch(name) for name in names)
    if nanochat or (own and pickles(names)):
        kind = "LLaMA's" if own else "nanochat's"
        return f"{folder} is a checkpoint in {kind} own format: {_convert(folder)}"
    missing = f"{folder} is not a model folder: config.json is missing"
    if inside := _first(names, "/config.json"):
        return f"{missing}; {quote(str(folder / inside.removesuffix('/config.json')))} has one"
    if "snapshots" in names and "blobs" in names:
        hub_id = folder.name.removeprefix("models--").replace("--", "/")
        return f"{missing}; it is a part of the Hugging Face cache: use {hub_id} instead"
    if not names:
        return f"{missing}, it is empty"
    if any(name.startswith("tokenizer") for name in names):
        return f"{missing}; it has a tokenizer and no model: fetch the model's other files"
    return missing


def without_weights(folder: Path, names: Collection[str]) -> str:
    """What to say of a folder with a config.json and without weights that are read."""
    top = [name for name in names if "/" not in name]
    if ADAPTER in top:
        return adapter(folder)
    pickled, odd = pickles(top), _first(top, ".safetensors")
    if odd or pickled:
        found = odd or pickled[0]
        kind = "" if odd else ", a pickle, which is never loaded,"
        return f"{folder} has {found}{kind} but no model.safetensors: {_convert(folder)}"
    if other := _other_weights(names):
        return f"{folder} holds {other} but no model.safetensors: {SAME_IN_SAFETENSORS}"
    return f"{folder} holds no weights: model.safetensors is missing; fetch the model again"


def adapter(folder: Path) -> str:
    """What to say of a folder with an adapter, which changes a model's weights and is none."""
    kind, base, beside = "an adapter", "its base model", ""
    try:
        about = read_object(folder / ADAPTER, "")
    except ModelError:
        about = {}
    if isinstance(peft := about.get("peft_type"), str):
        kind = f"an adapter ({peft[:20]})"
        if peft == "LORA":
            kind, beside = "a LoRA adapter", f" serve its base model with --lora NAME={folder}, or"
    if isinstance(about.get("base_model_name_or_path"), str):
        base = f"its base model, {about['base_model_name_or_path'][:100]},"
    return (
        f"{folder} is {kind} and not a whole model:{beside} merge it into {base} with peft's "
        "merge_and_unload(), save that with its tokenizer, and use the result"
    )


def single_file(path: Path) -> str:
    """What to say of a file that was given instead of a folder."""
    folder = path.absolute().parent
    try:
        what = what_it_is(head_of(path))
    except OSError as error:
        return f"{path} cannot be read: {reason(error)}"
    has_config = (folder / "config.json").is_file()
    if path.suffix == ".safetensors":
        needs = "" if has_config else ", with config.json and a tokenizer beside it"
        return f"{path} is a safetensors file: use its folder, {quote(str(folder))}{needs}"
    if other := _other_weights([path.name]):
        return f"{path} is {other.partition(' (')[0]}, which is not read: {SAME_IN_SAFETENSORS}"
    if what == GGML:
        return f"{path} is {what}, which is not read: use the same model in GGUF or safetensors"
    if path.suffix == ".zip":
        return f"{path} is a zip archive: unpack it, and use the folder with its config.json"
    if (what is not None and "pickle" in what) or path.suffix in PICKLES:
        way = _convert(folder) if has_config else "convert its folder, which needs a config.json"
        return f"{path} is a pickle, which is never loaded: {way}"
    kind = f" ({what})" if what else ""
    return (
        f"{path} is a file{kind}, and a model is a folder with config.json, model.safetensors and "
        "tokenizer.json"
    )


def pickles(names: Iterable[str]) -> list[str]:
    """Those of files that PyTorch's pickled weights have."""
    return sorted(
        name
        for name in names
        if Path(name).suffix in PICKLES and not Path(name).name.startswith(LEFT_OVERS)
    )


def _other_weights(names: Iterable[str]) -> str | None:
    """The format and file of weights that nothing here reads."""
    for name in names:
        for ending, kind in OTHERS:
            if name.lower().endswith(ending):
                return f"{kind} ({name})"
    return None


def _first(names: Iterable[str], ending: str) -> str | None:
    return next((name for name in sorted(names) if name.endswith(ending)), None)


def _convert(folder: Path) -> str:
    return f"run {COMMAND} convert {quote(str(folder))} OUT and use OUT"
