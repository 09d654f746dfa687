"""Verdicts on the adaptive arm of `bench disagg`: is it the best, and if not, what was traded? Pure.

A verdict rests on at least ENOUGH requests of each arm, over all rounds. With fewer there are shares with
their intervals, and no verdict.
"""

from collections.abc import Mapping, Sequence
from math import sqrt

from tools.benchmarks.disagg_report import Rounds, ratio

ENOUGH = 50  # requests of each arm in a cell
AS_GOOD = 0.95  # of the best other arm's share within the SLO
NEAR = 1.1  # times colocated's TTFT p50, and P/D's ITL p99


def share(rounds: Rounds) -> float:
    """Of the requests of all rounds, how many met the SLO. The goodput is this times the offered rate."""
    return sum(each.met for each in rounds) / max(1, requests(rounds))


def requests(rounds: Rounds) -> int:
    """Of all rounds."""
    return sum(each.requests for each in rounds)


def interval(met: int, count: int) -> tuple[float, float]:
    """Wilson's: where the true share lies in 95 of 100 cases."""
    if not count:
        return 0.0, 1.0
    z, p = 1.96, met / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def adaptive_verdicts(
    load: str,
    arms: Mapping[str, Rounds],
    ours: str,
    decided: Mapping[tuple[str, str], int],
    *,
    near: Sequence[tuple[str, str, str]] = (),
) -> list[str]:
    """On one load. `decided`: prompts by who filled them and why. `near`: (arm, figure, its name) that
    ours should come close to."""
    others = [name for name in arms if name != ours]
    if not others:
        return []
    best = max(others, key=lambda name: share(arms[name]))
    told = [f"{name} {_share(arms[name])}" for name in (ours, best)]
    fewest = min(requests(arms[name]) for name in (ours, best))
    if fewest < ENOUGH:
        return [
            f"{load}: within the SLO: {told[0]}, {told[1]}. No verdict: {fewest} requests, "
            f"{ENOUGH} wanted"
        ]
    other = share(arms[best])
    times = share(arms[ours]) / other if other else 1.0
    hit = times >= AS_GOOD
    lines = [
        f"{load}: within the SLO: {told[0]}, the best other arm {told[1]}: {times:.2f} times, at least "
        f"{AS_GOOD:g} wanted: {'hit' if hit else 'MISS'}"
    ]
    far = False
    for arm, figure, name in near:
        if arm in arms:
            factor = ratio(arms[ours], arms[arm], figure)
            far |= factor > NEAR
            lines.append(
                f"  {name} is {factor:.2f} times {arm}'s, at most {NEAR:g} wanted: "
                f"{'hit' if factor <= NEAR else 'MISS'}"
            )
    if not hit or far:
        lines.append(f"  the trade: {_trade(arms, ours, others)}; {_decided(decided)}")
    return lines


def _share(rounds: Rounds) -> str:
    met, count = sum(each.met for each in rounds), requests(rounds)
    low, high = interval(met, count)
    return f"{met / max(1, count):.0%} of {count} ({low:.0%} to {high:.0%})"


def _trade(arms: Mapping[str, Rounds], ours: str, others: Sequence[str]) -> str:
    parts = []
    for name in others:
        ttft, itl = (ratio(arms[ours], arms[name], each) for each in ("ttft_p50", "itl_p99"))
        parts.append(f"TTFT p50 {ttft:.2f} and ITL p99 {itl:.2f} times {name}'s")
    return ", ".join(parts)


def _decided(decided: Mapping[tuple[str, str], int]) -> str:
    found = [f"{role} filled {count} ({cause})" for (role, cause), count in sorted(decided.items())]
    return ", ".join(found) or "nothing was decided"
