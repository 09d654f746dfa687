"""How a worker learns how long its forwards take, and how long its steps are then."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.row import Row
from baton.pace import FIXED_PARTS, FORWARD_S, LEAST_TOKENS, Pace, Prompt, Span, share_out
from decode_worker.model import Draw, Drawn
from prefill_worker.model import Chunk
from router.batching import Rules
from tests.pure.town import PretendDecode, PretendPrefill, Town, calm_answer

PACES = st.builds(Pace, st.floats(1e-9, 0.5), st.floats(1e-9, 0.1))


@dataclass(frozen=True)
class Machine:
    """How long forwards really take: `fixed` seconds, `token` for each prompt token, which doubles
    every `context` tokens into the prompt."""

    fixed: float
    token: float
    context: float = 2000.0

    def seconds(self, chunks: Sequence[Span]) -> float:
        return self.fixed + sum(
            c.tokens * self.token * (1 + (c.start + c.tokens / 2) / self.context) for c in chunks
        )

    def goal(self, start: int) -> float:
        """The longest forward wanted at this position; LEAST_TOKENS fit any."""
        least = self.seconds([Span(start, LEAST_TOKENS)])
        return max(FORWARD_S, FIXED_PARTS * self.fixed, least)

    def boot(self) -> Pace:
        """What boot measures."""
        return Pace.measured(self.seconds([Span(0, 1)]), self.seconds([Span(0, 16)]), 16)


LAPTOP = Machine(0.0005, 0.00006)
LARGE = Machine(0.0116, 0.00057)  # GPT-2's shape on the same two cores
MACHINES = (LAPTOP, LARGE, Machine(0.1, 0.01), Machine(0.008, 0.00001, 20_000.0))


def fill(machine: Machine, pace: Pace, tokens: int, start: int = 0) -> tuple[list[float], Pace]:
    """How long each forward of one prompt is, with 1 for the goal, and the pace after it."""
    took = []
    end = start + tokens
    while start < end:
        (chunk,) = share_out([Prompt(start, end - start)], pace, token_budget=2048)
        seconds = machine.seconds([Span(start, chunk)])
        pace = pace.after([Span(start, chunk)], seconds)
        took.append(seconds / machine.goal(start))
        start += chunk
    return took, pace


@given(PACES, st.floats(0, 10), st.integers(0, 100_000))
def test_what_fits_into_a_time_is_the_longest_chunk_that_does(
    pace: Pace, seconds: float, start: int
) -> None:
    tokens = pace.tokens_within(seconds, start)
    assert pace.chunk_s(Span(start, tokens)) <= seconds * (1 + 1e-6)
    assert pace.chunk_s(Span(start, tokens + 2)) > seconds


@given(
    prompts=st.lists(
        st.builds(
            Prompt, st.integers(0, 9000), st.integers(1, 3000), st.none() | st.integers(1, 300)
        ),
        max_size=8,
    ),
    pace=PACES,
    budget=st.integers(1, 2048),
)
def test_a_forward_keeps_to_its_tokens_and_its_time_and_the_oldest_advances(
    prompts: list[Prompt], pace: Pace, budget: int
) -> None:
    given_tokens = share_out(prompts, pace, token_budget=budget)
    assert len(given_tokens) == len(prompts)
    assert sum(given_tokens) <= budget
    for prompt, tokens in zip(prompts, given_tokens, strict=True):
        assert 0 <= tokens <= min(prompt.left, prompt.most or prompt.left)
    if prompts:
        oldest = prompts[0]
        least = max(1, min(budget, LEAST_TOKENS) // 2)
        assert given_tokens[0] >= min(oldest.left, oldest.most or oldest.left, least)
        chunks = [Span(p.start, tokens) for p, tokens in zip(prompts, given_tokens, strict=True)]
        floor = pace.chunk_s(Span(oldest.start, LEAST_TOKENS))
        assert sum(map(pace.chunk_s, chunks)) <= max(pace.room_s(), floor) * (1 + 1e-6)


@pytest.mark.parametrize("machine", MACHINES)
def test_forwards_are_short_from_the_first_one_on(machine: Machine) -> None:
    took, _ = fill(machine, machine.boot(), 5000)
    assert max(took) <= 1.3


@pytest.mark.parametrize("machine", MACHINES)
def test_a_prompt_that_begins_after_a_long_cached_prefix_is_soon_in_step(machine: Machine) -> None:
    took, _ = fill(machine, machine.boot(), 5000, start=8000)
    assert max(took) <= 1 + 8000 / machine.context
    assert max(took[5:], default=0) <= 1.3


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("wrong", [0.1, 0.3, 3.0, 10.0])
def test_a_wrong_first_estimate_is_corrected_within_one_prompt(
    machine: Machine, wrong: float
) -> None:
    right = machine.boot()
    took, _ = fill(machine, Pace(right.forward_s * wrong, right.token_s * wrong), 20_000)
    assert max(took[8:]) <= 2.5


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("wrong", [0.001, 0.01, 100.0, 1000.0])
def test_a_very_wrong_one_is_corrected_by_prompts_of_several_lengths(
    machine: Machine, wrong: float
) -> None:
    right = machine.boot()
    pace = Pace(right.forward_s * wrong, right.token_s * wrong)
    for length in (3000, 20, 1700, 500, 15, 40, 2300, 16, 10):
        _, pace = fill(machine, pace, length)
    took, _ = fill(machine, pace, 3000)
    assert max(took) <= 2


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("absurd", [0.0, 1e-9, 10.0, 1e6, -3.0])
@pytest.mark.parametrize("tokens", [0, 100])
def test_an_absurd_measurement_is_forgotten_within_a_few_forwards(
    machine: Machine, absurd: float, tokens: int
) -> None:
    _, pace = fill(machine, machine.boot(), 3000)
    usual, _ = fill(machine, pace, 2000)
    poisoned = pace.after([Span(0, tokens)] if tokens else [], absurd)
    took, _ = fill(machine, poisoned, 2000)
    assert max(took) <= 3 * max(usual)  # even the first one
    assert max(took[5:], default=0) <= 1.5 * max(usual)
    assert len(took) <= len(usual) + 5


def test_a_machine_that_sleeps_at_every_forward_is_a_slow_machine() -> None:
    pace = LAPTOP.boot()
    for _ in range(20):
        pace = pace.after([Span(0, 200)], 10.0)
    assert share_out([Prompt(0, 3000)], pace, token_budget=2048) == [LEAST_TOKENS]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 100_000), st.integers(0, 5000), st.floats(-1, 1e9, allow_nan=False)
        ),
        max_size=60,
    )
)
def test_no_measurements_break_it(forwards: list[tuple[int, int, float]]) -> None:
    pace = Pace()
    for start, tokens, took in forwards:
        pace = pace.after([Span(start, tokens)] if tokens else [], took)
    (chunk,) = share_out([Prompt(0, 5000)], pace, token_budget=2048)
    assert LEAST_TOKENS // 2 <= chunk <= 2048


# ---- the nodes


class TimedPrefill(PretendPrefill):
    """Forwards take time: on LAPTOP's clock."""

    def __init__(self, town: Town) -> None:
        super().__init__(town)
        self.seconds = 0.0
        self.forwards: list[tuple[float, list[str]]] = []  # seconds, runs

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        super().fill(worker, chunks)
        took = LAPTOP.seconds([Span(c.start, len(c.token_ids)) for c in chunks])
        self.seconds += took
        self.forwards.append((took, [c.grant.run for c in chunks]))

    def clock(self) -> float:
        return self.seconds


