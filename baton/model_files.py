"""ModelFiles: the files of a model name on this machine, checked before any weight is read.

    name in configs/model_paths.yaml  ->  its folder (installed: ~/.config/baton/model_paths.yaml)
    demo                              ->  the bundled model
    random:SHAPE                      ->  baton/configs/shapes/SHAPE.json, weights made up
    a folder, a GGUF file             ->  itself
    smollm2, the name of a package    ->  its GGUF file (baton/model_packages.py)
    a Hugging Face id                 ->  its snapshot in the local cache (downloaded only on request)

No torch and no transformers: the router reads a model's limits and fingerprint here too. An error in a
folder is reported in one line, in milliseconds, before a worker is started.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from baton.adapters.below import updates_folder
from baton.adapters.files import AdapterFiles, resolve_adapters
from baton.adapters.identity import Adapter
from baton.checkpoints import kinds
from baton.checkpoints.families import architecture_of, default_of, text_part
from baton.checkpoints.jsonfile import Json, optional_object, read_object, reason
from baton.checkpoints.lost import no_such_path
from baton.checkpoints.vocabulary import tokenizer_of
from baton.checkpoints.weights import (
    check_vocabulary,
    header_of,
    holds_quantized,
    refuse_quantized,
    sample_of,
    weight_files,
)
from baton.errors import ModelError
from baton.gguf.folder import gguf_file, prepared_folder
from baton.model_packages import KNOWN, how_to_get, packaged_model
from baton.package import IN_CHECKOUT, PACKAGE, ROOT, config_folder
from baton.quantized.methods import method_beside, method_of
from baton.quantized.plan import Plan, plan_weights
from baton.rope import FIXED, RopeRule
from sampler.params import SamplingParams

PATHS_FILE = config_folder() / "model_paths.yaml"
FOLDERS_FROM = ROOT if IN_CHECKOUT else PATHS_FILE.parent
"""Relative folders in that file start here."""
BUNDLED = {"demo": PACKAGE / "models" / "demo"}
SHAPES = PACKAGE / "configs" / "shapes"
RANDOM = "random:"
RANDOM_SEED = 0

CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
    "max_sequence_length",
)  # fmt: skip
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
UNLIMITED = 1 << 31
"""Tokens: what is not below it is not meant as a length."""
FALLBACK_CONTEXT = 2048
"""Tokens, where neither the folder nor transformers says how long a text may be."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Weights, configuration, chat templates (chat_template.jinja, additional_chat_templates/), and the
tokenizer in every form (tokenizer.json, tokenizer.model, vocab.txt, merges.txt, added_tokens.json)."""
NOT_DOWNLOADED = ("original/*", "onnx/*", "openvino/*", "coreml/*", "consolidated*", "*.fp16.*")
"""The same weights in other forms."""


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
    weights: tuple[Path, ...] = ()  # the safetensors files, in order
    gguf: Path | None = None  # the file with the weights, which `folder` lacks then
    quantized: Plan | None = None  # of safetensors that are not in full width
    rope: RopeRule = FIXED
    lora: tuple[AdapterFiles, ...] = ()
    lora_updates: Path | None = None  # the folder of adapters that come and go

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What the processes of a cluster call its adapters."""
        return tuple(each.adapter for each in self.lora)

    @property
    def adaptable(self) -> bool:
        """Forwards may have adapters, now or later."""
        return bool(self.lora) or self.lora_updates is not None

    def with_lora(self, given: Sequence[str], updates: str | None = None) -> "ModelFiles":
        """The same with adapters: NAME=FOLDER each. `updates`: others may come, from below this folder.
        Raises InputError, ModelError."""
        folder = updates_folder(updates) if updates is not None else None
        return replace(self, lora=resolve_adapters(given, self.name), lora_updates=folder)

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
        path = _existing(listed[name], FOLDERS_FROM)
        if path is None:
            raise ModelError(
                f"{name} is {listed[name]} in {paths_file}: there is no such folder; relative ones "
                f"start at {FOLDERS_FROM}"
            )
        return _read(name, path)
    if name in BUNDLED:
        return _read(name, BUNDLED[name])
    if (path := _existing(name)) is not None:
        return _read(name, path.resolve())
    if (packaged := packaged_model(name)) is not None:
        return _read(name, packaged)
    if name in KNOWN:
        raise ModelError(how_to_get(name))
    snapshot = _hub_snapshot(name, download)
    if snapshot is None:
        raise ModelError(no_such_path(name) or _not_found(name, listed, paths_file))
    return _read(name, snapshot)


