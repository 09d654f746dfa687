"""Byte-level BPE: token bytes and their ranks, as tiktoken stores them, become a tokenizer.json.

tiktoken merges the neighbours whose joint bytes have the lowest rank. tokenizer.json lists pairs to
merge, so every split of a token into two others is listed, in the order of the tokens' ranks.
"""

from collections.abc import Mapping
from pathlib import Path

from baton.checkpoints.tokenizer_json import Vocabulary, added_token, cuts, tokenizer_json
from baton.errors import ModelError

LONGEST_TOKEN = 4096  # bytes; a cut at each is tried


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
            vocab={spelled[token]: ranks[token] for token in in_order},
            merges=merges,
            added=[added_token(text, number) for text, number in special.items()],
            first=(bos, special[bos]),
            steps={
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [words, level | {"use_regex": False}],
                },
                "decoder": level | {"use_regex": True},
            },
            model={"ignore_merges": True},  # a whole word that is a token needs no merging
        ),
        source,
    )


def byte_letters() -> dict[int, str]:
    """A visible letter for each byte: Latin-1's own where it has one, else one from 256 upwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }
