"""F6: a process that dies at each start. The service stays, says why, and recovers by itself."""

import asyncio
import json
import os
import signal
import time

from tools.faults.battery import Battery, Result
from tools.faults.check import check
from tools.faults.client import fetch, run_clients
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import NotReady, Service

LOOP_S = 24.0
PATIENT_S = (
    16.0  # a request waits for a worker that restarts, for so long after the last one was ready
)
SOON_S = 45.0  # the longest back-off is 30 s, a start takes seconds
MOST_STARTS = 8  # of one process in LOOP_S, with back-off 0.5, 1, 2, 4, 8 s
MOST_CPU = 0.25  # of a core, for supervisor and router
EVERY_START = "worker.begin:kill:%1"
TICKS = os.sysconf("SC_CLK_TCK")


def f6(battery: Battery) -> list[Result]:
    """A crash loop of decode, then one of prefill."""
    return [*_decode(battery), *_prefill(battery)]


def _decode(battery: Battery) -> list[Result]:
    result = Result("F6-decode", "decode worker dies at every start")
    with battery.service() as service:
        before = battery.warm(service)
        service.arm(EVERY_START)
        cpu, began = _cpu_s(service), time.monotonic()
        service.signal("decode-0", signal.SIGKILL)
        last: list[tuple[float, int, str]] = []
        while time.monotonic() - began < LOOP_S and service.exit_code is None:
            late = time.monotonic() - began > PATIENT_S
            answer = _one_request(service)
            last += [answer] if late else []
            time.sleep(0.5)
        _judge_loop(service, result, began, cpu)
        result.require(len(last) > 3, f"{len(last)} requests were answered in the last seconds")
        result.require(
            all(status == 503 for _, status, _ in last),
            f"requests meanwhile were answered with {sorted({s for _, s, _ in last})}, not 503",
        )
        slowest = max((took for took, *_ in last), default=0.0)
        result.require(slowest < 1.0, f"a 503 took {slowest:.1f} s")
        result.require(
            any("decode-0" in text and ".log" in text for *_, text in last),
            f"the 503 does not name process and log: {last[-1:]}",
        )
        _recovers(battery, service, result, began)
        if service.exit_code is None:
            result.compare(before, service.census())
    return with_leftovers([(result, service)])


def _prefill(battery: Battery) -> list[Result]:
    """Streams and new requests go on: decode fills by itself."""
    result = Result("F6-prefill", "prefill worker dies at every start: decode fills by itself")
    with battery.service() as service:
        before = battery.warm(service)
        service.arm(EVERY_START)
        cpu, began = _cpu_s(service), time.monotonic()
        service.signal("prefill-0", signal.SIGKILL)
        ledger, mix = battery.ledger(result.row), battery.mix(result.row)
        going = lambda: time.monotonic() - began < LOOP_S and service.exit_code is None  # noqa: E731
        asyncio.run(run_clients(service.port, ledger, mix.clients(4, 2, going)))
        ledger.close()
        result.judge(check(ledger.events, battery.reference, mix.ids))
        said = asyncio.run(service.state())
        result.require(bool(said.get("ready")), f"not ready without a prefill worker: {said}")
        result.require(bool(said.get("degraded")), f"/readyz does not say degraded: {said}")
        _judge_loop(service, result, began, cpu)
        _recovers(battery, service, result, began)
        if service.exit_code is None:
            result.compare(before, service.census())
    return with_leftovers([(result, service)])


def _judge_loop(service: Service, result: Result, began: float, cpu: float) -> None:
    took = time.monotonic() - began
    starts = len([each for each in service.fired() if each.site == "worker.begin"])
    result.injected = starts + 1
    result.require(service.exit_code is None, f"the service ended with {service.exit_code}")
    result.require(
        3 <= starts <= MOST_STARTS, f"{starts} starts in {took:.0f} s, at most {MOST_STARTS}"
    )
    share = (_cpu_s(service) - cpu) / took
    result.require(share < MOST_CPU, f"supervisor and router took {share:.0%} of a core meanwhile")
    health, body = _get(service, "/health")
    result.notes.append(f"{starts} starts in {took:.0f} s; /health {health} {body[:160]}")


def _recovers(battery: Battery, service: Service, result: Result, began: float) -> None:
    service.disarm(EVERY_START)
    mended = time.monotonic()
    try:
        service.await_whole(SOON_S)
    except NotReady as error:
        result.problems.append(str(error))
        return
    result.whole_s.append(time.monotonic() - mended)
    ledger, mix = battery.ledger(f"{result.row}-after"), battery.mix(f"{result.row}-after")
    asyncio.run(run_clients(service.port, ledger, mix.clients(4, 2)))
    ledger.close()
    result.judge(check(ledger.events, battery.reference, mix.ids))


def _one_request(service: Service) -> tuple[float, int, str]:
    """Seconds, status and text of one short request."""
    began = time.monotonic()
    body = {"model": "demo", "prompt": "In the future", "max_tokens": 2}
    try:
        status, answer = asyncio.run(fetch(service.port, "/v1/completions", body, timeout_s=3))
        text = str(json.loads(answer).get("error", {}).get("message", ""))
    except (OSError, TimeoutError, ValueError) as error:
        status, text = 0, repr(error)
    return time.monotonic() - began, status, text


def _get(service: Service, path: str) -> tuple[int, str]:
    try:
        status, body = asyncio.run(fetch(service.port, path))
    except (OSError, TimeoutError) as error:
        return 0, repr(error)
    return status, body.decode(errors="replace")


def _cpu_s(service: Service) -> float:
    """CPU seconds of supervisor and router so far."""
    total = 0
    for pid in (service.main_pid, service.pids().get("router")):
        try:
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()  # noqa: SIM115
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS
