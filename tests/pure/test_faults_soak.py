"""The figures of a soak: a slope is found in noise, a drift between the thirds."""

import random

import pytest

from tools.faults.ledger import Chunk, Sent, records
from tools.faults.soak import Sample, drift, latencies, memory_slopes, slope_mib_h


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


def test_only_processes_that_lived_long_enough_are_judged() -> None:
    samples = [
        Sample(float(i), {("router", 1): 10.0 + i, ("decode-0", i // 10): 5.0}) for i in range(100)
    ]
    found = memory_slopes(samples, begin=20.0)
    assert list(found) == [("router", 1)]
    assert found["router", 1][0] == pytest.approx(3600)


def test_drift_compares_the_thirds() -> None:
    even = [(float(i), 0.1) for i in range(300)]
    assert drift(even) == pytest.approx((0.1, 0.1, 0.0))
    slower = [(at, 0.1 if at < 200 else 0.15) for at, _ in even]
    assert drift(list(reversed(slower)))[2] == pytest.approx(0.5)
    assert drift(even[:2])[2] == 0.0


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
