"""The KV cache study: prompts of several lengths, answered with and without the cache by the product's
engine in this process. When does the cache save time, and when does it fill the memory?

With the cache, prefill runs all prompt tokens but the last, then every step runs one token.
Without it, every new token is a run of the same runner over the whole sequence so far.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from baton.engine.boot import Engine, boot
from baton.engine.device import free_memory
from baton.engine.pool import Pool
from baton.errors import BatonError, InputError
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from tools.lab.kv_findings import Memory, Point, capacity_table, findings, memory_table, time_table
from tools.lab.phrasing import number
from tools.lab.plots import kv_cache_picture
from tools.lab.questions import QUESTIONS
from tools.lab.study import NEW_TOKENS, QUICK_TOKENS, Notebook, Setting, Study, model_of
from tools.measure.shape import ITEM_BYTES, shape_of
from tools.measure.usage import forget_peak, own_memory

LENGTHS, QUICK_LENGTHS = (64, 128, 256, 512, 1024), (16, 32, 64, 128)
BLOCK = 16
ROUNDS = 2
CAUGHT = (BatonError, RuntimeError, MemoryError)  # of one cell; the others still run


@dataclass(frozen=True, slots=True)
class Answer:
    """One run, in seconds."""

    prefill_s: float
    per_token_s: list[float]
    tokens: list[int]


def run_experiment(
    prompt_len: int, use_kv_cache: bool, *, setting: Setting | None = None
) -> dict[str, Any]:
    """One prompt of `prompt_len` tokens, NEW_TOKENS new ones (fewer if setting.quick): times, tokens
    and memory. Without the cache `prefill_s` is 0, as no token reuses earlier work. Raises InputError for
    a prompt that does not fit the context."""
    setting = setting or Setting(output=Path("lab/report"))
    new = QUICK_TOKENS if setting.quick else NEW_TOKENS
    engine = engine_for(model_of(setting.model, quick=setting.quick), setting.dtype)
    if prompt_len < 1:
        raise InputError(f"prompt_len must be at least 1, got {prompt_len}")
    if prompt_len + new > engine.files.max_positions:
        raise InputError(
            f"{prompt_len} prompt tokens and {new} new ones are more than the "
            f"{engine.files.max_positions:,} of {engine.files.name}"
        )
    dice = random.Random(setting.seed * 1_000_003 + prompt_len)
    highest = min(2000, engine.files.vocab_size - 1)
    prompt = [dice.randint(5, highest) for _ in range(prompt_len)]
    blocks = engine.layout.blocks_for(prompt_len + new)
    peak = forget_peak()
    pool = Pool.private(engine.layout, blocks, engine.device)
    answer = (_cached if use_kv_cache else _uncached)(engine, pool, prompt, new)
    held = engine.layout.blocks_for(prompt_len + new - 1) * engine.layout.block_bytes
    return {
        "prompt_len": prompt_len,
        "use_kv_cache": use_kv_cache,
        "new_tokens": new,
        "total_s": answer.prefill_s + sum(answer.per_token_s),
        "prefill_s": answer.prefill_s,
        "per_token_s": answer.per_token_s,
        "mean_token_s": sum(answer.per_token_s) / new,
        "tokens": answer.tokens,
        "kv_bytes": held if use_kv_cache else 0,
        "scratch_bytes": 0 if use_kv_cache else held,
        "rss_bytes": own_memory().get("VmHWM" if peak else "VmRSS"),
    }


@cache
def engine_for(model: str, dtype: str) -> Engine:
    """The engine, booted once in this process as a worker boots it."""
    return boot(resolve_model(model), device="auto", dtype=dtype, block_size=BLOCK)


def _timed(engine: Engine, run: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = run()
    engine.wait()
    return time.perf_counter() - begun, found


def _cached(engine: Engine, pool: Pool, prompt: list[int], new: int) -> Answer:
    table = list(range(pool.blocks))
    filled = Row(prompt[:-1], 0, table)
    prefill_s = 0.0
    if filled.token_ids:
        prefill_s, _ = _timed(engine, lambda: engine.runner.fill(pool, [filled]))
    times, tokens, last = [], [], prompt[-1]
    for position in range(len(prompt) - 1, len(prompt) - 1 + new):
        row = Row([last], position, table, Logits.LAST)
        seconds, last = _timed(engine, lambda row=row: _likeliest(engine, pool, row))  # type: ignore[misc]
        times.append(seconds)
        tokens.append(last)
    return Answer(prefill_s, times, tokens)


def _uncached(engine: Engine, pool: Pool, prompt: list[int], new: int) -> Answer:
    table = list(range(pool.blocks))
    known, times = list(prompt), []
    for _ in range(new):
        row = Row(list(known), 0, table, Logits.LAST)
        seconds, token = _timed(engine, lambda row=row: _likeliest(engine, pool, row))  # type: ignore[misc]
        times.append(seconds)
        known.append(token)
    return Answer(0.0, times, known[len(prompt) :])


def _likeliest(engine: Engine, pool: Pool, row: Row) -> int:
    return int(engine.runner.run(pool, [row])[0].argmax())


def run(setting: Setting, notebook: Notebook) -> Study:
    """The whole study."""
    files = resolve_model(model_of(setting.model, quick=setting.quick))
    new = QUICK_TOKENS if setting.quick else NEW_TOKENS
    wanted = setting.prompt_lengths or (QUICK_LENGTHS if setting.quick else LENGTHS)
    lengths = [length for length in wanted if length + new <= files.max_positions]
    for length in wanted:
        if length not in lengths:
            notebook.failed(f"{length} prompt tokens", f"the context of {files.name} is "
                            f"{files.max_positions:,} tokens, with the {new} new ones")  # fmt: skip
    rounds = setting.rounds or (1 if setting.quick else ROUNDS)
    engine = engine_for(files.name, setting.dtype)
    if lengths:
        run_experiment(lengths[0], True, setting=setting)  # warms up
    runs: dict[tuple[int, bool], list[Point]] = {}
    for turn in range(rounds):
        for length in lengths:
            for use in (True, False):
                _one(length, use, turn, setting, runs, notebook)
    points = [sorted(each, key=lambda p: p.total_s)[(len(each) - 1) // 2] for each in runs.values()]
    if not points:
        raise BatonError("no prompt length could be measured: see the failures in kv-cache.jsonl")
    memory = _memory(engine)
    notebook.record("memory", token_bytes=memory.token_bytes, weight_bytes=memory.weight_bytes,
                    free_bytes=memory.free_bytes, context=memory.context)  # fmt: skip
    return Study(
        name="kv-cache",
        title="KV cache",
        question=QUESTIONS["kv-cache"],
        varied="the prompt's length; and at each length, the cache on and off",
        fixed={
            "model": files.name,
            "dtype": engine.dtype,
            "computed": engine.runner.backend,
            "answer": f"{new} tokens, greedy, end-of-text ignored, one sequence at a time",
            "without the cache": "the same runner runs the whole sequence again for every token",
            "rounds": f"{rounds}, taking turns; the median run of each cell is shown",
        },
        command="",
        findings=tuple(findings(points, memory)),
        tables=(time_table(points), memory_table(points), capacity_table(memory)),
        pictures=(kv_cache_picture(setting.output, points),),
    )


def _one(
    length: int,
    use: bool,
    turn: int,
    setting: Setting,
    runs: dict[tuple[int, bool], list[Point]],
    notebook: Notebook,
) -> None:
    cell = f"{length} prompt tokens, cache {'on' if use else 'off'}"
    try:
        found = run_experiment(length, use, setting=setting)
    except CAUGHT as error:
        notebook.failed(f"{cell}, round {turn + 1}", error)
        return
    notebook.record("experiment", round=turn, **found)
    notebook.say(f"round {turn + 1}: {cell}: {number(1e3 * found['total_s'])} ms")
    names = ("prompt_len", "use_kv_cache", "total_s", "prefill_s", "kv_bytes", "scratch_bytes",
             "rss_bytes")  # fmt: skip
    point = Point(
        **{name: found[name] for name in names},
        per_token_s=tuple(found["per_token_s"]),
        tokens=tuple(found["tokens"]),
    )
    runs.setdefault((length, use), []).append(point)


def _memory(engine: Engine) -> Memory:
    shape = shape_of(engine.files.config)
    return Memory(
        token_bytes=engine.layout.block_bytes // engine.layout.block_size,
        block_tokens=engine.layout.block_size,
        weight_bytes=None if shape is None else shape.weights * ITEM_BYTES[engine.dtype],
        free_bytes=free_memory(engine.device),
        context=engine.files.max_positions,
    )
