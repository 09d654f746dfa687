"""Block hashes: equal hash, equal tokens before and inside the block, hence equal KV.

    root   = sha256(salt, adapter)             requests share KV only with those of the same salt
                                               and adapter
    hash 1 = sha256(root,   tokens of block 1)
    hash 2 = sha256(hash 1, tokens of block 2)

A hash stands for the whole sequence up to its block's end, so one lookup per block finds the longest
cached prefix. Only full blocks have one. Hashes are 16 bytes, enough to make collisions infeasible.

Where the KV also depends on rope lengths (baton/rope.py), a block's hash covers those of its tokens,
unless all are 0.
"""

import hashlib
from array import array
from collections.abc import Sequence

HASH_BYTES = 16


def root(salt: str = "", adapter: str = "") -> bytes:
    """The hash before the first block. `adapter`: the digest of the one that computes the KV."""
    own = hashlib.sha256(b"baton" + salt.encode()).digest()[:HASH_BYTES]
    return hashlib.sha256(own + adapter.encode()).digest()[:HASH_BYTES] if adapter else own


def extended(
    block_hashes: Sequence[bytes],
    token_ids: Sequence[int],
    block_size: int,
    rope_lengths: Sequence[int] = (),
) -> tuple[bytes, ...]:
    """`block_hashes` (the root first), extended to every full block of the tokens. `rope_lengths`: the
    effective ones of all tokens; empty: they make no difference."""
    hashes = list(block_hashes)
    first = (len(hashes) - 1) * block_size
    for start in range(first, len(token_ids) - block_size + 1, block_size):
        block = array("q", token_ids[start : start + block_size]).tobytes()
        if any(lengths := rope_lengths[start : start + block_size]):
            block += array("q", lengths).tobytes()
        hashes.append(hashlib.sha256(hashes[-1] + block).digest()[:HASH_BYTES])
    return tuple(hashes)
