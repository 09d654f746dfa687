"""Byte-level BPE: token bytes and their ranks, as tiktoken stores them, become a tokenizer.json.

tiktoken merges the neighbours whose joint bytes have the lowest rank. tokenizer.json lists pairs to
merge, so every split of a token into two others is listed, in the order of the tokens' ranks.
"""

from collections.abc import Mapping
from pathlib import Path

from baton.checkpoints.tokenizer_json import (
    LONGEST_TOKEN,
    Vocabulary,
    added_token,
    around,
    bpe,
    byte_letters,
    cuts,
    tokenizer_json,
)
from baton.errors import ModelError


def byte_level(
    ranks: Mapping[bytes, int],
    special: Mapping[str, int],
    pattern: str,
    bos: str,
    source: Path,
) -> Vocabulary:
    """The tokenizer of these tokens. `pattern` splits text into words; a text begins with `bos`."""
    used = sorted([*ranks.values(), *special.values()])
    if used != list(range(len(used))):
        raise ModelError(f"{source}: token ids must run from 0 without a gap, each used once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{source} has no token for the byte {missing[0]:#04x}")
    if max(map(len, ranks)) > LONGEST_TOKEN:
        raise ModelError(f"{source} has a token of more than {LONGEST_TOKEN} bytes")
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    in_order = sorted(ranks, key=ranks.__getitem__)
    merges = [
        [spelled[left], spelled[right]] for token in in_order for left, right in cuts(token, ranks)
    ]
    words = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return Vocabulary(
        tokenizer_json(
            added=[added_token(text, number) for text, number in special.items()],
            steps={
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [words, level | {"use_regex": False}],
                },
                "decoder": level | {"use_regex": True},
            },
            post_processor=around({bos: special[bos]}, {}),
            model=bpe(
                {spelled[token]: ranks[token] for token in in_order},
                merges,
                ignore_merges=True,  # a whole word that is a token needs no merging
            ),
        ),
        source,
    )
