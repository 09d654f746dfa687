"""ModelFiles: the files of a model name on this machine, checked before any weight is read.

    name in configs/model_paths.yaml  ->  its folder (installed: ~/.config/baton/model_paths.yaml)
    demo                              ->  the bundled model
    random:SHAPE                      ->  baton/configs/shapes/SHAPE.json, weights made up
    a folder                          ->  itself
    a Hugging Face id                 ->  its snapshot in the local cache (downloaded only on request)

No torch and no transformers: the router reads a model's limits and fingerprint here too. An error in a
folder is reported in one line, in milliseconds, before a worker is started.
"""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from baton.errors import ModelError
from baton.package import COMMAND, IN_CHECKOUT, PACKAGE, ROOT, config_folder

PATHS_FILE = config_folder() / "model_paths.yaml"
FOLDERS_FROM = ROOT if IN_CHECKOUT else PATHS_FILE.parent
"""Relative folders in that file start here."""
BUNDLED = {"demo": PACKAGE / "models" / "demo"}
SHAPES = PACKAGE / "configs" / "shapes"
RANDOM = "random:"
RANDOM_SEED = 0

Json = dict[str, Any]

# Families that transformers loads but that would be served wrongly or not at all. All others must pass
# the self-test when they are loaded (baton/engine/selftest.py).
TWO_WAY = "it is not a decoder-only language model"
FAMILIES_BY_REASON = {
    "its attention cannot be pointed at a paged KV pool": """
        bloom codegen cpmant ctrl falcon fuyu gpt_neo gpt_neox_japanese gptj mpt openai-gpt reformer
        xglm xlm xlnet""",
    "it keeps a running state beside, or instead of, keys and values": """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe
        lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2""",
    "its attention is of another kind": """
        axk2 blt deepseek_v32 diffllama glm_moe_dsa hrm_text llama4 llama4_text phimoe""",
    TWO_WAY: """
        bart bert bert-generation big_bird bigbird_pegasus camembert data2vec-text electra ernie
        mbart megatron-bert prophetnet rembert roberta roformer t5 trocr whisper xlm-roberta""",
}
REFUSED = {
    family: why for why, families in FAMILIES_BY_REASON.items() for family in families.split()
}
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A complete model. With random weights `folder` is None and `shape` is set."""

    name: str
    folder: Path | None
    shape: str | None
    config: Json
    generation_config: Json
    tokenizer_file: Path
    eos_token_ids: tuple[int, ...]
    max_positions: int
    vocab_size: int
    fingerprint: str  # equal fingerprints, equal weights
    architecture: str
    model_type: str

    def context(self, limit: int | None) -> int:
        """Tokens of the longest sequence: the model's context, or `limit` where that is shorter."""
        return min(limit or self.max_positions, self.max_positions)


