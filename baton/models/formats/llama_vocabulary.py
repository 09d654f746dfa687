"""LLaMA's tokenizer.model, of either kind: SentencePiece up to LLaMA 2, tiktoken's list from LLaMA 3.

tiktoken's list has a line for each token: its bytes in base64, and its rank. No file lists the special
tokens: they take the rest of the model's token ids, under the names that Meta published.
"""

import base64
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from baton.checkpoints.sentencepiece import sentencepiece
from baton.checkpoints.tokenizer_json import Vocabulary
from baton.errors import ModelError
from baton.models.formats.bytelevel import byte_level
from baton.models.formats.checkpoint import given_vocabulary

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}\r?")
LARGEST_FILE = 256 << 20
PATTERN = (  # how LLaMA 3 splits text into words; the order of alternatives matters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
BOS, EOS, EOM, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
RESERVED = "<|reserved_special_token_{}|>"
NAMES_3 = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: EOT}
NAMES_3_1 = NAMES_3 | {4: "<|finetune_right_pad_id|>", 8: EOM, 10: "<|python_tag|>"}
BEGINNINGS = (BOS, "<s>")
ENDS = (EOS, EOM, EOT, "</s>")


@dataclass(frozen=True, slots=True)
class LlamaVocabulary:
    """The tokenizer, and the special tokens that generation needs."""

    vocabulary: Vocabulary
    tiktoken: bool
    bos: str  # begins a text
    ends: tuple[str, ...]  # end an answer
    notes: tuple[str, ...]


def read_vocabulary(
    folder: Path, given: Path | None, rows: int, *, new_names: bool
) -> LlamaVocabulary:
    """From `given`, the folder's tokenizer.model, or the one above it. `rows`: how many token ids the
    model has. `new_names`: special tokens have the names of LLaMA 3.1."""
    places = [folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"]
    path = given or next((each for each in places if each.is_file()), None)
    if path is None:
        raise ModelError(
            f"there is no tokenizer.model in {folder} or in the folder above it: name it, or a "
            "tokenizer.json, with --tokenizer FILE"
        )
    notes = [] if path.parent == folder else [f"the tokenizer was read from {path}"]
    first = _first_line(path)
    tiktoken = path.suffix != ".json" and LINE.fullmatch(first) is not None
    if path.suffix == ".json":
        vocabulary = given_vocabulary(path)
    elif tiktoken:
        vocabulary = _from_list(path, rows, NAMES_3_1 if new_names else NAMES_3)
    else:
        vocabulary = sentencepiece(path)
    if vocabulary.size > rows:
        raise ModelError(
            f"{path} has {vocabulary.size:,} tokens and the model {rows:,}: it is another model's"
        )
    if vocabulary.size < rows:
        notes.append(f"note: {rows - vocabulary.size:,} of the model's token ids have no text")
    special = vocabulary.special_ids()
    bos = next((text for text in BEGINNINGS if text in special), None)
    ends = tuple(text for text in ENDS if text in special)
    if bos is None or not ends:
        raise ModelError(f"{path} has none of LLaMA's special tokens {BOS}, {EOS}, <s> and </s>")
    return LlamaVocabulary(vocabulary, tiktoken, bos, ends, tuple(notes))


def _first_line(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ModelError(
                f"{path} is larger than {LARGEST_FILE >> 20} MiB: it is not a tokenizer"
            )
        with path.open("rb") as file:
            return file.readline(65536).removesuffix(b"\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def _from_list(path: Path, rows: int, names: dict[int, str]) -> Vocabulary:
    ranks: dict[bytes, int] = {}
    for at, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            if LINE.fullmatch(line) is None:
                raise ValueError
            spelled = base64.b64decode(token, validate=True)
        except ValueError:
            raise ModelError(f"{path}, line {at}: must be a token in base64 and its rank") from None
        if spelled in ranks:
            raise ModelError(f"{path}, line {at}: the token occurs twice")
        ranks[spelled] = int(rank)
    room = rows - len(ranks)
    if room <= max(names):
        raise ModelError(
            f"{path} has {len(ranks):,} tokens and the model {rows:,}: no room for the special "
            "ones, it is another model's"
        )
    reserved = count()
    special = {
        names.get(at) or RESERVED.format(next(reserved)): len(ranks) + at for at in range(room)
    }
    return byte_level(ranks, special, PATTERN, BOS, path)
