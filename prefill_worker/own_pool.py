"""The prefill worker's own KV pool: how large it is, and what of it may be kept."""

from baton.engine.boot import Engine
from baton.engine.device import free_memory
from baton.engine.pool import Pool
from prefill_worker.scratch import Scratch, most_kept


def own_pool(engine: Engine, tokens: int, cache_bytes: int | None) -> tuple[Pool, Scratch]:
    """For so many tokens at once. `cache_bytes`: of kept prefixes, beside the room for these tokens;
    None: within that room, as much as most_kept() says. Raises OutOfMemory."""
    layout, memory = engine.layout, engine.pools.memory
    blocks, each = layout.blocks_for(tokens), layout.block_bytes
    if cache_bytes is None:
        kept = most_kept(blocks, each, free_memory(memory), reserved=memory.type != "cpu")
    else:
        kept = cache_bytes // each
        blocks += kept
    return engine.pools.own(blocks), Scratch(blocks, kept)


def keep_finite(pool: Pool, scratch: Scratch, run: str) -> None:
    """Keep the run's full blocks, unless they hold NaN or infinite numbers: the decode worker ends such a
    request, and the next one with this prefix must not get them."""
    if pool.finite(scratch.computed(run)):
        scratch.keep(run)
