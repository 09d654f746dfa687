"""What the disaggregation study runs: sizes by setting and model, and the loads. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.errors import InputError
from tools.lab.shares import FEWEST
from tools.lab.study import Setting
from tools.measure.workload import Load, Planned, mixed, poisson

DEFAULT_MODEL, QUICK_MODEL = "random:gpt2-4k", "demo"
STREAMS = 8
CHUNK, PREFILL_TOKENS = 256, 2048
LONG_PROMPT = 2048
SHORTEST_CONTEXT = 256
TRANSPORTS = ("shm", "pinned", "frames")  # that run on a CPU
FIRST_S = 0.6  # the first long prompt arrives when the streams are running
EVERY = (
    2.2  # times a long prompt's idle TTFT: with half of the cores it ends before the next arrives
)
LATEST = 4  # times the end: the longest wait for a long prompt
SHARES, QUICK_SHARES = (0.4, 0.9), (0.4, 0.8)  # of the capacity, for the rates
SPARE = 1.3  # times FEWEST: how many requests are expected, as arrivals at random may be fewer
LONGEST_WINDOW_S = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All parameters that are fixed before anything is measured."""

    model: str
    dtype: str
    context: int
    rounds: int
    long_prompt: int  # tokens
    long_prompts: int
    prompt: int  # mean tokens of the requests that arrive at random
    new_tokens: int
    seconds: float  # the shortest window of their arrivals
    verdicts: bool  # whether windows are long enough for FEWEST requests
    rates: tuple[float, ...]  # empty: SHARES of the capacity
    lengths: tuple[int, ...]  # of the prompts that are handed over
    repeats: int
    seed: int

    @property
    def stream_tokens(self) -> int:
        """New tokens of a stream: as many as fit the context."""
        return self.context - 20

    def window_s(self, rate: float) -> float:
        """Seconds during which requests arrive at this rate in one round, the same for every arm."""
        if not self.verdicts:
            return self.seconds
        wanted = SPARE * FEWEST / (rate * self.rounds)
        return min(LONGEST_WINDOW_S, max(self.seconds, wanted))


@dataclass(frozen=True, slots=True)
class Pace:
    """When long prompts arrive beside the streams, in seconds."""

    first: float
    every: float
    end: float  # gaps count until here

    def enough(self, now: float, running: Sequence[Planned]) -> bool:
        """Whether to abort the streams: after the end, once the long prompts are answered, or at LATEST
        times the end."""
        answered = all(each.watched for each in running)
        return now >= self.end and (answered or now >= LATEST * self.end)


def model_of(setting: Setting) -> str:
    """The user's model, or the study's own."""
    return setting.model or (QUICK_MODEL if setting.quick else DEFAULT_MODEL)


def plan_for(setting: Setting, context: int) -> Plan:
    """The plan for a model with this context. Raises InputError if the context is too short."""
    model, quick = model_of(setting), setting.quick
    if context < SHORTEST_CONTEXT:
        raise InputError(
            f"{model} has a context of {context} tokens; a long prompt beside short ones needs at "
            f"least {SHORTEST_CONTEXT}: use another --model"
        )
    long_prompt = min(LONG_PROMPT, context - 24)
    return Plan(
        model=model,
        dtype=setting.dtype,
        context=context,
        rounds=setting.rounds or (1 if quick else 2),
        long_prompt=long_prompt,
        long_prompts=2 if quick else 3,
        prompt=min(128 if quick else 256, context // 4),
        new_tokens=16 if quick else 32,
        seconds=1.5 if quick else 7.0,
        verdicts=not quick,
        rates=setting.rates,
        lengths=setting.prompt_lengths or _lengths(quick, long_prompt),
        repeats=2 if quick else 3,
        seed=setting.seed,
    )


def _lengths(quick: bool, longest: int) -> tuple[int, ...]:
    wanted = (64, 512) if quick else (64, 128, 256, 512, 1024)
    return (*(each for each in wanted if each < longest), longest)


def pace_for(plan: Plan, long_ttft_s: float) -> Pace:
    """The pace for a long prompt's TTFT on an idle cluster."""
    every = EVERY * long_ttft_s
    return Pace(FIRST_S, every, FIRST_S + plan.long_prompts * every)


def streams_load(plan: Plan, pace: Pace, number: int) -> Load:
    """Round `number` of the streams beside long prompts. The streams outlast the run if they fit the
    context."""
    return mixed(
        streams=STREAMS,
        stream_tokens=plan.stream_tokens,
        prompt=plan.long_prompt,
        every=pace.every,
        count=plan.long_prompts,
        seed=_seed(plan, number),
        first=pace.first,
    )


def rates_for(plan: Plan, capacity: float, *, quick: bool) -> tuple[float, ...]:
    """The user's rates, or shares of the colocated cluster's capacity."""
    shares = QUICK_SHARES if quick else SHARES
    return plan.rates or tuple(float(f"{share * capacity:.2g}") for share in shares)


def random_loads(plan: Plan, rates: tuple[float, ...]) -> Iterator[tuple[float, int, Load]]:
    """(rate, round, load); every arm gets the same loads."""
    for rate in rates:
        for number in range(plan.rounds):
            yield (
                rate,
                number,
                poisson(
                    rate,
                    seconds=plan.window_s(rate),
                    prompt=plan.prompt,
                    new_tokens=plan.new_tokens,
                    seed=_seed(plan, number),
                    context=plan.context,
                ),
            )


def _seed(plan: Plan, number: int) -> int:
    return 1000 * plan.seed + number + 1
