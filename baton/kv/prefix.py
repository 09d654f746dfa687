"""Names of KV blocks by what is in them: equal names, equal tokens before and inside, equal KV.

    root   = sha256(salt)                      who may share with whom: one salt, one circle
    name 1 = sha256(root,   tokens of block 1)
    name 2 = sha256(name 1, tokens of block 2)

A name stands for the whole sequence up to its block's end, so one lookup per block finds the longest
stretch that is there already. Only full blocks have names. The first 16 bytes of a digest are enough:
nobody finds two sequences of one name on purpose or by chance.
"""

import hashlib
from array import array
from collections.abc import Sequence

NAME_BYTES = 16


def root(salt: str = "") -> bytes:
    """The name before the first block."""
    return hashlib.sha256(b"baton" + salt.encode()).digest()[:NAME_BYTES]


def extended(
    chain: Sequence[bytes], token_ids: Sequence[int], block_size: int
) -> tuple[bytes, ...]:
    """The chain (its root first) with a name for every full block of the tokens. What it holds
    already is taken as it is."""
    names = list(chain)
    for start in range((len(names) - 1) * block_size, len(token_ids) - block_size + 1, block_size):
        block = array("q", token_ids[start : start + block_size]).tobytes()
        names.append(hashlib.sha256(names[-1] + block).digest()[:NAME_BYTES])
    return tuple(names)
