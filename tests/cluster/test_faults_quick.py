"""The fault battery at a small scale: kills, a pause, leaving clients, and a checker that finds what is
planted in a ledger of real answers. `make faults` is the whole of it."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tools.faults import rows_leave
from tools.faults.battery import Battery, Result
from tools.faults.check import check
from tools.faults.client import run_clients
from tools.faults.ledger import Chunk, read
from tools.faults.service import Service
from tools.faults.stage import Fault, Load, under_load

SEED = 14
FAULTS = (
    Fault(("prefill-0",), "mid-push"),
    Fault(("decode-0",), "mid-stream"),
    Fault(("router",), "reserve", "stop", resume_s=1.0, replaced=False),
)


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Battery:
    return Battery(SEED, 0.06, tmp_path_factory.mktemp("faults"), print)


@pytest.fixture(scope="module")
def service(battery: Battery) -> Iterator[Service]:
    """One service for all of it; its first answers are the fault-free ones."""
    with Service("--max-num-batched-tokens", 128) as running:
        battery.make_reference(16, service=running)
        yield running
    assert not running.leftovers


def good(result: Result) -> None:
    assert not result.problems, result


def test_kills_and_a_pause_lose_nothing(battery: Battery, service: Service) -> None:
    result = Result("quick", "one of each")
    under_load(battery, service, result, FAULTS, Load(each=100))
    good(result)
    assert result.injected == len(result.whole_s) == len(FAULTS)
    assert result.requests >= 48
    assert result.outcomes == {"ok": result.requests}


def test_clients_leave_and_hold_nothing(battery: Battery, service: Service) -> None:
    result = rows_leave.leaving(battery, service)
    good(result)
    assert result.outcomes["left"] == result.injected > 10


def test_the_checker_finds_what_is_changed_in_a_real_ledger(
    battery: Battery, service: Service, tmp_path: Path
) -> None:
    ledger, mix = battery.ledger("tampered"), battery.mix("tampered")
    asyncio.run(run_clients(service.port, ledger, mix.clients(2, 4)))
    ledger.close()
    events = list(read(ledger.path))
    assert events == ledger.events
    assert not check(events, battery.reference, mix.ids).problems
    texts = [i for i, each in enumerate(events) if isinstance(each, Chunk) and each.text]
    for i in (texts[0], texts[len(texts) // 2], texts[-1]):
        chunk = events[i]
        assert isinstance(chunk, Chunk)
        for instead in ([], [chunk, chunk], [replace(chunk, text=chunk.text[:-1] + "§")]):
            changed = check([*events[:i], *instead, *events[i + 1 :]], battery.reference, mix.ids)
            assert changed.problems
    for i, event in enumerate(events):
        without = check([*events[:i], *events[i + 1 :]], battery.reference, mix.ids)
        telling = not isinstance(event, Chunk) or event.text or event.finish
        assert bool(without.problems) == bool(telling), event
