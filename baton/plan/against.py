"""Against: what the simulation predicts beside what was measured, with the error of each figure. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.plan.machine import Machine
from baton.plan.recorded import Recorded, Setting, arrivals_of
from baton.plan.simulation import Answer, Simulation
from baton.table import percentile

GOAL = 0.10
"""The error that a prediction should not exceed."""
FIGURES = ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99")


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure, in seconds."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """0.1: predicted a tenth too long. A figure measured as 0 has none unless that was predicted."""
        if not self.measured:
            return 0.0 if not self.predicted else float("inf")
        return self.predicted / self.measured - 1

    @property
    def good(self) -> bool:
        return abs(self.error) <= GOAL


def replayed(
    recorded: Sequence[Recorded], setting: Setting, machine: Machine, pool_tokens: int
) -> list[Answer]:
    """What the simulation makes of the same requests on the same cluster, in their order."""
    shape = setting.shape(pool_tokens)
    return Simulation(machine, setting.rules, shape).run(arrivals_of(recorded))


def compared(recorded: Sequence[Recorded], answers: Sequence[Answer]) -> list[Compared]:
    """A line for each of FIGURES. `answers`: to the same requests."""
    pairs = zip(_figures(recorded), _figures(answers), strict=True)
    return [Compared(name, *pair) for name, pair in zip(FIGURES, pairs, strict=True)]


def _figures(requests: Sequence[Recorded] | Sequence[Answer]) -> list[float]:
    ttfts = sorted(each.ttft_s for each in requests)
    gaps = sorted(gap for each in requests for gap in each.gaps_s) or [0.0]
    return [percentile(values, p) for values in (ttfts, gaps) for p in (50, 99)]


def verdict(lines: Sequence[Compared]) -> str:
    """Whether the goal is met, and by which figures it is not."""
    missed = [f"{each.name} ({each.error:+.0%})" for each in lines if not each.good]
    if not missed:
        return f"each of {len(lines)} figures within {GOAL:.0%}: goal met"
    return (
        f"GOAL MISSED: {len(missed)} of {len(lines)} figures are off by more than {GOAL:.0%}: "
        f"{', '.join(missed)}. Read the frontier with that in mind"
    )
