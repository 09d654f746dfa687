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

Scores are in base 2 (multiplied by log2 e), because exp2 is one instruction. Keys past the context of a row
are not loaded: unwritten memory may hold NaN.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # module constants that kernels read must be constexpr


@triton.jit
def place_of(tile, tiles, per_row, LISTED: tl.constexpr, TOKENS: tl.constexpr):
    """A tile's row, and its first token within the row."""
    if LISTED:
        row = tl.load(tiles + 2 * tile)
        begin = tl.load(tiles + 2 * tile + 1)
    else:
        row = tile // per_row
        begin = tile % per_row * TOKENS
    return row, begin


@triton.jit
def share_of(peak, total, sinks, head, real, SINKS: tl.constexpr):
    """What the weighted values are multiplied by at the end. A sink is a further score without a value."""
    if SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(peak, sink)
        kept = tl.exp2(peak - top)
        share = kept / (total * kept + tl.exp2(sink - top))
    else:
        share = 1.0 / tl.where(total > 0.0, total, 1.0)  # 0 in padding only
    return share


@triton.jit
def visit(
    query,
    keys,
    values,
    table,  # of the tile's row
    kv_head,
    position,
    first,
    low,
    high,
    scale,
    softcap,
    window,
    peak,
    total,
    mixed,
    MASKED: tl.constexpr,  # False: every query sees all N keys
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
):
    """One step of a tile: N keys from position `first`. Returns the new peak, total and mixed."""
    key = first + tl.arange(0, N)
    there = (key >= low) & (key < high)
    dk = tl.arange(0, DK_PADDED)
    dv = tl.arange(0, DV_PADDED)
    if MASKED:
        block = tl.load(table + key // PAGE, mask=there, other=0)
    else:
        block = tl.load(table + key // PAGE)
    vector = (block.to(tl.int64) * PAGE + key % PAGE) * KV_HEADS + kv_head  # of this head, in the pool
    key_places = keys + vector[:, None] * DK + dk[None, :]
    value_places = values + vector[:, None] * DV + dv[None, :]
    if MASKED:
        k = tl.load(key_places, mask=there[:, None] & (dk < DK)[None, :], other=0.0)
        v = tl.load(value_places, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
    else:
        k = tl.load(key_places, mask=(dk < DK)[None, :], other=0.0)
        v = tl.load(value_places, mask=(dv < DV)[None, :], other=0.0)

    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale  # [M, N]
    if CAPPED:  # softcap * tanh(scores / softcap)
        scores = softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0)
    scores = scores * LOG2E
    if MASKED:
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))

    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(peak - base)
    total = total * kept + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit(do_not_specialize=["width", "window", "first_tile", "per_row"])
