"""The batching study: the router's batcher at several batch sizes and several windows, under a burst and
under staggered arrivals. What throughput does batching gain, at what latency?

    sizes      batch 1, 4, 8, 16       at one window
    windows    0, 10, 50 ms            at one batch size

All clusters run at once and take turns, round by round, so that a slow minute of the machine hits all of
them; an idle cluster uses no CPU. On a GPU the clusters run one after the other, each alone.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from statistics import median

from baton.errors import BatonError
from baton.model_files import resolve_model
from baton.topology import count_gpus, plan_topology, usable_cores
from tools.lab.batching_findings import (
    BURST,
    LOADS,
    STAGGERED,
    Cell,
    findings,
    latency_table,
    request_table,
    usage_table,
)
from tools.lab.environment import chosen_dtype
from tools.lab.phrasing import number, percent
from tools.lab.plots import batching_pictures
from tools.lab.questions import QUESTIONS
from tools.lab.shares import FEWEST
from tools.lab.study import Notebook, Plain, Setting, Study, model_of
from tools.measure.slo import Trace
from tools.measure.split import RunningArm, Split, options_for, running
from tools.measure.usage import SAMPLES_PER_S, Sampler, Usage
from tools.measure.workload import Load, Planned, poisson

BATCH_SIZES, WINDOWS_MS = (1, 4, 8, 16), (0.0, 10.0, 50.0)
SIZE_OF_WINDOWS, WINDOW_OF_SIZES = 8, 10.0
PROMPT, NEW_TOKENS = 64, 32
SHARE = 0.5  # rate of staggered requests, as a share of what batch 1 can serve
ROUNDS = 2
STEP_TOKENS = 2048  # token budget of a step, the default of the product


@dataclass(frozen=True, slots=True)
class Plan:
    """The amount of work."""

    burst: int  # requests
    staggered: int
    new_tokens: int
    rounds: int


@dataclass(slots=True)
class Seen:
    """Measurements of one cluster under one load, over all rounds."""

    traces: list[Trace] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)


Where = tuple[int, float]  # batch size, window in ms


def run(setting: Setting, notebook: Notebook) -> Study:
    """The whole study."""
    files = resolve_model(model_of(setting.model, quick=setting.quick))
    sizes, windows = setting.batch_sizes or BATCH_SIZES, setting.windows_ms or WINDOWS_MS
    if setting.quick:
        sizes, windows = setting.batch_sizes or (1, 4), setting.windows_ms or (0.0, 20.0)
    plan = _plan(setting)
    at_window = WINDOW_OF_SIZES if WINDOW_OF_SIZES in windows else windows[0]
    at_size = SIZE_OF_WINDOWS if SIZE_OF_WINDOWS in sizes else sizes[-1]
    varied_size = [(size, at_window) for size in sizes]
    varied_window = [(at_size, window) for window in windows]
    measuring = Measuring(replace(setting, model=files.name), plan, notebook)
    all_ = list(dict.fromkeys([*varied_size, *varied_window]))
    for group in [[where] for where in all_] if count_gpus() else [all_]:
        measuring.group(group)
    cells = {key: _cell(key, each) for key, each in measuring.seen.items()}
    by_size = [cells[w, load] for load in LOADS for w in varied_size if (w, load) in cells]
    by_window = [cells[w, load] for load in LOADS for w in varied_window if (w, load) in cells]
    shown = next((c for c in [*by_window, *by_size] if c.load == BURST), None)
    if shown is None:
        raise BatonError("no cell could be measured: see the failures in batching.jsonl")
    cores = usable_cores()
    return Study(
        name="batching",
        title="Batching",
        question=QUESTIONS["batching"],
        varied=f"the batch size at a window of {at_window:g} ms; the window at batch size {at_size}",
        fixed=_fixed(files.name, setting, plan, measuring.rate or 0.0),
        command="",
        findings=tuple(findings(by_size, by_window, cores)),
        tables=(
            latency_table("Batch size, at one window", by_size, cores),
            latency_table("Window, at one batch size", by_window, cores),
            request_table(shown, plan.burst),
            usage_table([*by_size, *(c for c in by_window if c not in by_size)]),
        ),
        pictures=batching_pictures(setting.output, by_size, by_window),
    )


def _plan(setting: Setting) -> Plan:
    if setting.quick:
        return Plan(burst=8, staggered=4, new_tokens=8, rounds=setting.rounds or 1)
    largest = max(setting.batch_sizes or BATCH_SIZES)
    rounds = setting.rounds or ROUNDS
    burst = max(24, largest, -(-FEWEST // rounds))  # enough for a verdict
    return Plan(burst, 8, NEW_TOKENS, rounds)


class Measuring:
    """The measurements so far, and the rate of the staggered requests once known."""

    def __init__(self, setting: Setting, plan: Plan, notebook: Notebook) -> None:
        self.seen: dict[tuple[Where, str], Seen] = {}
        self.rate: float | None = None
        self._setting = setting
        self._plan = plan
        self._notebook = notebook
        self._longest = 2 * PROMPT + plan.new_tokens
        if setting.model is not None:
            self._longest = min(self._longest, resolve_model(setting.model).max_positions)

    def group(self, places: Sequence[Where]) -> None:
        """Run these clusters at once, each under both loads, round by round."""
        with ExitStack() as stack:
            arms: dict[Where, RunningArm] = {}
            for where in places:
                self._notebook.say(f"starting {_named(where)}")
                try:
                    arms[where] = stack.enter_context(self._started(where))
                    self._warm(arms[where])
                except BatonError as error:
                    self._notebook.failed(_named(where), error)
                    arms.pop(where, None)
            for turn in range(self._plan.rounds if arms else 0):
                for load, planned in self._loads(self._setting.seed + turn):
                    for where, arm in arms.items():
                        self._one(arm, where, load, planned, turn)

    def _started(self, where: Where) -> AbstractContextManager[RunningArm]:
        size, window = where
        assert self._setting.model is not None
        split = Split(_named(where), False, STEP_TOKENS)
        model, dtype = self._setting.model, self._setting.dtype
        options = options_for(split, model=model, dtype=dtype, streams=size)
        options = replace(
            options,
            topology=plan_topology(gpus=count_gpus()),
            batch_window_ms=window,
            max_model_len=self._longest,
        )
        return running(split, options)

    def _warm(self, arm: RunningArm) -> None:
        """Three requests, one at a time. The first cluster's set the rate of staggered requests."""
        alone = [arm.drive(_burst(1, self._plan, seed))[0].timings for seed in (-1, -2, -3)]
        if self.rate is None:
            seconds = median(each.total_s - each.queue_s for each in alone[1:])
            self.rate = SHARE / seconds
            self._notebook.record("alone", seconds=seconds, staggered_requests_per_s=self.rate)
            self._notebook.say(
                f"a request alone takes {number(1e3 * seconds)} ms; "
                f"staggered: {number(self.rate)} a second"
            )

    def _loads(self, seed: int) -> Iterator[tuple[str, Load]]:
        """The same for every cluster of a round."""
        plan, rate = self._plan, self.rate
        assert rate is not None
        yield BURST, _burst(plan.burst, plan, seed)
        drawn = poisson(rate, seconds=10 * plan.staggered / rate, prompt=PROMPT, seed=seed + 1000,
                        new_tokens=plan.new_tokens, context=self._longest)  # fmt: skip
        yield STAGGERED, Load(STAGGERED, drawn.requests[: plan.staggered])

    def _one(self, arm: RunningArm, where: Where, load: str, planned: Load, turn: int) -> None:
        """One cluster, one load, one round."""
        say, record = self._notebook.say, self._notebook.record
        begun = time.monotonic()
        try:
            with Sampler(arm.pids()) as sampler:
                traces = arm.drive(planned)
        except BatonError as error:
            self._notebook.failed(f"{_named(where)}, {load}, round {turn + 1}", error)
            arm.await_ready()  # restarts a process that died; if that fails, the study fails
            return
        lasted = time.monotonic() - begun
        tokens = sum(len(trace.tokens) for trace in traces)
        usage = sampler.usage
        assert usage is not None
        here = self.seen.setdefault((where, load), Seen())
        here.traces += traces
        here.requests_per_s.append(len(traces) / lasted)
        here.tokens_per_s.append(tokens / lasted)
        here.usages.append(usage)
        base: dict[str, Plain] = {
            "batch": where[0], "window_ms": where[1], "load": load, "round": turn
        }  # fmt: skip
        for trace in traces:
            times = trace.timings
            record("request", **base, queueing_s=times.queue_s, ttft_s=times.ttft_s,
                   execution_s=times.total_s - times.queue_s, total_s=times.total_s,
                   prefill_s=times.prefill_s, decode_s=times.decode_s, arrived_s=trace.intended,
                   tokens=len(trace.tokens))  # fmt: skip
        record("round", **base, seconds=lasted, requests_per_s=len(traces) / lasted,
               tokens_per_s=tokens / lasted, busiest_second_cores=usage.peak_cores,
               samples=usage.samples, gpu_percent=usage.gpu_percent,
               **{f"cores of {name}": value for name, value in usage.cores.items()})  # fmt: skip
        say(f"round {turn + 1}: {_named(where)}, {load}: {number(tokens / lasted)} tokens/s")


