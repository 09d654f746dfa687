"""F13: clients that go away at any moment: everything of theirs stops, nothing of the others does."""

import asyncio
import random
import time

from tools.faults.battery import Battery, Result
from tools.faults.check import check
from tools.faults.client import Leave, run_clients
from tools.faults.ledger import End, Event
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import Service

LEAVERS = 1000  # that leave before their answer has come; others of those clients are faster
LEAVING, STAYING = 16, 4
FREED_S = 2.5  # the server hears of the pool once a second


def f13(battery: Battery) -> list[Result]:
    """1,000 leave among others that stay."""
    with battery.shared() as service:
        result = leaving(battery, service)
    return with_leftovers([(result, service)])


def leaving(battery: Battery, service: Service) -> Result:
    """FIN or RST; streams and whole answers; queued, filling, handed over, decoding."""
    result = Result("F13", "clients leave in the middle of a request")
    wanted = battery.count(LEAVERS, least=30)
    before = battery.warm(service)
    left = made = 0

    def listen(event: Event) -> None:
        nonlocal left
        left += isinstance(event, End) and event.how == "left"

    ledger, mix = battery.ledger("F13", listen), battery.mix("F13")

    def leave(rng: random.Random) -> Leave:
        nonlocal made
        made += 1
        chunks = rng.choice([1, 2, 5, 1000])
        return Leave(chunks, rng.choice([0.001, 0.01, 0.05, 0.2, 1.0]), rng.random() < 0.5)

    going = True

    async def both() -> None:
        nonlocal going
        those = [
            mix.client(n, 1, lambda: left < wanted and made < 9 * wanted, leave)
            for n in range(LEAVING)
        ]
        others = [mix.client(LEAVING + n, 5, lambda: going) for n in range(STAYING)]
        staying = asyncio.create_task(run_clients(service.port, ledger, others))
        await run_clients(service.port, ledger, those)
        going = False
        await staying

    asyncio.run(both())
    ended = time.monotonic()
    ledger.close()
    verdict = check(ledger.events, battery.reference, mix.ids, accepted=["left"])
    result.judge(verdict)
    result.injected = verdict.outcomes["left"]
    result.require(result.injected >= wanted, f"only {result.injected} of {wanted} left early")
    after = service.census()
    result.whole_s.append(time.monotonic() - ended)
    result.bar("everything freed after the last", result.whole_s[0], FREED_S)
    result.compare(before, after)
    return result