def absolute_name(name: str, *, paths_file: Path = PATHS_FILE) -> str:
    """The name by which a process in any working folder finds the same model: that of a folder or file
    becomes an absolute path. Raises ModelError if `paths_file` cannot be read."""
    if name.startswith(RANDOM) or name in BUNDLED or name in _read_paths(paths_file):
        return name
    path = _existing(name)
    return name if path is None else str(path.resolve())


def _existing(name: str, begin: Path = Path()) -> Path | None:
    """The folder or file of this name; None if there is none. ModelError if that cannot be known."""
    try:
        path = begin / Path(name).expanduser()
        return path if path.exists() else None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # ~nobody, a name too long, a closed folder
        raise ModelError(f"{name[:200]!r} names no model: {reason(error)}") from error


def _read_paths(paths_file: Path) -> dict[str, str]:
    if not paths_file.is_file():
        return {}
    try:
        entries = yaml.safe_load(paths_file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{paths_file} cannot be read: {reason(error)}") from error
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
            return Path(
                snapshot_download(
                    name,
                    allow_patterns=list(DOWNLOADED),
                    ignore_patterns=list(NOT_DOWNLOADED),
                )
            )
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError, RuntimeError) as error:
        if not download:
            return None
        raise ModelError(f"{name} cannot be fetched: {reason(error)}") from error


def _not_found(name: str, listed: dict[str, str], paths_file: Path) -> str:
    known = [
        *{**BUNDLED, **listed},
        *(RANDOM + path.stem for path in sorted(SHAPES.glob("*.json"))),
        *KNOWN,
    ]
    spellings = {each.removeprefix(RANDOM): each for each in known} | {each: each for each in known}
    close = difflib.get_close_matches(name, spellings, n=1)
    guess = f"did you mean {spellings[close[0]]}? " if close else ""
    return (
        f"there is no model {name!r}: not in {paths_file}, not a folder, not in a package, not in "
        f"the Hugging Face cache; {guess}known names: {', '.join(known)}; add a line NAME: FOLDER to "
        f"{paths_file}, or fetch it with --download"
    )


def _read(name: str, path: Path) -> ModelFiles:
    """The model in a folder, or in a GGUF file. ModelError that says what else the path is."""
    if not (kinds.is_utf8(name) and kinds.is_utf8(str(path))):
        raise ModelError(
            f"{str(path)!a} is not UTF-8, and a model's name and folder must be: rename it"
        )
    try:
        gguf = gguf_file(path)
        is_folder = path.is_dir()
        config_file = path / "config.json"
        has_config = config_file.exists() or config_file.is_symlink()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}") from error
    if gguf is not None:
        return _read_gguf(name, gguf)
    if not is_folder:
        raise ModelError(kinds.single_file(path))
    if not has_config:
        raise ModelError(kinds.without_config(path, kinds.names_in(path)))
    return _read_folder(name, path)


def _read_gguf(name: str, gguf: Path) -> ModelFiles:
    folder, fingerprint = prepared_folder(gguf)
    config = read_object(folder / "config.json", f"{folder} is incomplete")
    ids = read_object(folder / "generation_config.json", f"{folder} is incomplete")
    tokenizer = folder / "tokenizer.json"
    return _described(name, config, ids, folder, tokenizer, fingerprint, gguf)


def _read_folder(name: str, folder: Path) -> ModelFiles:
    config = read_object(folder / "config.json", f"{folder} is not a model folder")
    architecture_of(name, config)  # first: what a model is matters more than what it lacks
    method = method_of(name, config)
    weights = weight_files(folder, config)
    if not weights:
        raise ModelError(kinds.without_weights(folder, kinds.names_in(folder)))
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    headers = [header_of(path) for path in weights]
    if method is None and any(map(holds_quantized, headers)):
        method = method_beside(name, folder)
    for path, header in zip(weights, headers, strict=True):
        if method is None:
            refuse_quantized(name, header)
        digest.update(f"{path.name} {path.stat().st_size}".encode() + header + sample_of(path))
    plan = None
    if method is not None:
        plan = plan_weights(
            name, method.about, method.quantization, zip(weights, headers, strict=True)
        )
        digest.update(method.digest())
    about = folder / "generation_config.json"
    generation = optional_object(about, f"{folder} is incomplete")
    _check_sampling(about, generation)
    for beside in TOKENIZER_SETTINGS:
        optional_object(folder / beside, f"{folder} is incomplete")
    fingerprint = digest.hexdigest()[:32]
    files = _described(name, config, generation, folder, tokenizer_of(folder), fingerprint)
    for header in headers:
        check_vocabulary(name, header, files.vocab_size)
    return replace(files, weights=tuple(weights), quantized=plan)


