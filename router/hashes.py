"""The hashes by which a request finds its KV in a prefix cache."""

from baton.kv.prefix import extended, root
from baton.rope import RopeRule
from router.ledger import Entry


def prefix_hashes(entry: Entry, block_size: int, rope: RopeRule) -> tuple[bytes, ...]:
    """The root and the hashes of the blocks that are full before the last known token, which decode will
    run. Empty if prompt logprobs or an embedding are wanted: then the whole prompt must be computed."""
    if entry.to_be_scored or entry.pooling:
        return ()
    if entry.hashed != (entry.length - 1, block_size):  # else cached
        ids = entry.token_ids[:-1]
        floor = rope.floor(len(entry.prompt_ids), entry.length)
        lengths = rope.lengths(floor, 0, len(ids))
        begin = root(entry.params.cache_salt, entry.params.adapter)
        entry.block_hashes = extended([begin], ids, block_size, lengths)
        entry.hashed = (len(ids), block_size)
    return entry.block_hashes
