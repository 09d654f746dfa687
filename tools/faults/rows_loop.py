"""F6: a process that dies at each start. The service stays, says why, and recovers by itself."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence

from tools.faults.battery import Battery, Result
from tools.faults.beside import asked_again, beside
from tools.faults.client import fetch
from tools.faults.rows_kill import with_leftovers
from tools.faults.service import NotReady, Service
from tools.faults.stage import account

LOOP_S = 24.0
PATIENT_S = (
    16.0  # a request waits for a worker that restarts, for so long after the last one was ready
)
SOON_S = 45.0  # the longest back-off is 30 s, a start takes seconds
MOST_STARTS = 8  # of one process in LOOP_S, with back-off 0.5, 1, 2, 4, 8 s
REFUSED_S = 1.0  # a 503, on a machine where a worker starts meanwhile
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
        health: list[tuple[int, str]] = []
        while time.monotonic() - began < LOOP_S and service.exit_code is None:
            late = time.monotonic() - began > PATIENT_S
            answer = _one_request(service)
            if late:
                last.append(answer)
                health.append(_get(service, "/health"))
            time.sleep(0.5)
        _judge_loop(service, result, began, cpu)
        judge_refusals(result, last)
        judge_health(result, health, 503, ("decode-0", ".log"))
        _recovers(battery, service, result)
        account(result, before, service)
    return with_leftovers([(result, service)])


def judge_refusals(result: Result, last: Sequence[tuple[float, int, str]]) -> None:
    """Requests to a service that is in a crash loop, as seconds, status and text: 503 at once, with the
    reason and the place of the log, each of them."""
    result.require(len(last) > 3, f"{len(last)} requests were answered in the last seconds")
    found = sorted({status for _, status, _ in last})
    result.require(found == [503], f"requests meanwhile were answered with {found}, not 503")
    result.bar("slowest 503", max((took for took, *_ in last), default=float("nan")), REFUSED_S)
    mute = [text for *_, text in last if "decode-0" not in text or ".log" not in text]
    result.require(not mute, f"{len(mute)} answers do not name process and log: {mute[:1]}")


def judge_health(
    result: Result, answers: Sequence[tuple[int, str]], status: int, says: Sequence[str]
) -> None:
    """What /health said meanwhile, as status and body: each time this status, with these words."""
    result.require(bool(answers), "nobody asked /health")
    wrong = [
        (found, body[:200])
        for found, body in answers
        if found != status or not all(word in body for word in says)
    ]
    result.require(
        not wrong,
        f"{len(wrong)} of {len(answers)} answers about health were not {status} with "
        f"{', '.join(says) or 'anything'}: {wrong[:1]}",
    )


def _prefill(battery: Battery) -> list[Result]:
    """Streams and new requests go on: decode fills by itself."""
    result = Result("F6-prefill", "prefill worker dies at every start: decode fills by itself")
    with battery.service() as service:
        before = battery.warm(service)
        service.arm(EVERY_START)
        cpu, began = _cpu_s(service), time.monotonic()
        service.signal("prefill-0", signal.SIGKILL)
        health: list[tuple[int, str]] = []
        ready: list[tuple[int, str]] = []

        async def look() -> None:
            while time.monotonic() - began < LOOP_S and service.exit_code is None:
                await asyncio.sleep(0.5)
                if time.monotonic() - began > PATIENT_S:
                    health.append(await asyncio.to_thread(_get, service, "/health"))
                    ready.append(await asyncio.to_thread(_get, service, "/readyz"))

        beside(battery, service, result, look, clients=4, each=2)
        judge_health(result, health, 200, ())
        judge_health(result, ready, 200, ('"ready":true', '"degraded":"', "prefill"))
        result.require(
            not any('"degraded":""' in body for _, body in ready), "/readyz does not say degraded"
        )
        _judge_loop(service, result, began, cpu)
        _recovers(battery, service, result)
        account(result, before, service)
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


def _recovers(battery: Battery, service: Service, result: Result) -> None:
    service.disarm(EVERY_START)
    mended = time.monotonic()
    try:
        service.await_whole(SOON_S)
    except NotReady as error:
        result.problems.append(str(error))
        return
    result.whole_s.append(time.monotonic() - mended)
    asked_again(battery, service, result, each=2)


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
