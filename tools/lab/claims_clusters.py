"""Claims about the whole product, through real clusters: speculation and the prefix cache."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from baton.errors import BatonError
from baton.model_files import resolve_model
from baton.text import Tokenizer
from decode_worker.speculation import PromptLookup, Speculation, Wanted, accepted_prefix
from prompts import PROMPTS
from tools.lab.claims_verdict import Result, by_rounds
from tools.lab.study import Notebook
from tools.measure.slo import Trace
from tools.measure.split import RunningArm, Split, options_for, running
from tools.measure.workload import Load, Planned, single

GUESSES = 4


@dataclass(frozen=True, slots=True)
class Accepted:
    """What guessing was good for."""

    tokens: int
    steps: int
    guessed: int
    stood: int

    def __str__(self) -> str:
        share = self.stood / self.guessed if self.guessed else 0.0
        return (
            f"{self.stood} of {self.guessed} guesses stood ({share:.0%}), {self.tokens} tokens took "
            f"{self.steps} steps: {self.tokens / self.steps:.2f} a step"
        )


def accepted(prompt: Sequence[int], answer: Sequence[int]) -> Accepted:
    """The decode worker's own guesses again, against the answer it gave: which of them stood is a
    function of the tokens alone."""
    speculation = Speculation(PromptLookup(), GUESSES)
    known, at, steps, guessed, stood = list(prompt), 0, 0, 0, 0
    while at < len(answer):
        room = len(answer) - at - 1
        guesses = speculation.guess([Wanted("r", tuple(known), room)], room).get("r", [])
        right = accepted_prefix(guesses, list(answer[at : at + len(guesses)]))
        speculation.update("r", drafted=len(guesses), accepted=right)
        known += answer[at : at + right + 1]
        at, steps = at + right + 1, steps + 1
        guessed, stood = guessed + len(guesses), stood + right
    return Accepted(len(answer), steps, guessed, stood)


def together(parts: Sequence[Accepted]) -> Accepted:
    """Of several answers."""
    return Accepted(
        sum(each.tokens for each in parts),
        sum(each.steps for each in parts),
        sum(each.guessed for each in parts),
        sum(each.stood for each in parts),
    )


def speculation(
    model: str, dtype: str, new: int, rounds: int, count: int, notebook: Notebook
) -> list[Result]:
    """Answers one after the other, plain and with n-grams, taking turns; real text, so the model is one
    that has learned something. Repetitive are prompts that hold the model's own answer to the same
    beginning: a text it gives again, as in edits and summaries."""
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
                "prompts that hold the answer to their beginning",
            ),
        )
        return [
            _speculated(key, arms, [_one(each, new) for each in prompts], rounds, what, notebook)
            for key, prompts, what in kinds
        ]


def until(end: int, ids: Sequence[int]) -> tuple[int, ...]:
    """What stands before the end of the text."""
    return tuple(ids[: ids.index(end)] if end in ids else ids)


def _one(prompt: tuple[int, ...], new: int) -> Load:
    return Load("one prompt", (Planned(0.0, prompt, new),))


def _speculated(
    key: str, arms: list[RunningArm], loads: list[Load], rounds: int, what: str, notebook: Notebook
) -> Result:
    pairs, parts = [], []
    for number in range(-1, rounds):  # the first is not counted
        plain, guessing = ([arm.drive(load)[0] for load in loads] for arm in arms)
        if [each.token_ids for each in plain] != [each.token_ids for each in guessing]:
            raise BatonError("the answers with and without guesses differ")
        if number < 0:
            parts = [
                accepted(load.requests[0].prompt, trace.token_ids)
                for load, trace in zip(loads, guessing, strict=True)
            ]
            continue
        pairs.append((_mean_ms(plain), _mean_ms(guessing)))
        notebook.record(key, round=number, plain_ms=pairs[-1][0], ngram_ms=pairs[-1][1])
    new = loads[0].requests[0].new_tokens
    definition = (
        f"whole latency of {new} greedy tokens, {len(loads)} {what}, one request at a time; n-grams, up "
        f"to {GUESSES} guesses"
    )
    said = f"{together(parts)}; the answers are the same, token by token."
    return by_rounds(key, pairs, "ms", definition, said)


def _mean_ms(traces: Sequence[Trace]) -> float:
    return 1e3 * sum(each.tokens[-1] for each in traces) / len(traces)


def prefix_cache(
    model: str, dtype: str, tokens: int, rounds: int, seed: int, notebook: Notebook
) -> Result:
    """TTFT of a prompt that nobody has asked before, then of one that begins the same."""
    split = Split("prefix cache", False, 2048)
    options = replace(options_for(split, model=model, dtype=dtype, streams=2), prefix_caching=True)
    pairs, known = [], []
    with running(split, options) as arm:
        arm.drive(single(tokens, 2, 1000 * seed))  # not counted
        for number in range(rounds):
            base = single(tokens, 2, 1000 * seed + number + 1).requests[0].prompt
            tail = tuple(reversed(base[-16:]))
            (cold,) = arm.drive(Load("new", (Planned(0.0, base, 2),)))
            (warm,) = arm.drive(Load("known", (Planned(0.0, base[:-16] + tail, 2),)))
            if cold.timings.cached_tokens or not warm.timings.cached_tokens:
                raise BatonError(
                    f"cached were {cold.timings.cached_tokens} tokens of the new prompt and "
                    f"{warm.timings.cached_tokens} of the known one"
                )
            pairs.append((1e3 * cold.ttft, 1e3 * warm.ttft))
            known.append(warm.timings.cached_tokens)
            notebook.record("prefix", round=number, new_ms=pairs[-1][0], known_ms=pairs[-1][1])
    definition = (
        f"TTFT of a prompt of {tokens:,} tokens on an idle cluster, all new or begun before"
    )
    said = f"{median(known):,.0f} of {tokens:,} tokens were there already."
    return by_rounds("prefix", pairs, "ms", definition, said)