def resolve_model(
    name: str, *, paths_file: Path = PATHS_FILE, download: bool = False
) -> ModelFiles:
    """The model `name`. With `download`, a missing Hugging Face id is fetched."""
    if name.startswith(RANDOM):
        return _shape(name)
    listed = _read_paths(paths_file)
    if name in listed:
        folder = FOLDERS_FROM / Path(listed[name]).expanduser()
        if not folder.is_dir():
            raise ModelError(f"{name} is {folder} in {paths_file}: there is no such folder")
        return _read_folder(name, folder)
    if name in BUNDLED:
        return _read_folder(name, BUNDLED[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read_folder(name, folder.resolve())
    snapshot = _hub_snapshot(name, download)
    if snapshot is None:
        raise ModelError(_not_found(name, listed, paths_file))
    return _read_folder(name, snapshot)


def absolute_name(name: str, *, paths_file: Path = PATHS_FILE) -> str:
    """The name by which a process in any working folder finds the same model: that of a folder becomes
    an absolute path. Raises ModelError if `paths_file` cannot be read."""
    if name.startswith(RANDOM) or name in BUNDLED or name in _read_paths(paths_file):
        return name
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _read_paths(paths_file: Path) -> dict[str, str]:
    if not paths_file.is_file():
        return {}
    try:
        entries = yaml.safe_load(paths_file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{paths_file} cannot be read: {_one_line(error)}") from error
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise ModelError(f"{paths_file} must hold lines of the form NAME: FOLDER and nothing else")
    return {str(key): value for key, value in entries.items()}


def _hub_snapshot(name: str, download: bool) -> Path | None:
    """The folder of a Hugging Face id in the local cache, fetched if `download`."""
    if not HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download  # takes 0.3 s

    try:
        if download:
            return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError, RuntimeError) as error:
        if not download:
            return None
        raise ModelError(f"{name} cannot be fetched: {_one_line(error)}") from error


def _not_found(name: str, listed: dict[str, str], paths_file: Path) -> str:
    known = [
        *{**BUNDLED, **listed},
        *(RANDOM + path.stem for path in sorted(SHAPES.glob("*.json"))),
    ]
    spellings = {each.removeprefix(RANDOM): each for each in known} | {each: each for each in known}
    close = difflib.get_close_matches(name, spellings, n=1)
    guess = f"did you mean {spellings[close[0]]}? " if close else ""
    return (
        f"there is no model {name!r}: not in {paths_file}, not a folder, not in the Hugging Face "
        f"cache; {guess}known names: {', '.join(known)}; add a line NAME: FOLDER to {paths_file}, "
        "or fetch it with --download"
    )


def _read_folder(name: str, folder: Path) -> ModelFiles:
    config = _read_json(folder / "config.json", f"{folder} is not a model folder")
    _check_architecture(name, config)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weight_files(folder):
        header = _safetensors_header(path)
        digest.update(f"{path.name} {path.stat().st_size}".encode() + header + _sample(path))
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json: write one with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    about = folder / "generation_config.json"
    generation = _read_json(about, f"{folder} is incomplete") if about.exists() else {}
    return _described(name, config, generation, folder, tokenizer_file, digest.hexdigest()[:32])


def _shape(name: str) -> ModelFiles:
    """A published architecture with random weights; ids beyond the demo tokenizer's have no text."""
    known = [RANDOM + path.stem for path in sorted(SHAPES.glob("*.json"))]
    if name not in known:
        raise ModelError(f"there is no shape {name!r}: use {', '.join(known)}")
    tokenizer_file = BUNDLED["demo"] / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ModelError(f"{name} borrows the demo's tokenizer, and {tokenizer_file} is missing")
    config = _read_json(SHAPES / f"{name.removeprefix(RANDOM)}.json", name)
    text = f"{name} {RANDOM_SEED} {json.dumps(config, sort_keys=True)}"
    digest = hashlib.sha256(text.encode())
    return _described(name, config, {}, None, tokenizer_file, digest.hexdigest()[:32])


def _described(
    name: str, config: Json, generation: Json, folder: Path | None, tokenizer: Path, digest: str
) -> ModelFiles:
    return ModelFiles(
        name=name,
        folder=folder,
        shape=name.removeprefix(RANDOM) if folder is None else None,
        config=config,
        generation_config=generation,
        tokenizer_file=tokenizer,
        eos_token_ids=_eos(name, generation, config),
        max_positions=_count(name, config, *CONTEXT_KEYS),
        vocab_size=_count(name, config, "vocab_size"),
        fingerprint=digest,
        architecture=config["architectures"][0],
        model_type=config["model_type"],
    )


def _check_architecture(name: str, config: Json) -> None:
    """ModelError if this kind of model is not supported."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no architecture"
    model_type = str(config.get("model_type", ""))
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is {architecture}, which cannot be served: {TWO_WAY}")
    if model_type in REFUSED:
        raise ModelError(f"{name} is {architecture}, which cannot be served: {REFUSED[model_type]}")
    if "auto_map" in config and not _native(model_type):
        raise ModelError(
            f"{name} needs Python code from its own folder (auto_map in config.json): such code is "
            "never run here; use a model that transformers knows by itself"
        )
    if not model_type or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{name} is not a causal language model: config.json names {architecture}, "
            "something that ends in ForCausalLM or LMHeadModel is needed"
        )
    if quantized := config.get("quantization_config"):
        how = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(f"{name} is quantized ({how}): use the same model in bf16, fp16 or fp32")


def _native(model_type: str) -> bool:
    """Whether transformers has this family. Looked up on disk, because an import takes seconds."""
    spec = find_spec("transformers")
    family = model_type.replace("-", "_").removesuffix("_text")
    places = (spec.submodule_search_locations if spec else None) or []
    return bool(family) and any((Path(place) / "models" / family).is_dir() for place in places)


def _weight_files(folder: Path) -> list[Path]:
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        shards = _read_json(index_file, f"{folder} is incomplete").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index_file} has no weight_map")
        files = [folder / shard for shard in sorted(set(map(str, shards.values())))]
        if missing := [p.name for p in files if not p.is_file() or p.parent != folder]:
            raise ModelError(
                f"{folder} is incomplete: it lacks {', '.join(missing)}, which "
                f"{index_file.name} names: fetch the model again"
            )
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if others := sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_WEIGHTS):
        raise ModelError(
            f"{folder} has {others[0]} but no model.safetensors: "
            f"run {COMMAND} convert {folder} OUT and use OUT"
        )
    raise ModelError(f"{folder} holds no weights: model.safetensors is missing")


def _safetensors_header(path: Path) -> bytes:
    """The file's header, after a check that its tensors lie inside the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors = json.loads(header)
        ends = [int(t["data_offsets"][1]) for key, t in tensors.items() if key != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is broken, or no safetensors file: fetch it again") from error
    needed = 8 + length + max(ends, default=0)
    if needed != size:
        raise ModelError(f"{path} is {size} bytes, its header says {needed}: fetch it again")
    return header


def _sample(path: Path, bytes_each: int = 2**20) -> bytes:
    """The file's beginning and end: they distinguish two trainings of one architecture."""
    with path.open("rb") as file:
        first = file.read(bytes_each)
        file.seek(max(len(first), path.stat().st_size - bytes_each))
        return first + file.read(bytes_each)


def _read_json(path: Path, what: str) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{what}: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{what}: {path.name} cannot be read: {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{what}: {path.name} must hold a JSON object")
    return found


def _eos(name: str, generation: Json, config: Json) -> tuple[int, ...]:
    """Token ids that end a text."""
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(each, int) for each in ids):
        raise ModelError(
            f"{name}: eos_token_id must be a token id or a list of them, got {found!r}"
        )
    return tuple(ids)


def _count(name: str, config: Json, *keys: str) -> int:
    for key in keys:
        if isinstance(config.get(key), int) and config[key] > 0:
            return int(config[key])
    raise ModelError(f"{name}: config.json has no {' or '.join(keys)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
