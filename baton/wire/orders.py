"""Orders that cannot be carried out, whoever sent them: why, or an empty text."""

import logging
from collections.abc import Collection

from baton.adapters.identity import not_held
from baton.wire.messages import Fill, Hello, Start
from baton.wire.node import Effect
from baton.wire.rare_line import RareLine

logger = logging.getLogger(__name__)


class Ignored:
    """Orders that change nothing, with one log line a second at most."""

    def __init__(self) -> None:
        self._line = RareLine()

    def note(self, run: str, why: str, now: float) -> list[Effect]:
        """No effects."""
        if (more := self._line.more(now)) is not None:
            logger.warning("%s: an order of the router is ignored: %s%s", run, why, more)
        return []


def unfit_start(order: Start, hello: Hello, vocabulary: int, held: Collection[str]) -> str:
    """For a decode worker that introduced itself so and holds these adapters."""
    ids, length = order.token_ids, len(order.token_ids)
    if not 1 <= order.prompt_tokens <= length:
        return f"Start with {order.prompt_tokens} prompt tokens among {length}"
    if max(ids) >= vocabulary:
        return f"Start with token id {max(ids)}, the vocabulary has {vocabulary}"
    most = hello.blocks * hello.block_size
    if length > most:
        return f"Start with {length} tokens, the pool holds {most}"
    return not_held(order.params.adapter, held)


def unfit_fill(
    order: Fill,
    hello: Hello,
    vocabulary: int,
    held: Collection[str],
    *,
    pool: tuple[str, int],
) -> str:
    """For a prefill worker. `pool`: epoch and blocks of the one that its link leads to."""
    epoch, blocks = pool
    grant, ids, size = order.grant, order.token_ids, hello.block_size
    if epoch != grant.epoch:
        return f"the grant is of epoch {grant.epoch}, the link of {epoch}"
    if not len(grant.prefix) * size < len(ids) <= len(grant.table) * size:
        return f"{len(ids)} tokens do not fit {len(grant.table)} blocks"
    if max(grant.table) >= blocks:
        return f"block {max(grant.table)} of a pool of {blocks}"
    if max(ids) >= vocabulary:
        return f"token id {max(ids)}, the vocabulary has {vocabulary}"
    if len(order.block_hashes) * size > len(ids):
        return f"{len(order.block_hashes)} block hashes for {len(ids)} tokens"
    return not_held(order.adapter, held)
