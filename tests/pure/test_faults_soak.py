"""The figures of a soak: a slope is found in noise, a drift between the thirds."""

import math
import random

import pytest

from tools.faults.check import Census, Process
from tools.faults.ledger import Chunk, Sent, records
from tools.faults.soak import (
    LEAST_THIRD,
    Sample,
    drift,
    latencies,
    memory_slopes,
    settled,
    slope_mib_h,
    warm_up_s,
)


def test_a_slope_is_found_in_noise() -> None:
    rng = random.Random(1)
    flat = [(i * 5.0, 100 + rng.uniform(-1, 1)) for i in range(600)]
    slope, error = slope_mib_h(flat)
    assert abs(slope) <= error < 1.0
    rising = [(x, y + x / 3600 * 7) for x, y in flat]
    slope, error = slope_mib_h(rising)
    assert slope == pytest.approx(7, abs=error)
    assert slope - error > 1.0
    assert slope_mib_h(flat[:2]) == (0.0, float("inf"))


def test_a_single_step_is_no_proof_of_a_slope() -> None:
    step = [(i * 5.0, 100.0 + (i >= 100)) for i in range(300)]
    slope, error = slope_mib_h(step)
    assert slope > 1.0
    assert slope - error < 1.0


def test_slopes_are_combined_over_the_lives_of_a_name() -> None:
    samples = [
        Sample(
            5.0 * i, {("router", 1): 10.0 + i, ("decode-0", i // 30): 5.0 + 50 * (i // 30) + i % 30}
        )
        for i in range(100)
    ]
    found = memory_slopes(samples, warm_s=60.0)
    assert found["router"].mib_h == pytest.approx(720), "a step of 1 MiB in 5 s"
    assert found["decode-0"].mib_h == pytest.approx(720), "levels of its lives do not count"
    assert found["decode-0"].lives == 3, "the last one is too young"
    assert found["router"].lives == 1


def test_every_life_has_a_warm_up_of_its_own() -> None:
    born = 250.0
    samples = [
        Sample(t, {("main", 1): 9.0, ("decode-0", 2): min(t - born, 20.0) + 1})
        if (t := 5.0 * i) > born
        else Sample(t, {("main", 1): 9.0})
        for i in range(100)
    ]
    found = memory_slopes(samples, warm_s=60.0)
    assert found["decode-0"].mib_h == pytest.approx(0.0, abs=1e-6)
    assert found["main"].points == 100 - 12


def test_a_name_whose_lives_are_all_too_short_has_no_slope() -> None:
    samples = [Sample(5.0 * i, {("decode-0", i): 5.0}) for i in range(50)]
    assert memory_slopes(samples, warm_s=0.0)["decode-0"].error == float("inf")


def test_memory_is_compared_with_that_after_the_warm_up() -> None:
    before = Census({"server": Process(1, 20, 40.0), "router": Process(2, 9, 30.0)}, leased=0)
    samples = [
        Sample(5.0, {("server", 1): 50.0, ("router", 2): 30.0}),
        Sample(10.0, {("server", 1): 70.0, ("router", 3): 31.0}),
        Sample(15.0, {("server", 1): 71.0, ("router", 3): 33.0}),
    ]
    after = settled(before, samples, 7.0).processes
    assert after["server"] == Process(1, 20, 70.0)
    assert after["router"] == Process(2, 9, 30.0), "another process is there now"
    assert settled(before, samples, 99.0) == before


def test_drift_compares_the_thirds() -> None:
    even = [(float(i), 0.1) for i in range(300)]
    assert drift(even) == pytest.approx((0.1, 0.1, 0.0))
    slower = [(at, 0.1 if at < 200 else 0.15) for at, _ in even]
    assert drift(list(reversed(slower)))[2] == pytest.approx(0.5)
    assert math.isnan(drift(even[:2])[2])
    assert math.isnan(drift(even[: 3 * LEAST_THIRD - 1])[2])


def test_latencies_leave_out_the_time_of_faults() -> None:
    events = [
        each
        for i in range(10)
        for each in (
            Sent(str(i), 0, float(i), {"stream": i != 8}),
            Chunk(str(i), i + 0.25, "x"),
            Chunk(str(i), i + 0.5, "y"),
        )
    ]
    found = latencies(list(records(events).values()), [(2.5, 4.0)])
    assert [at for at, _ in found] == [0, 1, 2, 5, 6, 7, 9]
    assert {took for _, took in found} == {0.25}


@pytest.mark.parametrize(
    ("minutes", "rate", "seconds"),
    [(60, 100.0, 720.0), (60, 20.0, 1000.0), (60, 2.0, 2160.0), (5, 20.0, 180.0)],
)
def test_a_process_is_warm_when_its_histories_are_full(
    minutes: float, rate: float, seconds: float
) -> None:
    """A fifth of the time, longer for fewer requests, and never most of a soak."""
    assert warm_up_s(minutes, rate) == seconds
