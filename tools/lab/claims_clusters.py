"""Claims measured through real clusters: speculation, the prefix cache, and memory.

Memory is the exact bytes of weights and KV, and beside them the resident memory (RSS) of a decode
worker's process that has answered a request.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from baton.engine.boot import Engine
from baton.engine.cpu.forward import NativeRunner
from baton.engine.runner import Runner
from baton.errors import BatonError
from baton.model_files import resolve_model
from baton.text import Tokenizer
from decode_worker.speculation import PromptLookup, Speculation, Wanted, accepted_prefix
from prompts import PROMPTS
from tools.lab.claims_engine import booted
from tools.lab.claims_findings import Held, Result, by_rounds
from tools.lab.phrasing import number, percent
from tools.lab.study import Notebook
from tools.measure.slo import Trace
from tools.measure.split import RunningArm, Split, options_for, running
from tools.measure.usage import memory_of
from tools.measure.workload import Load, Planned, single

GUESSES = 4


@dataclass(frozen=True, slots=True)
class Accepted:
    """How speculation did on one answer. `guessed` and `stood` count draft tokens and accepted ones."""

    tokens: int
    steps: int
    guessed: int
    stood: int

    def __str__(self) -> str:
        share = self.stood / self.guessed if self.guessed else 0.0
        return (
            f"{self.stood} of {self.guessed} draft tokens were accepted ({percent(share)}), "
            f"{self.tokens} tokens took {self.steps} steps: {number(self.tokens / self.steps)} a step"
        )


def accepted(prompt: Sequence[int], answer: Sequence[int]) -> Accepted:
    """Replays the decode worker's drafts against its answer. Which of them were accepted is a function of
    the tokens alone."""
    speculation = Speculation(PromptLookup(), GUESSES)
    known, at, steps, guessed, stood = list(prompt), 0, 0, 0, 0
    while at < len(answer):
        room = len(answer) - at - 1
        guesses = speculation.draft([Wanted("r", tuple(known), room)], room).get("r", [])
        right = accepted_prefix(guesses, list(answer[at : at + len(guesses)]))
        speculation.update("r", drafted=len(guesses), accepted=right)
        known += answer[at : at + right + 1]
        at, steps = at + right + 1, steps + 1
        guessed, stood = guessed + len(guesses), stood + right
    return Accepted(len(answer), steps, guessed, stood)


def together(parts: Sequence[Accepted]) -> Accepted:
    """The sum over several answers."""
    return Accepted(
        sum(each.tokens for each in parts),
        sum(each.steps for each in parts),
        sum(each.guessed for each in parts),
        sum(each.stood for each in parts),
    )


def speculation(
    model: str, dtype: str, new: int, rounds: int, count: int, notebook: Notebook
) -> list[Result]:
    """Latency of answers one at a time, plain and with n-gram drafts, taking turns. The model must be
    trained, as its text must be real. A repetitive prompt contains the model's own answer to the same
    beginning, so the model repeats a known text, as in edits and summaries."""
    files = resolve_model(model)
    tokenizer = Tokenizer(files.tokenizer_file)
    with ExitStack() as stack:
        arms = []
        for name, guesser in (("plain", None), ("ngram", "ngram")):
            split = Split(name, False, 2048)
            options = replace(
                options_for(split, model=model, dtype=dtype, streams=1),
                speculative_model=guesser,
                num_speculative_tokens=GUESSES,
            )
            arms.append(stack.enter_context(running(split, options)))
        ordinary = [tuple(tokenizer.encode(text)) for text in PROMPTS[:count]]
        answers = [arms[0].drive(_one(prompt, new))[0].token_ids for prompt in ordinary]
        end = files.eos_token_ids[0]
        repetitive = [
            (*prompt, *until(end, answer), end, *prompt)
            for prompt, answer in zip(ordinary, answers, strict=True)
        ]
        kinds = (
            ("speculation, ordinary", ordinary, "prompts of prompts.py"),
            (
                "speculation, repetitive",
                repetitive,
                "prompts that contain the answer to their beginning",
            ),
        )
        return [
            _speculated(key, arms, [_one(each, new) for each in prompts], rounds, what, notebook)
            for key, prompts, what in kinds
        ]


def until(end: int, ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens before the end token."""
    return tuple(ids[: ids.index(end)] if end in ids else ids)


def _one(prompt: tuple[int, ...], new: int) -> Load:
    return Load("one prompt", (Planned(0.0, prompt, new),))


