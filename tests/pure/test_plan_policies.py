"""The heart of the adaptive policy: on a virtual clock its goodput is that of the best other policy, or
more, for every machine, rate and length here. The nodes are those of the processes; a Machine says how
long their forwards take."""

import random
from dataclasses import dataclass

import pytest

from baton.plan import simulation
from baton.plan.arrivals import poisson
from baton.plan.machine import Machine
from baton.plan.score import Score, score
from baton.plan.simulation import Arrival, Shape, Simulation
from router.batching import Rules
from router.role_policy import RolePolicy, Slo

TWO_CORES = Machine(0.011, 0.0003, 0.0009, cores=2)
"""GPT-2's shape in fp32: both workers compute on the same two cores."""
TWO_GPUS = Machine(0.008, 0.00004, 0.00005, 20_000, kv_bytes_per_s=10e9)
"""A device each; KV is copied."""
SLOW_WAY = Machine(0.008, 0.00004, 0.00005, 20_000, kv_bytes_per_s=0.2e9)

AS_GOOD = 0.95
REQUESTS = 50


@dataclass(frozen=True)
class Cell:
    machine: Machine
    prompt: int
    new_tokens: int
    load: float  # 1: about what the machine can do
    tight: tuple[float, float] = (10, 5)  # the SLO, in units of an idle worker's TTFT and ITL

    @property
    def slo(self) -> tuple[float, float]:
        machine = self.machine
        ttft_s = machine.forward([(0, self.prompt)], 0, machine.cores)
        return self.tight[0] * ttft_s, self.tight[1] * machine.forward([], 1, machine.cores)

    @property
    def rate(self) -> float:
        ttft_s, step_s = (a / b for a, b in zip(self.slo, self.tight, strict=True))
        return self.load / (ttft_s + self.new_tokens * step_s / 8)


def served(cell: Cell, policy: RolePolicy, *, told: bool) -> Score:
    """`told`: the policy knows the SLO."""
    slo = Slo(*cell.slo) if told else Slo()
    rules = Rules(64, 0.01, 8192, role_policy=policy, slo=slo)
    load = poisson(cell.rate, REQUESTS, prompt=cell.prompt, new_tokens=cell.new_tokens)
    return score(Simulation(cell.machine, rules, Shape()).run(load), *cell.slo)


WIDE = [
    Cell(machine, prompt, new_tokens, load, tight)
    for machine in (TWO_CORES, TWO_GPUS, SLOW_WAY)
    for prompt, new_tokens in ((128, 16), (256, 48), (1024, 12))
    for load in (0.4, 0.8, 1.2)
    for tight in ((10, 5), (3, 5), (10, 2.5))
]
"""`python -m tests.pure.test_plan_policies` goes through all of it."""
GRID = [
    Cell(TWO_CORES, 128, 16, 0.4),
    Cell(TWO_CORES, 128, 16, 1.2, (3, 5)),
    Cell(TWO_CORES, 1024, 12, 0.8),
    Cell(TWO_CORES, 256, 16, 0.6, (10, 2.5)),
    Cell(TWO_GPUS, 128, 16, 0.8, (3, 5)),
    Cell(TWO_GPUS, 1024, 12, 0.4),
    Cell(TWO_GPUS, 1024, 12, 1.2),
    Cell(SLOW_WAY, 512, 16, 0.8),
]


@pytest.mark.parametrize("cell", GRID)
def test_adaptive_is_as_good_as_the_best_other_policy(cell: Cell) -> None:
    split, colocated, adaptive = (served(cell, each, told=True) for each in RolePolicy)
    assert adaptive.failed == 0
    assert adaptive.goodput >= AS_GOOD * max(split.goodput, colocated.goodput), (
        split, colocated, adaptive
    )  # fmt: skip


