"""Findings of the KV cache study, computed from its points. Pure.

with the cache       the prompt once, then one token a step         a token: constant + its context's KV
without it           the whole sequence again for every token      a token: the prompt's length
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from tools.lab.fit import CURVES, WORST, Curve, curve, power_law, simplest
from tools.lab.phrasing import gigabytes, milliseconds, number, percent
from tools.lab.shares import FEWEST, shorter
from tools.lab.study import Table

PAYS = 1.10  # least speed-up that is above the noise of a shared machine
HALF = 2.0  # speed-up at which the cache saves half of the time
BATCHES = (1, 8, 16, 64)  # batches in the sentence on KV larger than the weights
LENGTHS = (1024, 4096, 32768)  # sequence lengths in the capacity table


@dataclass(frozen=True, slots=True)
class Point:
    """One prompt length, with or without the cache: the median run. Seconds and bytes."""

    prompt_len: int
    use_kv_cache: bool
    total_s: float
    prefill_s: float
    per_token_s: tuple[float, ...]
    kv_bytes: int  # kept from token to token
    scratch_bytes: int  # KV that a forward writes and then drops
    rss_bytes: int | None  # peak of the process during the run
    tokens: tuple[int, ...]

    @property
    def token_s(self) -> float:
        """Mean time of a new token."""
        return mean(self.per_token_s)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the cache and of the weights, and the bytes free beside them."""

    token_bytes: int
    block_tokens: int
    weight_bytes: int | None
    free_bytes: int
    context: int


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt with and without the cache."""

    with_: Point
    without: Point

    @property
    def speedup(self) -> float:
        """Of the whole answer."""
        return self.without.total_s / self.with_.total_s


def pairs(points: Sequence[Point]) -> list[Pair]:
    """Pairs by prompt length. A length measured only one way is left out."""
    with_ = {p.prompt_len: p for p in points if p.use_kv_cache}
    without = {p.prompt_len: p for p in points if not p.use_kv_cache}
    return [Pair(with_[n], without[n]) for n in sorted(with_.keys() & without.keys())]


def time_table(points: Sequence[Point]) -> Table:
    """A line for each point."""
    header = ("prompt tokens", "KV cache", "total, ms", "prefill, ms", "per token: mean, ms",
              "first, ms", "median, ms", "last, ms", "speed-up of the total")  # fmt: skip
    gains = {pair.with_.prompt_len: pair.speedup for pair in pairs(points)}
    rows = []
    for p in sorted(points, key=lambda p: (p.prompt_len, not p.use_kv_cache)):
        each = sorted(p.per_token_s)
        gain = number(gains[p.prompt_len]) if p.use_kv_cache and p.prompt_len in gains else ""
        times = (p.total_s, p.prefill_s, p.token_s, p.per_token_s[0], each[len(each) // 2],
                 p.per_token_s[-1])  # fmt: skip
        rows.append((str(p.prompt_len), "on" if p.use_kv_cache else "off",
                     *(number(1e3 * each) for each in times), gain))  # fmt: skip
    return Table("With and without the KV cache", header, tuple(rows))


def memory_table(points: Sequence[Point]) -> Table:
    """Exact KV bytes from the layout, and the process's memory as the system reports it."""
    header = ("prompt tokens", "KV cache", "KV kept, MB", "KV of one forward thrown away, MB",
              "most memory of the process, MB")  # fmt: skip
    rows = tuple(
        (
            *(str(p.prompt_len), "on" if p.use_kv_cache else "off", _mb(p.kv_bytes)),
            *(_mb(p.scratch_bytes), "" if p.rss_bytes is None else _mb(p.rss_bytes)),
        )
        for p in sorted(points, key=lambda p: (p.prompt_len, not p.use_kv_cache))
    )
    return Table("Memory of the KV cache", header, rows)


def capacity_table(memory: Memory) -> Table:
    """How many sequences of a length fit beside the weights."""
    rows = []
    for length in (n for n in LENGTHS if n <= memory.context):
        size = sequence_bytes(length, memory)
        rows.append((f"{length:,}", gigabytes(size), f"{memory.free_bytes // size:,}"))
    title = f"Sequences that fit into the free memory ({gigabytes(memory.free_bytes)})"
    return Table(title, ("tokens of a sequence", "KV of one", "sequences"), tuple(rows))


