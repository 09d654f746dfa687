"""Paged attention in Triton: two kernels that read the KV pool in place, through the block table.

`attend` computes one *tile*: a few query tokens of one row with all query heads that share one KV head.
They are the M rows of a matrix, so each key is read once for all of them:

    M rows of a tile     token 0: heads 0 1 2    token 1: heads 0 1 2    padding, never stored
    keys of the row      0 ........ | SPLIT ........ | 2 * SPLIT ...     splits, visited in steps of N

A decode step has too few tiles to fill a GPU. So each split of a row's keys has a program of its own,
which stores an unfinished softmax: the largest score, the sum, and the weighted values. `reduce` joins
them. SPLIT = 0: one program visits all keys of its tile and finishes (prefill).

Splits and steps begin at fixed positions of the sequence. A wider block table, which another row may
need, adds programs that see no key, and these change no bit of a row's result.

Scores are in base 2 (multiplied by log2 e), because exp2 is one instruction. Keys past the context of a
row are not loaded: unwritten memory may hold NaN.

    GROUP     query heads that share a KV head       M        rows of a tile's matrix, a power of two
    TOKENS    query tokens of a tile                 N        keys of a step, a power of two
    DK, DV    numbers of a key, of a value           KP, VP   the same, padded to a power of two
    PAGE      tokens of a block of the pool          HEADS_KV KV heads
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # what kernels read from a module must be constexpr


@triton.jit
def place_of(tile, tiles, offsets, per_row, LISTED: tl.constexpr, TOKENS: tl.constexpr):
    """The row of a tile, the tile's first token in the row, the row's first query among all, and how many
    it has. The tiles are listed in `tiles`, i32 [tiles, 2], or each row has `per_row`."""
    if LISTED:
        row = tl.load(tiles + 2 * tile)
        begin = tl.load(tiles + 2 * tile + 1)
    else:
        row = tile // per_row
        begin = tile % per_row * TOKENS
    first = tl.load(offsets + row).to(tl.int32)
    count = tl.load(offsets + row + 1).to(tl.int32) - first
    return row, begin, first, count


@triton.jit
def extent_of(start, begin, context, window, split,
              WINDOWED: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The keys low to high - 1 that some query of the tile sees in this split. `start`: position of the
    row's first query. Splits are counted from the one with the first key that the tile sees."""
    low = 0
    high = tl.minimum(start + begin + TOKENS, context)
    if WINDOWED:
        low = tl.maximum(start + begin - window + 1, 0)
    if SPLIT:
        edge = (low // SPLIT + split) * SPLIT
        low = tl.maximum(low, edge)
        high = tl.minimum(high, edge + SPLIT)
    return low, high


@triton.jit
def share_of(peak, total, sinks, head, real, SINKS: tl.constexpr):
    """What the weighted values are multiplied by at the end. A sink is one more score without value."""
    if SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(peak, sink)
        kept = tl.exp2(peak - top)
        share = kept / (total * kept + tl.exp2(sink - top))
    else:
        share = 1.0 / tl.where(total > 0.0, total, 1.0)  # 0 in padding only
    return share


@triton.jit
def visit(query, keys, values, table, kv_head, position, first, low, high,
          scale, softcap, window, peak, total, mixed,
          MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, HEADS_KV: tl.constexpr,
          DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
          PAGE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """One step of a tile: N keys from position `first`. Returns the new peak, total and mixed. MASKED:
    False if every query sees all N keys."""
    key = first + tl.arange(0, N)
    there = (key >= low) & (key < high)
    dk = tl.arange(0, KP)
    dv = tl.arange(0, VP)
    of_keys = (dk < DK)[None, :]
    of_values = (dv < DV)[None, :]
    if MASKED:
        of_keys = there[:, None] & of_keys
        of_values = there[:, None] & of_values
        block = tl.load(table + key // PAGE, mask=there, other=0)
    else:
        block = tl.load(table + key // PAGE)
    vector = (block.to(tl.int64) * PAGE + key % PAGE) * HEADS_KV + kv_head  # in the pool
    k = tl.load(keys + vector[:, None] * DK + dk[None, :], mask=of_keys, other=0.0)
    v = tl.load(values + vector[:, None] * DV + dv[None, :], mask=of_values, other=0.0)

    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale  # [M, N]
    if CAPPED:  # softcap * tanh(scores / softcap)
        power = tl.exp2(scores * (2.0 * LOG2E / softcap))
        scores = softcap - 2.0 * softcap / (power + 1.0)
    scores = scores * LOG2E
    if MASKED:
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))

    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen no key yet
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(peak - base)
    total = total * kept + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit(do_not_specialize=["window", "width", "first_tile", "per_row"])
def attend(
    output,  # [T, heads, DV]
    parts,  # f32 [tiles, HEADS_KV, splits, TOKENS * GROUP, DV]: values weighted by each split
    sums,  # f32 [tiles, HEADS_KV, splits, TOKENS * GROUP, 2]: its peak and total
    queries, keys, values,  # [T, heads, DK], [blocks, PAGE, HEADS_KV, DK], [blocks, PAGE, HEADS_KV, DV]
    tables, contexts, offsets,  # [rows, width], [rows], [rows + 1]
    tiles, sinks,  # see place_of; [heads]
    scale, softcap, window, width,
    first_tile,  # of this launch: `parts` and `sums` begin with it
    per_row,
    LISTED: tl.constexpr, DIRECT: tl.constexpr,  # DIRECT: one program sees all keys, and finishes
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One tile, KV head and split a program: grid [tiles, HEADS_KV, splits]."""
    place, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, begin, first_query, count = place_of(
        place + first_tile, tiles, offsets, per_row, LISTED, TOKENS
    )
    context = tl.load(contexts + row).to(tl.int32)
    start = context - count
    low, high = extent_of(start, begin, context, window, split, WINDOWED, TOKENS, SPLIT)
    m = tl.arange(0, M)
    token, head = begin + m // GROUP, kv_head * GROUP + m % GROUP
    real = (m < TOKENS * GROUP) & (token < count)
    position = start + token
    at = (first_query + token).to(tl.int64) * (HEADS_KV * GROUP) + head
    dk, dv = tl.arange(0, KP), tl.arange(0, VP)
    query = tl.load(
        queries + at[:, None] * DK + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0
    )
    table = tables + row.to(tl.int64) * width
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, VP], tl.float32)
    edge = low // N * N
    if SPLIT == 0 and not WINDOWED:  # the whole tile sees most keys of a long prompt
        edge = tl.minimum(start + begin + 1, context) // N * N
        for first in range(0, edge, N):
            peak, total, mixed = visit(
                query, keys, values, table, kv_head, position, first, low, high,
                scale, softcap, window, peak, total, mixed,
                False, CAPPED, WINDOWED, HEADS_KV, DK, DV, KP, VP, PAGE, N)  # fmt: skip
    for first in range(edge, high, N):
        peak, total, mixed = visit(
            query, keys, values, table, kv_head, position, first, low, high,
            scale, softcap, window, peak, total, mixed,
            True, CAPPED, WINDOWED, HEADS_KV, DK, DV, KP, VP, PAGE, N)  # fmt: skip
    stored = real[:, None] & (dv < DV)[None, :]
    if DIRECT:
        found = mixed * share_of(peak, total, sinks, head, real, SINKS)[:, None]
        found = found.to(output.dtype.element_ty)
        tl.store(output + at[:, None] * DV + dv[None, :], found, mask=stored)
    else:
        part = (place.to(tl.int64) * HEADS_KV + kv_head) * tl.num_programs(2) + split
        part = part * (TOKENS * GROUP) + m
        tl.store(sums + 2 * part, peak, mask=real)
        tl.store(sums + 2 * part + 1, total, mask=real)
        if low < high:  # `reduce` does not read the values of a split without keys
            tl.store(parts + part[:, None] * DV + dv[None, :], mixed, mask=stored)


@triton.jit(do_not_specialize=["splits", "first_tile", "per_row"])
def reduce(
    output, parts, sums, offsets, tiles, sinks,  # as for attend
    splits, first_tile, per_row,
    LISTED: tl.constexpr, SINKS: tl.constexpr,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    DV: tl.constexpr, VP: tl.constexpr,
    S: tl.constexpr,  # splits at a time
):  # fmt: skip
    """Joins the splits of one query token and head: grid [tiles * TOKENS, heads]."""
    place, of_tile, head = tl.program_id(0) // TOKENS, tl.program_id(0) % TOKENS, tl.program_id(1)
    _, begin, first_query, count = place_of(
        place + first_tile, tiles, offsets, per_row, LISTED, TOKENS
    )
    if begin + of_tile < count:
        m = of_tile * GROUP + head % GROUP
        first_part = (place.to(tl.int64) * HEADS_KV + head // GROUP) * splits
        s = tl.arange(0, S)
        dv = tl.arange(0, VP)
        peaks = tl.full([S], float("-inf"), tl.float32)
        for first in range(0, splits, S):
            part = (first_part + first + s) * (TOKENS * GROUP) + m
            found = tl.load(sums + 2 * part, mask=first + s < splits, other=float("-inf"))
            peaks = tl.maximum(peaks, found)
        top = tl.max(peaks, 0)
        totals = tl.zeros([S], tl.float32)
        mixed = tl.zeros([S, VP], tl.float32)
        for first in range(0, splits, S):
            part = (first_part + first + s) * (TOKENS * GROUP) + m
            peak = tl.load(sums + 2 * part, mask=first + s < splits, other=float("-inf"))
            seen = peak > float("-inf")  # a split may hold no key that this query sees
            kept = tl.exp2(peak - top)
            totals += kept * tl.load(sums + 2 * part + 1, mask=seen, other=0.0)
            stored = seen[:, None] & (dv < DV)[None, :]
            values = tl.load(parts + part[:, None] * DV + dv[None, :], mask=stored, other=0.0)
            mixed += kept[:, None] * values
        found = tl.sum(mixed, 0) * share_of(top, tl.sum(totals, 0), sinks, head, True, SINKS)
        at = (first_query + begin + of_tile).to(tl.int64) * (HEADS_KV * GROUP) + head
        tl.store(output + at * DV + dv, found.to(output.dtype.element_ty), mask=dv < DV)
