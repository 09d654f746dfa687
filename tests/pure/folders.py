"""Folders as people have them: a whole model, what may be changed in it, and words of the refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pure.test_model_files import LLAMA, safetensors, write_config

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
