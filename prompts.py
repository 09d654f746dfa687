"""The sample prompts, for you to edit, and the reader of prompt files.

`python main.py` continues the prompts of PROMPTS; `--prompts FILE` takes a file instead: text, one
prompt a line, or .jsonl, one {"prompt": "..."} or bare "..." a line.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from baton.errors import InputError

# One string a line, each with a comma behind it (Python joins two strings that have none between).
PROMPTS = [
    "In the future, artificial intelligence will",
    "Scientists have discovered a new way to",
    "On a distant planet, aliens are",
    "One of the greatest inventions in human history is",
    "In a peaceful village, the residents daily",
    "In a mysterious forest, explorers found",
    "In a bustling city, people are",
    "In an ancient castle, there is a hidden",
]

BOM = b"\xef\xbb\xbf"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in its order. Blank lines are skipped, a UTF-8 byte order mark too.

    A prompt of a text file is its line exactly, spaces included. Of a .jsonl object only "prompt"
    is read. Raises InputError naming the file, the line and the way out.
    """
    if path.suffix.lower() == ".json":
        raise InputError(
            f"{path}: a .json file is one document; write one prompt a line and name it .jsonl"
        )
    text = _decoded(path, _bytes_of(path))
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    filled = [(number, line) for number, line in lines if line.strip()]
    if not filled:
        raise InputError(f"{path} holds no prompt: write one a line")
    if path.suffix.lower() == ".jsonl":
        return [_prompt_of(line, f"{path}, line {number}") for number, line in filled]
    return [line for _, line in filled]


def check_prompts(prompts: Sequence[object]) -> list[str]:
    """PROMPTS as it stands after editing: a list of strings with something in them."""
    if not isinstance(prompts, list | tuple) or not prompts:
        raise InputError('prompts.py: PROMPTS must be a list of strings, such as ["Once upon a"]')
    return [_checked(each, f"prompts.py, prompt {n}") for n, each in enumerate(prompts, 1)]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"there is no prompt file {path}; leave --prompts out for the samples in prompts.py"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; --prompts takes one file") from None
    except OSError as error:
        raise InputError(f"cannot read the prompt file {path}: {error.strerror}") from error


def _decoded(path: Path, data: bytes) -> str:
    skipped = len(BOM) if data.startswith(BOM) else 0
    try:
        return data[skipped:].decode()
    except UnicodeDecodeError as error:
        at = skipped + error.start
        line = data.count(b"\n", 0, at) + 1
        raise InputError(
            f"{path}, line {line}: byte {at} (0x{data[at]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise InputError(
            f'{where} is not JSON ({why}); a line is {{"prompt": "..."}} or a string in quotes'
        ) from None
    if isinstance(value, dict):
        if "prompt" not in value:
            found = ", ".join(list(value)[:5]) or "nothing"
            raise InputError(f'{where} has no "prompt" (it has {found[:80]})')
        value = value["prompt"]
    return _checked(value, where)


def _checked(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: a prompt must be a string, got {type(value).__name__}")
    if not value:
        raise InputError(f"{where}: the prompt is empty; it needs at least one character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} of the prompt is half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}); no text has it alone"
        ) from None
    return value
