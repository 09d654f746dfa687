"""Attention in torch: gather a sequence's keys and values from the pool, then attend to them.

The reference for the kernels in engine/cpu and engine/cuda, and the fallback if none of them applies.
Rows of several tokens are computed one by one, which is cheaper than padding for mixed lengths. Rows
of one token are computed together, in groups of similar length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from baton.engine.attention import AttentionParams
from baton.engine.batch import Batch
from baton.engine.narrow import head_dim, widened
from baton.engine.pool import Pool
from sampler.copies import up

CPU_KEYS, GPU_KEYS = 1024, 2**16  # per group: on a CPU they should stay in its cache


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with one query length, computed in one call over keys that are padded to one length."""

    rows: int
    tokens: torch.Tensor  # i64 [rows * queries]: which of the T packed tokens are its queries
    slots: torch.Tensor  # i64 [rows * keys]: where its keys are, padded with the row's first
    mask: torch.Tensor | None  # bool [rows, 1, queries, keys]; None: all keys, or causal
    causal: bool  # the last query attends to all keys, each one before it to one fewer


PlanGroups = Callable[[Batch[torch.Tensor], int, int | None], list[Group]]
"""Batch, block size and window to groups."""


class GatherAttention:
    """The kernel of one forward. Groups are planned once for all layers with the same window."""

    def __init__(
        self, batch: Batch[torch.Tensor], block_size: int, plan: PlanGroups | None = None
    ) -> None:
        self.batch = batch
        self.block_size = block_size
        self.plan = plan or plan_groups
        self.plans: dict[int | None, list[Group]] = {}

    def __call__(
        self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
    ) -> torch.Tensor:
        if params.window not in self.plans:
            self.plans[params.window] = self.plan(self.batch, self.block_size, params.window)
        keys, values = pool.keys[layer].flatten(0, 1), pool.values[layer].flatten(0, 1)
        output = query.new_empty(*query.shape[:2], head_dim(values))  # [T, H, Dv]
        for group in self.plans[params.window]:
            q = _take(query, group.tokens, group.rows)
            k, v = (_take(each, group.slots, group.rows) for each in (keys, values))
            if k.dtype == torch.int8:
                k, v = widened(k, query.dtype), widened(v, query.dtype)
            attend = sdpa if params.softcap is None and params.sinks is None else spelled_out
            mixed = attend(q, k, v, group, params)  # [rows, H, queries, Dv]
            output.index_copy_(0, group.tokens, mixed.transpose(1, 2).flatten(0, 1))
        return output


def plan_groups(batch: Batch[torch.Tensor], block_size: int, window: int | None) -> list[Group]:
    """Each row of several tokens is a group of its own. Rows of one token share a group up to a budget of
    keys, with lengths so similar that padding at most doubles the work."""
    lengths = list(enumerate(batch.lengths))
    groups = [[row] for row, length in lengths if length > 1]
    budget = CPU_KEYS if batch.slots.device.type == "cpu" else GPU_KEYS
    room = shortest = 0
    for keys, row in sorted((batch.starts[row] + 1, row) for row, length in lengths if length == 1):
        keys = min(keys, window or keys)
        if room < keys or keys > 2 * shortest:
            groups.append([])
            room, shortest = budget, keys
        groups[-1].append(row)
        room -= keys
    return [_group(batch, rows, block_size, window) for rows in groups]


def _group(
    batch: Batch[torch.Tensor], rows: Sequence[int], block_size: int, window: int | None
) -> Group:
    device = batch.slots.device
    length = batch.lengths[rows[0]]
    starts = [batch.starts[row] for row in rows]
    firsts = [0 if window is None else max(0, start - window + 1) for start in starts]
    keys = max(start + length - first for start, first in zip(starts, firsts, strict=True))
    host = up(torch.tensor([list(rows), starts, firsts]), device)
    row, start, first = host[:, :, None]  # [rows, 1] each

    offset = batch.query_offsets[row].long()
    tokens = (offset + torch.arange(length, device=device)).flatten()
    position = first + torch.arange(keys, device=device)  # of each key, [rows, keys]
    inside = torch.where(position < start + length, position, first)
    block = batch.block_table[row, inside // block_size].long()
    slots = (block * block_size + inside % block_size).flatten()

    causal = len(rows) == 1 and length > 1 and keys <= (window or keys)
    if device.type == "cpu":  # a mask made once is faster there than one for each layer
        causal = causal and starts[0] == 0
    if causal or (len(rows) == 1 and length == 1):
        return Group(len(rows), tokens, slots, None, causal)
    query = (start + torch.arange(length, device=device))[:, None, :, None]
    key = position[:, None, None, :]
    mask = key <= query if window is None else (key <= query) & (key > query - window)
    return Group(len(rows), tokens, slots, mask, False)


def _take(flat: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """[N, heads, D] -> [rows, heads, len(index) / rows, D]."""
    return flat.index_select(0, index).unflatten(0, (rows, -1)).transpose(1, 2)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, params: AttentionParams
) -> torch.Tensor:
    """q [R, H, Q, Dk], k [R, KVH, N, Dk], v [R, KVH, N, Dv] -> [R, H, Q, Dv]."""
    kv_heads, queries = k.shape[1], q.shape[2]
    if queries == 1:  # heads that share keys become queries of one head, so no key is repeated
        q = q.unflatten(1, (kv_heads, -1)).squeeze(3)
    grouped = q.shape[1] != kv_heads
    mask, square = group.mask, group.causal and queries == k.shape[2]
    if group.causal and not square:
        mask = lower_right(q, k, v, grouped=grouped)
    mixed = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=square, scale=params.scaling, enable_gqa=grouped
    )
    return mixed.flatten(1, 2)[:, :, None] if queries == 1 else mixed


def lower_right(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, grouped: bool
) -> torch.Tensor:
    """The mask of a chunk behind what is in the pool. Only in torch's own form does it reach flash
    attention; with a mask of booleans scores are written to memory, for 2,048 x 8,192 a hundred times as
    many bytes. That form warns where flash attention does not apply, so it is asked first."""
    queries, keys = q.shape[2], k.shape[2]
    if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped)):
        from torch.nn.attention.bias import causal_lower_right  # loads torch's compiler: seconds

        return causal_lower_right(queries, keys)
    return triangle(queries, keys, q.device)


def triangle(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]: the last query sees all keys, each one before it one fewer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def spelled_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, params: AttentionParams
) -> torch.Tensor:
    """As sdpa, with capped scores and sinks, which torch's function lacks. Softmax in fp32."""
    rows, _, queries, _ = q.shape
    q = q.unflatten(1, (k.shape[1], -1))  # [R, KVH, G, Q, Dk]
    scores = (q @ k[:, :, None].transpose(-1, -2)) * params.scaling  # [R, KVH, G, Q, N]
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    mask = group.mask
    if group.causal:
        mask = triangle(queries, k.shape[2], q.device)[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    scores = scores.float()
    if params.sinks is not None:
        sinks = params.sinks.float().view(1, *q.shape[1:3], 1, 1)
        scores = torch.cat([scores, sinks.expand(rows, -1, -1, queries, -1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