def sequence_bytes(length: int, memory: Memory) -> int:
    """In whole blocks."""
    blocks = -(-length // memory.block_tokens)
    return blocks * memory.block_tokens * memory.token_bytes


def findings(points: Sequence[Point], memory: Memory) -> list[str]:
    """All sentences: what the cache saves, how costs grow, how large it is."""
    both = pairs(points)
    sentences = [*saving(both), *same(both)]
    with_, without = ([p for p in points if p.use_kv_cache is on] for on in (True, False))
    sentences += growth("A token without the cache", without, [p.token_s for p in without])
    sentences += growth("A token with the cache", with_, [p.token_s for p in with_])
    sentences += growth("A whole answer without the cache", without, [p.total_s for p in without])
    sentences += growth("A whole answer with the cache", with_, [p.total_s for p in with_])
    return [*sentences, *weight(memory)]


def saving(both: Sequence[Pair]) -> list[str]:
    """From which length the cache pays, and its speed-up at the shortest and longest prompt."""
    if not both:
        return ["No length was measured both with and without the cache: nothing to compare."]
    first, last = both[0], both[-1]
    sentences = [
        f"After a prompt of {each.with_.prompt_len:,} tokens, {len(each.with_.per_token_s)} new ones "
        f"come {number(each.speedup)} times as fast with the cache ({milliseconds(each.with_.total_s)} "
        f"instead of {milliseconds(each.without.total_s)})."
        for each in dict.fromkeys((first, last))
    ]  # fmt: skip
    return [verdict(both), *sentences]


def verdict(both: Sequence[Pair]) -> str:
    """Break-even: the shortest length from which the cache pays at every longer one."""
    tokens = min(len(p.per_token_s) for pair in both for p in (pair.with_, pair.without))
    rests = f"{tokens} timed tokens a cell"
    if tokens < FEWEST:
        last = both[-1]
        faster = shorter(last.with_.per_token_s, last.without.per_token_s)
        return (
            f"**No verdict on the cache**: {rests} are fewer than {FEWEST}. At the longest prompt "
            f"({last.with_.prompt_len} tokens), {faster} tokens with the cache were faster than the "
            "median one without."
        )
    from_pays, from_half = (_from(both, least) for least in (PAYS, HALF))
    if from_pays is None:
        best = max(both, key=lambda each: each.speedup)
        return (
            f"**The cache does not pay here**: at the longest prompt ({both[-1].with_.prompt_len} "
            f"tokens) it is not {PAYS:g} times as fast; the best is {number(best.speedup)} times at "
            f"{best.with_.prompt_len} tokens ({rests})."
        )
    shortest = both[0].with_.prompt_len
    where = (
        f"from the shortest prompt measured ({shortest} tokens) on"
        if from_pays == shortest
        else f"from {from_pays} tokens on"
    )
    half = (
        f"it saves half of the time or more from {from_half} tokens on"
        if from_half is not None
        else f"nowhere does it save half of the time up to {both[-1].with_.prompt_len} tokens"
    )
    return f"**The cache pays** {where} (at least {PAYS:g} times as fast; {rests}); {half}."


def _from(both: Sequence[Pair], least: float) -> int | None:
    found = None
    for pair in reversed(both):
        if pair.speedup < least:
            break
        found = pair.with_.prompt_len
    return found


def same(both: Sequence[Pair]) -> list[str]:
    """Whether both ways gave the same tokens, as they must."""
    if not both:
        return []
    other = [p.with_.prompt_len for p in both if p.with_.tokens != p.without.tokens]
    if not other:
        return ["Both ways wrote the same tokens, at every length."]
    lengths = ", ".join(map(str, other))
    return [f"The two ways wrote **different tokens** at {lengths} prompt tokens: sums were "
            "rounded differently."]  # fmt: skip


def growth(what: str, points: Sequence[Point], seconds: Sequence[float]) -> list[str]:
    """The simplest curve that fits, with its error; or that there are too few points."""
    x = [float(p.prompt_len) for p in points]
    law = power_law(x, seconds)
    if len(x) < 3 or law is None:
        return [f"{what}: {len(x)} lengths are too few to say how it grows."] if x else []
    power = f"as a power law {law}, R² {number(law.r2)}"
    found = simplest(x, seconds)
    if found is not None:
        return [f"{what} {_shape(found)} ({_error(found)}; {power})."]
    tried = [c for name in CURVES if (c := curve(name, x, seconds)) is not None]
    best = min(tried, key=lambda c: c.worst)
    return [
        f"{what}: no constant, line or parabola that grows comes within {percent(WORST)} of every point "
        f"(nearest: {best.name}, {_error(best)}; {power})."
    ]


def _error(found: Curve) -> str:
    """The fit's error. R² is meaningless for a constant."""
    r2 = "" if found.name == "constant" else f"R² {number(found.r2)}, "
    return f"{r2}worst point {percent(found.worst)} off"


def _shape(found: Curve) -> str:
    c = found.coefficients
    if found.name == "constant":
        return f"takes the same time at every length, {milliseconds(c[0])}"
    if found.name == "linear":
        rate = f"+{number(c[1] * 1e6)} µs a prompt token"
        return f"grows linearly with the prompt: {milliseconds(c[0])} {rate}"
    return (
        f"grows as a parabola of the prompt's length: {milliseconds(c[0])} +{number(c[1] * 1e6)} µs a "
        f"token +{number(c[2] * 1e9)} ns a token squared"
    )


def weight(memory: Memory) -> list[str]:
    """Bytes of a token, and when the cache outgrows the weights and the memory."""
    sentences = [
        f"A token's keys and values take {memory.token_bytes:,} bytes "
        f"({number(memory.token_bytes / 1e3)} kB)."
    ]
    if memory.weight_bytes:
        tokens = -(-memory.weight_bytes // memory.token_bytes)
        where = "; ".join(
            f"batch {batch} x {length:,} tokens"
            for batch in BATCHES
            if (length := -(-tokens // batch)) <= memory.context
        )
        sentences.append(
            f"The cache is larger than the weights ({gigabytes(memory.weight_bytes)}) from {tokens:,} "
            f"tokens on: {where or 'beyond the context, at all batches considered'}."
        )
    longest = min(memory.context, LENGTHS[-1])
    size = sequence_bytes(longest, memory)
    fit = memory.free_bytes // size
    sentences.append(
        f"Beside the weights {gigabytes(memory.free_bytes)} are free here: "
        f"{memory.free_bytes // memory.token_bytes:,} tokens of cache, {fit:,} sequences of "
        f"{longest:,}"
        + ("." if fit else ": not even one, so the memory is full before the context.")
    )
    return sentences


def _mb(size: int) -> str:
    return number(size / 1e6)
