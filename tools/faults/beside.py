"""Beside: clients that ask as long as something else is done to their service."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Collection

from tools.faults.battery import CLIENTS, Battery, Result
from tools.faults.check import check
from tools.faults.client import run_clients
from tools.faults.ledger import Event
from tools.faults.service import Service


def beside(
    battery: Battery,
    service: Service,
    result: Result,
    work: Callable[[], Awaitable[None]],
    *,
    clients: int = CLIENTS,
    each: int | None = None,
    accepted: Collection[str] = (),
) -> list[Event]:
    """Do `work` while so many clients send `each` requests (20 at scale 1), and more until it is done.
    What they saw is judged into `result`; the events of their ledger. `work` that comes to no end in its
    time, with a TimeoutError, is a problem of the row; other errors end it once the clients are done.
    """
    least = battery.count(20, least=3) if each is None else each
    ledger, mix = battery.ledger(result.row), battery.mix(result.row)
    going = True

    async def both() -> None:
        nonlocal going
        requests = mix.clients(clients, least, lambda: going)
        asking = asyncio.create_task(run_clients(service.port, ledger, requests))
        try:
            await work()
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            result.problems.append(f"not done in time: {error!r}; {await service.state()}")
        finally:
            going = False
            await asking

    asyncio.run(both())
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids, accepted=accepted))
    return ledger.events


def asked_again(
    battery: Battery, service: Service, result: Result, *, clients: int = 4, each: int = 3
) -> None:
    """It serves as before: so many clients with so many requests, judged into `result`."""
    name = f"{result.row}-after"
    ledger, mix = battery.ledger(name), battery.mix(name)
    asyncio.run(run_clients(service.port, ledger, mix.clients(clients, each)))
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids))