@pytest.mark.parametrize(("machine", "ttfts"), [(TWO_CORES, 10), (TWO_GPUS, 5)])
def test_prompts_that_come_at_once_are_divided_among_both_places(
    machine: Machine, ttfts: float
) -> None:
    """Each decision knows of those before it, though nothing of them is sent yet."""
    dice, cell = random.Random(1), Cell(machine, 256, 32, 1.0, (ttfts, 5))
    load = [
        Arrival(6.0 * (number // 8), (number + 1,) * dice.randint(128, 384), 32)
        for number in range(24)
    ]
    found = {
        policy: score(
            Simulation(machine, Rules(64, 0.01, 8192, role_policy=policy), Shape()).run(load),
            *cell.slo,
        ).goodput
        for policy in RolePolicy
    }
    others = max(found[RolePolicy.SPLIT], found[RolePolicy.COLOCATED])
    assert found[RolePolicy.ADAPTIVE] >= AS_GOOD * others


@pytest.mark.parametrize("cell", [Cell(TWO_CORES, 256, 48, 0.9), Cell(TWO_GPUS, 1024, 12, 0.8)])
def test_without_limits_of_the_user_it_keeps_to_the_usual_ones(cell: Cell) -> None:
    split, colocated, adaptive = (served(cell, each, told=False) for each in RolePolicy)
    assert adaptive.goodput >= AS_GOOD * max(split.goodput, colocated.goodput), (
        split, colocated, adaptive
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tight", "better"),
    [((3, 5), RolePolicy.COLOCATED), ((10, 2.5), RolePolicy.SPLIT)],
    ids=["a tight TTFT", "a tight ITL"],
)
def test_neither_pinned_policy_is_best_everywhere(
    tight: tuple[float, float], better: RolePolicy
) -> None:
    """Wang et al., TaiChi (2025): aggregation wins at a tight TTFT, disaggregation at a tight ITL."""
    cell = Cell(TWO_GPUS, 1024, 16, 1.0, tight)
    found = {policy: served(cell, policy, told=True).goodput for policy in RolePolicy}
    other = RolePolicy.SPLIT if better is RolePolicy.COLOCATED else RolePolicy.COLOCATED
    assert found[other] < found[better] < found[RolePolicy.ADAPTIVE]


def test_tokens_that_are_sent_together_count_as_if_each_was_sent_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, shape = poisson(8.0, 30, prompt=300, new_tokens=40), Shape(decodes=2)
    for policy in RolePolicy:
        rules = Rules(64, 0.01, 8192, role_policy=policy)
        runs = []
        for interval_s in (0.1, 0.0):
            monkeypatch.setattr(simulation, "STREAM_INTERVAL_S", interval_s)
            runs.append(Simulation(TWO_GPUS, rules, shape).run(load))
        for together, alone in zip(*runs, strict=True):
            assert len(together.tokens) == len(alone.tokens)
        together, alone = (score(each, 1.0, 0.1) for each in runs)
        for figure in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99"):
            assert getattr(together, figure) == pytest.approx(getattr(alone, figure), rel=0.02)


def test_a_run_is_repeated_exactly() -> None:
    cell = Cell(TWO_CORES, 128, 8, 0.8)
    assert served(cell, RolePolicy.ADAPTIVE, told=True) == served(
        cell, RolePolicy.ADAPTIVE, told=True
    )


def test_predicted_and_simulated_times_to_first_token_agree_on_an_idle_cluster() -> None:
    for machine in (TWO_CORES, TWO_GPUS):
        for policy in RolePolicy:
            rules = Rules(64, 0.0, 8192, role_policy=policy)
            (answer,) = Simulation(machine, rules, Shape()).run(
                poisson(1.0, 1, prompt=1024, new_tokens=2)
            )
            tokens = len(answer.arrival.prompt) - 1
            least = machine.forward([(0, tokens)], 0, machine.cores)
            assert least <= answer.ttft_s <= 2 * least


if __name__ == "__main__":
    for each in WIDE:
        scores = {str(policy): served(each, policy, told=True) for policy in RolePolicy}
        top = max(scores["split"].goodput, scores["colocated"].goodput)
        times = scores["adaptive"].goodput / top if top else 1.0
        met = ", ".join(f"{name} {found.met}" for name, found in scores.items())
        print("ok  " if times >= AS_GOOD else "MISS", f"{times:.2f}", met, each)