def _shape(name: str) -> ModelFiles:
    """A published architecture with random weights; ids beyond the demo tokenizer's have no text."""
    known = [RANDOM + path.stem for path in sorted(SHAPES.glob("*.json"))]
    if name not in known:
        raise ModelError(f"there is no shape {name!r}: use {', '.join(known)}")
    tokenizer_file = BUNDLED["demo"] / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ModelError(f"{name} borrows the demo's tokenizer, and {tokenizer_file} is missing")
    config = read_object(SHAPES / f"{name.removeprefix(RANDOM)}.json", name)
    text = f"{name} {RANDOM_SEED} {json.dumps(config, sort_keys=True)}"
    digest = hashlib.sha256(text.encode())
    return _described(name, config, {}, None, tokenizer_file, digest.hexdigest()[:32])


def _described(
    name: str,
    config: Json,
    generation: Json,
    folder: Path | None,
    tokenizer: Path,
    digest: str,
    gguf: Path | None = None,
) -> ModelFiles:
    vocabulary = _count(name, config, "vocab_size") or _default(config, "vocab_size")
    if vocabulary is None:
        raise ModelError(f"{name}: config.json has no vocab_size")
    positions = _context(name, config, folder)
    rope = _rope(name, config, positions)
    return ModelFiles(
        name=name,
        folder=folder,
        shape=name.removeprefix(RANDOM) if folder is None else None,
        config=config,
        generation_config=generation,
        tokenizer_file=tokenizer,
        eos_token_ids=_eos(name, generation, config, vocabulary),
        max_positions=rope.context(positions),
        vocab_size=vocabulary,
        fingerprint=digest,
        architecture=architecture_of(name, config),
        model_type=config["model_type"],
        rope=rope,
        gguf=gguf,
    )


def _rope(name: str, config: Json, positions: int) -> RopeRule:
    try:
        return RopeRule.of(config, positions)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{name}: the rope_scaling or rope_parameters of its config.json cannot be read: {error}"
        ) from error


def _eos(name: str, generation: Json, config: Json, vocabulary: int) -> tuple[int, ...]:
    """Token ids that end a text. Ids outside the vocabulary, such as -1, end none, as in transformers."""
    places = (generation, config, text_part(config))
    found = next((each["eos_token_id"] for each in places if "eos_token_id" in each), None)
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(each) is int for each in ids):
        raise ModelError(
            f"{name}: eos_token_id must be a token id or a list of them, got {str(found)[:80]!r}"
        )
    return tuple(each for each in dict.fromkeys(ids) if 0 <= each < vocabulary)


def _check_sampling(file: Path, generation: Json) -> None:
    """ModelError for defaults that are outside of their bounds, used or not."""
    try:
        SamplingParams.from_generation_config(generation)
        SamplingParams.from_generation_config(generation | {"do_sample": True})
    except ValueError as error:
        raise ModelError(
            f"{file} cannot be used: {reason(error)}; correct it, or delete it"
        ) from error


def _context(name: str, config: Json, folder: Path | None) -> int:
    """Tokens of the longest text: what config.json says, else transformers' default of the
    family, else the tokenizer's limit, the sliding window, or FALLBACK_CONTEXT."""
    if (told := _count(name, config, *CONTEXT_KEYS)) is not None:
        if told < 2:
            raise ModelError(
                f"{name}: by its config.json a text has 1 token; a prompt and an answer need 2"
            )
        return told
    if (default := _default(config, *CONTEXT_KEYS)) is not None:
        return default
    tokenizer: Json = {}
    if folder is not None:
        about = folder / "tokenizer_config.json"
        tokenizer = optional_object(about, f"{folder} is incomplete")
    for limit in (tokenizer.get("model_max_length"), text_part(config).get("sliding_window")):
        if type(limit) is int and 1 < limit < UNLIMITED:
            return limit
    return FALLBACK_CONTEXT


def _default(config: Json, *keys: str) -> int | None:
    """What transformers takes for the family if config.json has none of these keys."""
    text = text_part(config)
    return default_of(str(text.get("model_type", config.get("model_type"))), *keys)


def _count(name: str, config: Json, *keys: str) -> int | None:
    """The first of these numbers that config.json has. ModelError if it is no number of tokens."""
    for place in (text_part(config), config):
        for key in keys:
            value = place.get(key)
            if value is None:
                continue
            if type(value) is not int or not 0 < value < UNLIMITED:
                raise ModelError(
                    f"{name}: {key} in config.json must be a whole number above 0 and below "
                    f"{UNLIMITED:,}, got {str(value)[:80]!r}"
                )
            return value
    return None