class TimedDecode(PretendDecode):
    """As TimedPrefill, with a millisecond for each token that is sampled."""

    def __init__(self, town: Town, memory: object) -> None:
        super().__init__(town, memory)  # type: ignore[arg-type]
        self.seconds = 0.0
        self.steps: list[tuple[float, int]] = []  # seconds, tokens sampled

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        chunks = [Span(row.start, len(row.token_ids)) for row in rows if len(row.token_ids) > 1]
        took = LAPTOP.seconds(chunks) + 0.001 * len(draws)
        self.seconds += took
        self.steps.append((took, len(draws)))
        return super().step(rows, draws)

    def clock(self) -> float:
        return self.seconds


class TimedTown(Town):
    decode_model = TimedDecode
    prefill_model = TimedPrefill


LONG = [7] * 500 + [5] * 1500
SHORT = [[3, i, 9] for i in range(6)]


def answers_are_calm(town: Town, prompts: dict[str, list[int]], length: int) -> None:
    for request, prompt in prompts.items():
        tokens, _ = calm_answer(prompt, length)
        assert town.outcomes[request].tokens == tokens, request


def test_a_short_prompt_that_comes_during_a_long_one_is_filled_by_the_next_forward() -> None:
    rules = Rules(batch_size=16, window_s=0.0, token_budget=8192)
    town = TimedTown(rules=rules, blocks=600, prefill_budget=2048, context=2300)
    model = town.prefill_models[0]
    assert isinstance(model, TimedPrefill)
    town.submit("long", LONG, 4)
    town.run(lambda: len(model.forwards) == 2)
    for index, prompt in enumerate(SHORT):
        town.submit(f"s{index}", prompt, 4)
    town.run_all(["long", *(f"s{i}" for i in range(len(SHORT)))])
    shorts = {f"s{i}" for i in range(len(SHORT))}
    requests = [{run.partition("#")[0] for run in runs} for _, runs in model.forwards]
    filled = [index for index, here in enumerate(requests) if shorts & here]
    assert max(filled) <= 6, "not behind the long prompt's end"
    assert len(model.forwards) > 8
    assert max(took for took, _ in model.forwards) <= 1.5 * FORWARD_S
    answers_are_calm(town, {"long": LONG, **{f"s{i}": prompt for i, prompt in enumerate(SHORT)}}, 4)


def test_streams_go_on_while_their_decode_worker_fills_a_long_prompt() -> None:
    rules = Rules(batch_size=16, window_s=0.0, token_budget=8192, colocated=True)
    town = TimedTown(prefills=0, rules=rules, blocks=600, decode_budget=2048, context=2300)
    (model,) = town.decode_models
    assert isinstance(model, TimedDecode)
    for index, prompt in enumerate(SHORT):
        town.submit(f"s{index}", prompt, 60)
    town.run(lambda: len(model.steps) >= 10)
    town.submit("long", LONG, 4)
    town.run_all(["long", *(f"s{i}" for i in range(len(SHORT)))])
    mixed = [took for took, _ in model.steps if took > 0.01]
    assert len(mixed) >= 5, "the prompt was not cut"
    assert max(mixed) <= 1.5 * FORWARD_S
    assert all(sampled for _, sampled in model.steps), "a step without the streams"
    answers_are_calm(town, {"long": LONG}, 4)
    answers_are_calm(town, {f"s{i}": prompt for i, prompt in enumerate(SHORT)}, 60)