def attend(
    output,  # [T, heads, DV]
    parts,  # f32 [tiles, KV_HEADS, splits, TOKENS * GROUP, DV]: values weighted by each split
    sums,  # f32 [tiles, KV_HEADS, splits, TOKENS * GROUP, 2]: its peak and total
    queries,  # [T, heads, DK]
    keys,  # [blocks, PAGE, KV_HEADS, DK]
    values,  # [blocks, PAGE, KV_HEADS, DV]
    tables,  # [rows, width]
    contexts,  # [rows]
    offsets,  # [rows + 1]
    tiles,  # i32 [tiles, 2]: row and first token, if LISTED
    sinks,  # [heads], if SINKS
    scale,
    softcap,
    window,
    width,
    first_tile,  # of this launch: `parts` and `sums` begin with it
    per_row,  # tiles of each row, if not LISTED
    LISTED: tl.constexpr,
    DIRECT: tl.constexpr,  # one program sees all keys of its tile: finish here
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a KV head
    TOKENS: tl.constexpr,  # of a tile
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One tile, KV head and split a program: grid [tiles, KV_HEADS, splits]."""
    place, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, begin = place_of(place + first_tile, tiles, per_row, LISTED, TOKENS)
    first_query = tl.load(offsets + row).to(tl.int32)
    count = tl.load(offsets + row + 1).to(tl.int32) - first_query
    context = tl.load(contexts + row).to(tl.int32)

    m = tl.arange(0, M)
    token = begin + m // GROUP
    head = kv_head * GROUP + m % GROUP
    real = (m < TOKENS * GROUP) & (token < count)
    position = context - count + token

    low = 0  # keys from low to high - 1
    high = tl.minimum(context - count + begin + TOKENS, context)
    if WINDOWED:
        low = tl.maximum(context - count + begin - window + 1, 0)
    if SPLIT:
        start = (low // SPLIT + split) * SPLIT
        low = tl.maximum(low, start)
        high = tl.minimum(high, start + SPLIT)

    dk = tl.arange(0, DK_PADDED)
    dv = tl.arange(0, DV_PADDED)
    at = (first_query + token).to(tl.int64)
    query = tl.load(
        queries + ((at * KV_HEADS * GROUP + head) * DK)[:, None] + dk[None, :],
        mask=real[:, None] & (dk < DK)[None, :],
        other=0.0,
    )
    table = tables + row.to(tl.int64) * width
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DV_PADDED], tl.float32)
    from_step = low // N * N
    if SPLIT == 0 and not WINDOWED:  # most keys of a long prompt are seen by the whole tile
        from_step = tl.minimum(context - count + begin + 1, context) // N * N
        for first in range(0, from_step, N):
            peak, total, mixed = visit(
                query,
                keys,
                values,
                table,
                kv_head,
                position,
                first,
                low,
                high,
                scale,
                softcap,
                window,
                peak,
                total,
                mixed,
                False,
                CAPPED,
                WINDOWED,
                KV_HEADS,
                DK,
                DV,
                DK_PADDED,
                DV_PADDED,
                PAGE,
                N,
            )
    for first in range(from_step, high, N):
        peak, total, mixed = visit(
            query,
            keys,
            values,
            table,
            kv_head,
            position,
            first,
            low,
            high,
            scale,
            softcap,
            window,
            peak,
            total,
            mixed,
            True,
            CAPPED,
            WINDOWED,
            KV_HEADS,
            DK,
            DV,
            DK_PADDED,
            DV_PADDED,
            PAGE,
            N,
        )

    if DIRECT:
        found = mixed * share_of(peak, total, sinks, head, real, SINKS)[:, None]
        tl.store(
            output + ((at * KV_HEADS * GROUP + head) * DV)[:, None] + dv[None, :],
            found.to(output.dtype.element_ty),
            mask=real[:, None] & (dv < DV)[None, :],
        )
    else:
        splits = tl.num_programs(2)
        part = ((place.to(tl.int64) * KV_HEADS + kv_head) * splits + split) * (TOKENS * GROUP) + m
        tl.store(sums + 2 * part, peak, mask=real)
        tl.store(sums + 2 * part + 1, total, mask=real)
        if low < high:  # `reduce` does not read the values of a split without keys
            tl.store(
                parts + part[:, None] * DV + dv[None, :],
                mixed,
                mask=real[:, None] & (dv < DV)[None, :],
            )


@triton.jit(do_not_specialize=["splits", "first_tile", "per_row"])
def reduce(
    output,  # as for attend
    parts,
    sums,
    offsets,
    tiles,
    sinks,
    splits,
    first_tile,
    per_row,
    LISTED: tl.constexpr,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    S: tl.constexpr,  # splits at a time
):
    """Joins the splits of one query token and head: grid [tiles * TOKENS, heads]."""
    place = tl.program_id(0) // TOKENS
    head = tl.program_id(1)
    row, begin = place_of(place + first_tile, tiles, per_row, LISTED, TOKENS)
    first_query = tl.load(offsets + row).to(tl.int32)
    count = tl.load(offsets + row + 1).to(tl.int32) - first_query
    token = begin + tl.program_id(0) % TOKENS
    if token < count:
        m = tl.program_id(0) % TOKENS * GROUP + head % GROUP
        first_part = (place.to(tl.int64) * KV_HEADS + head // GROUP) * splits
        s = tl.arange(0, S)
        dv = tl.arange(0, DV_PADDED)
        peak = tl.full([S], float("-inf"), tl.float32)
        for first in range(0, splits, S):
            part = (first_part + first + s) * (TOKENS * GROUP) + m
            found = tl.load(sums + 2 * part, mask=first + s < splits, other=float("-inf"))
            peak = tl.maximum(peak, found)
        top = tl.max(peak, 0)
        totals = tl.zeros([S], tl.float32)
        mixed = tl.zeros([S, DV_PADDED], tl.float32)
        for first in range(0, splits, S):
            part = (first_part + first + s) * (TOKENS * GROUP) + m
            peak = tl.load(sums + 2 * part, mask=first + s < splits, other=float("-inf"))
            seen = peak > float("-inf")
            kept = tl.exp2(peak - top)
            totals += kept * tl.load(sums + 2 * part + 1, mask=seen, other=0.0)
            values = tl.load(
                parts + part[:, None] * DV + dv[None, :],
                mask=seen[:, None] & (dv < DV)[None, :],
                other=0.0,
            )
            mixed += kept[:, None] * values
        share = share_of(top, tl.sum(totals, 0), sinks, head, True, SINKS)
        at = (first_query + token).to(tl.int64)
        tl.store(
            output + (at * KV_HEADS * GROUP + head) * DV + dv,
            (tl.sum(mixed, 0) * share).to(output.dtype.element_ty),
            mask=dv < DV,
        )
