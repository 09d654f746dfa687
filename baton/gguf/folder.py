"""Folder: the files that transformers' format has beside the weights, made once from a GGUF file.

    $XDG_CACHE_HOME or ~/.cache / baton / gguf / HASH /
        config.json, generation_config.json, tokenizer.json, tokenizer_config.json

HASH covers the GGUF file and the code that reads it. The router and all workers find the same folder.
Whoever comes first writes it while the others wait: beside its place, then renamed, so it is whole or not
there. The weights stay in the GGUF file. When there are more than MOST folders, those that were not used
for longest are deleted, but none that was used within the hour.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from baton.errors import ModelError
from baton.gguf.config import describe
from baton.gguf.header import MAGIC, SUFFIX, read_header
from baton.gguf.tokenizer import tokenizer_files

Json = dict[str, Any]

MOST = 32
UNUSED_S = 3600.0
LOCK, PART = "lock", ".part"
HASHED = 32 << 20  # the beginning, with the header of all but enormous vocabularies
SAMPLES, SAMPLE = 16, 1 << 18
PROJECTOR = "mmproj"  # the vision part of a model, which lies beside it


def gguf_file(path: Path) -> Path | None:
    """The GGUF file at `path`: itself, or the only one of a folder without safetensors. Parts of a model
    count as one. Raises ModelError if there are several."""
    if path.is_file():
        try:
            with path.open("rb") as file:
                return path if path.suffix == SUFFIX or file.read(4) == MAGIC else None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(
        each
        for each in path.glob(f"*{SUFFIX}")
        if not each.name.startswith(PROJECTOR)
        and ("-of-" not in each.name or "-00001-of-" in each.name)
    )
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:4])
        raise ModelError(
            f"{path} holds several models: {names}; name one of them, {path / found[0].name}"
        )
    return found[0] if found else None


def prepared_folder(path: Path) -> tuple[Path, str]:
    """The folder with the configuration and the tokenizer of the GGUF file, and the file's fingerprint.
    Raises ModelError for a model that is not read, or that cannot be stored."""
    try:
        fingerprint = _fingerprint(path)
        kept = _cache()
        folder = kept / fingerprint
        with (kept / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _write(path, folder)
                _forget_unused(kept, folder)
            os.utime(folder)
    except OSError as error:
        why = error.strerror or error
        raise ModelError(
            f"the tokenizer of {path} cannot be stored: {why}; set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return folder, fingerprint


def contents(path: Path) -> dict[str, Json]:
    """The contents of the four files, by name."""
    header = read_header(path)
    described = describe(header)
    ids = described.generation
    files = tokenizer_files(header, ids["bos_token_id"], ids["eos_token_id"] or ())
    length = {"model_max_length": described.config["max_position_embeddings"]}
    files["tokenizer_config.json"] |= length
    try:
        Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    except Exception as error:  # the library raises bare Exception
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"no tokenizer can be made from {path}: {why}") from error
    return {"config.json": described.config, "generation_config.json": ids} | files


def write_contents(found: dict[str, Json], out: Path) -> None:
    """Write them into the folder `out`."""
    for name, content in found.items():
        text = json.dumps(content, indent=1 if name == "tokenizer.json" else 2, ensure_ascii=False)
        (out / name).write_text(f"{text}\n", encoding="utf-8")


def _write(path: Path, folder: Path) -> None:
    found = contents(path)
    part = Path(tempfile.mkdtemp(dir=folder.parent, suffix=PART))
    try:
        write_contents(found, part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _forget_unused(kept: Path, newest: Path) -> None:
    """Delete the folders that were not used for longest, and what an interrupted process left."""
    now = time.time()
    ages = {each: now - each.stat().st_mtime for each in kept.iterdir() if each.name != LOCK}
    by_age = sorted(ages, key=ages.__getitem__)
    whole = [each for each in by_age if each.suffix != PART]
    too_many = [each for each in whole[MOST:] if ages[each] > UNUSED_S and each != newest]
    for each in [*too_many, *(each for each in by_age if each.suffix == PART)]:
        shutil.rmtree(each, ignore_errors=True)


def _fingerprint(path: Path) -> str:
    """Equal for equal files, read by equal code."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    stem = path.name.partition("-00001-of-")[0]
    parts = (
        [path]
        if stem == path.name
        else sorted(path.parent.glob(f"{glob.escape(stem)}-*-of-*{SUFFIX}"))
    )
    for part in parts:
        size = part.stat().st_size
        digest.update(f"{size} ".encode())
        with part.open("rb") as file:
            digest.update(file.read(HASHED))
            for number in range(SAMPLES):
                file.seek(max(0, (size - SAMPLE) * number // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]


def _cache() -> Path:
    """A folder that only its owner can write to. PermissionError if others can."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "baton" / "gguf"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by other users")
    return folder
