"""Orders that cannot be carried out, whoever sent them: why, or an empty text. Pure."""

from baton.wire.messages import Fill, Hello, Start


def unfit_start(order: Start, hello: Hello, vocabulary: int) -> str:
    """For a decode worker that introduced itself so."""
    ids, length = order.token_ids, len(order.token_ids)
    if not 1 <= order.prompt_tokens <= length:
        return f"Start with {order.prompt_tokens} prompt tokens among {length}"
    if max(ids) >= vocabulary:
        return f"Start with token id {max(ids)}, the vocabulary has {vocabulary}"
    most = hello.blocks * hello.block_size
    return f"Start with {length} tokens, the pool holds {most}" if length > most else ""


def unfit_fill(order: Fill, hello: Hello, vocabulary: int, *, epoch: str, blocks: int) -> str:
    """For a prefill worker. `epoch` and `blocks` are those of the pool that its link leads to."""
    grant, ids, size = order.grant, order.token_ids, hello.block_size
    if epoch != grant.epoch:
        return f"the grant is of epoch {grant.epoch}, the link of {epoch}"
    if not len(grant.prefix) * size < len(ids) <= len(grant.table) * size:
        return f"{len(ids)} tokens do not fit {len(grant.table)} blocks"
    if max(grant.table) >= blocks:
        return f"block {max(grant.table)} of a pool of {blocks}"
    if max(ids) >= vocabulary:
        return f"token id {max(ids)}, the vocabulary has {vocabulary}"
    return ""