def _named(where: Where) -> str:
    return f"batch {where[0]}, window {where[1]:g} ms"


def _burst(count: int, plan: Plan, seed: int) -> Load:
    """Requests at once, with prompts of one length."""
    dice = random.Random(seed)
    prompts = [tuple(dice.randint(5, 2000) for _ in range(PROMPT)) for _ in range(count)]
    return Load(BURST, tuple(Planned(0.0, prompt, plan.new_tokens) for prompt in prompts))


def _cell(key: tuple[Where, str], seen: Seen) -> Cell:
    (size, window), load = key
    traces = seen.traces  # round by round, in the order they ended
    names = list(dict.fromkeys(name for usage in seen.usages for name in usage.cores))
    seconds = sum(usage.seconds for usage in seen.usages)
    gpu = [usage.gpu_percent for usage in seen.usages if usage.gpu_percent is not None]
    return Cell(
        batch=size,
        window_ms=window,
        load=load,
        queueing=tuple(1e3 * t.timings.queue_s for t in traces),
        execution=tuple(1e3 * (t.timings.total_s - t.timings.queue_s) for t in traces),
        total=tuple(1e3 * t.timings.total_s for t in traces),
        requests_per_s=tuple(seen.requests_per_s),
        tokens_per_s=tuple(seen.tokens_per_s),
        cores={
            name: sum(u.cores.get(name, 0.0) * u.seconds for u in seen.usages) / seconds
            for name in names
        },
        peak_cores=max(usage.peak_cores for usage in seen.usages),
        gpu_percent=median(gpu) if gpu else None,
    )


def _fixed(model: str, setting: Setting, plan: Plan, rate: float) -> dict[str, str]:
    return {
        "model": model,
        "dtype": chosen_dtype(setting.dtype),
        "topology": f"{plan_topology(gpus=count_gpus())}, prefix caching off",
        "answers": f"{plan.new_tokens} tokens, greedy, end-of-text ignored",
        "burst": f"{plan.burst} requests at once, prompts of {PROMPT} tokens",
        "staggered": f"{plan.staggered} requests at random, {number(rate)} a second on average "
        f"({percent(SHARE)} of the rate of one request at a time), prompts of {PROMPT // 2} to "
        f"{PROMPT * 3 // 2} tokens",
        "rounds": f"{plan.rounds}, clusters taking turns; latencies of all rounds, median rates",
        "utilisation": f"CPU time of the cluster's processes, read {SAMPLES_PER_S:g} times a second",
    }
