"""Frontier: each way to divide workers into prefill and decode, simulated with equal requests. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baton.plan.machine import Machine
from baton.plan.score import Score, score
from baton.plan.simulation import Arrival, Shape, Simulation
from router.batching import Rules
from router.role_policy import RolePolicy, Slo

BATCH, WINDOW_S, FILL_TOKENS = (
    64,
    0.01,
    8192,
)  # as serve has them: --max-num-seqs, --batch-window-ms


@dataclass(frozen=True, slots=True)
class Division:
    """So many workers of each role. Without prefill workers decode workers fill by themselves."""

    prefills: int
    decodes: int
    policy: RolePolicy

    def __str__(self) -> str:
        return f"{self.prefills}:{self.decodes} {self.policy}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a division gave."""

    division: Division
    score: Score

    @property
    def share(self) -> float:
        """Of all requests: within both limits."""
        return self.score.met / self.score.requests


def divisions(workers: int) -> Iterator[Division]:
    """None at all for prefill, then 1, 2, ...; each with the two policies that may differ there."""
    yield Division(0, workers, RolePolicy.COLOCATED)
    for prefills in range(1, workers):
        for policy in (RolePolicy.SPLIT, RolePolicy.ADAPTIVE):
            yield Division(prefills, workers - prefills, policy)


def simulated(
    division: Division,
    machine: Machine,
    arrivals: Sequence[Arrival],
    slo: tuple[float, float],
    shape: Shape,
) -> Found:
    """`slo`: TTFT and ITL in seconds."""
    colocated = not division.prefills
    rules = Rules(
        BATCH * division.decodes, WINDOW_S, FILL_TOKENS, colocated,
        role_policy=division.policy, slo=Slo(*slo),
    )  # fmt: skip
    shape = replace(shape, prefills=division.prefills, decodes=division.decodes)
    return Found(division, score(Simulation(machine, rules, shape).run(arrivals), *slo))


def best(found: Sequence[Found]) -> Found:
    """Most requests within the SLO; of equals the one with the earliest first tokens."""
    return max(found, key=lambda each: (each.score.met, -each.score.ttft_p50))