def _speculated(
    key: str, arms: list[RunningArm], loads: list[Load], rounds: int, what: str, notebook: Notebook
) -> Result:
    pairs, parts = [], []
    for turn in range(-1, rounds):  # the first round warms up
        plain, guessing = ([arm.drive(load)[0] for load in loads] for arm in arms)
        if [each.token_ids for each in plain] != [each.token_ids for each in guessing]:
            raise BatonError("the answers with and without drafts differ")
        if turn < 0:
            parts = [
                accepted(load.requests[0].prompt, trace.token_ids)
                for load, trace in zip(loads, guessing, strict=True)
            ]
            continue
        pairs.append((_mean_ms(plain), _mean_ms(guessing)))
        notebook.record(key, round=turn, plain_ms=pairs[-1][0], ngram_ms=pairs[-1][1])
    new = loads[0].requests[0].new_tokens
    definition = (
        f"whole latency of {new} greedy tokens, {len(loads)} {what}, one request at a time; n-grams, up "
        f"to {GUESSES} draft tokens"
    )
    remark = f"{together(parts)}; the answers are the same, token by token."
    return by_rounds(key, pairs, "ms", definition, remark, samples=len(loads) * rounds)


def _mean_ms(traces: Sequence[Trace]) -> float:
    return 1e3 * sum(each.tokens[-1] for each in traces) / len(traces)


def prefix_cache(
    model: str, dtype: str, tokens: int, rounds: int, seed: int, notebook: Notebook
) -> Result:
    """TTFT of a new prompt, then of one that shares its beginning."""
    split = Split("prefix cache", False, 2048)
    options = replace(options_for(split, model=model, dtype=dtype, streams=2), prefix_caching=True)
    pairs, known = [], []
    with running(split, options) as arm:
        arm.drive(single(tokens, 2, 1000 * seed))  # warms up
        for turn in range(rounds):
            base = single(tokens, 2, 1000 * seed + turn + 1).requests[0].prompt
            tail = tuple(reversed(base[-16:]))
            (cold,) = arm.drive(Load("new", (Planned(0.0, base, 2),)))
            (warm,) = arm.drive(Load("known", (Planned(0.0, base[:-16] + tail, 2),)))
            if cold.timings.cached_tokens or not warm.timings.cached_tokens:
                raise BatonError(
                    f"{cold.timings.cached_tokens} tokens of the new prompt were cached and "
                    f"{warm.timings.cached_tokens} of the known one"
                )
            pairs.append((1e3 * cold.ttft, 1e3 * warm.ttft))
            known.append(warm.timings.cached_tokens)
            notebook.record("prefix", round=turn, new_ms=pairs[-1][0], known_ms=pairs[-1][1])
    definition = (
        f"TTFT of a prompt of {tokens:,} tokens on an idle cluster, new or with a known beginning"
    )
    remark = f"{number(median(known))} of {tokens:,} tokens were cached."
    return by_rounds("prefix", pairs, "ms", definition, remark, samples=rounds)


FULL = "float32"
PROMPT, NEW = 64, 8


def weights_of(engine: Engine) -> int:
    """Bytes of the weights as this engine holds them."""
    runner = engine.runner
    if isinstance(runner, NativeRunner):
        return runner.weight_bytes
    if isinstance(runner, Runner):
        held = [*runner.model.parameters(), *runner.model.buffers()]
        return sum(each.nbytes for each in held)
    raise BatonError(f"the weights of an engine that runs {runner.backend} cannot be counted")


def held(model: str, dtype: str, tokens: int, notebook: Notebook) -> Held:
    """Exact bytes from an engine in this process, and the RSS of a worker. The engine runs first:
    compiling a model for the first time would show in the worker's RSS."""
    engine = booted(resolve_model(model), dtype)
    weights = weights_of(engine)
    kv = engine.layout.blocks_for(tokens) * engine.layout.block_bytes
    del engine
    rss = None
    try:
        rss = _rss_of_worker(model, dtype)
    except (BatonError, OSError) as error:
        notebook.failed(f"RSS in {dtype}", error)
    return Held(dtype, weights, kv, tokens, rss)


def _rss_of_worker(model: str, dtype: str) -> int:
    split = Split(f"colocated, {dtype}", True, 2048)
    with running(split, options_for(split, model=model, dtype=dtype, streams=1)) as arm:
        arm.drive(single(PROMPT, NEW, 1))
        status = Path(f"/proc/{arm.pids()['decode-0']}/status").read_text()
    try:
        return memory_of(status)["VmRSS"]
    except KeyError:
        raise BatonError("/proc has no VmRSS on this system") from None
