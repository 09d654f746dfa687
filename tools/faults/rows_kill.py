"""F1 to F4: processes killed at every stage of a request's life."""

from collections.abc import Sequence

from tools.faults.battery import FRAMES, POOL_MIB, Battery, Result
from tools.faults.service import Service
from tools.faults.stage import RANDOM, Fault, Load, each_stage, under_load

CHUNKED = ("--max-num-batched-tokens", 128)  # prompts of several chunks, so that chunks can be hit
TIMES = 3
BOTH_S = 10.0  # until both workers are there again, RELIABILITY F3
SERVER_AGAIN = Load(
    again=("broken", "error"), tries=12, accepted=("broken", "unanswered", "error not_ready")
)


def f1(battery: Battery) -> list[Result]:
    """Prefill killed; the pool is shared memory, then another process's."""
    shared = Result("F1", "prefill worker killed, at every stage")
    with battery.service(*CHUNKED) as service:
        faults = each_stage(["prefill-0"], battery.count(TIMES), battery.rng("F1"))
        under_load(battery, service, shared, faults)
    frames = Result("F1-frames", "prefill worker killed while it pushes frames")
    with battery.service(*CHUNKED, *FRAMES) as service:
        faults = [
            Fault(("prefill-0",), "mid-push", site="prefill.layer") for _ in range(battery.count(6))
        ]
        under_load(battery, service, frames, faults, Load(each=25, pool_mib=POOL_MIB))
    return with_leftovers([(shared, service), (frames, service)])


def f2(battery: Battery) -> list[Result]:
    """Decode killed."""
    return _victims(battery, "F2", "decode worker killed, at every stage", ["decode-0"])


def f3(battery: Battery) -> list[Result]:
    """Both workers at once."""
    result = Result("F3", "prefill and decode worker killed at once")
    stages = ("queue", "prefill", "before Filled", "mid-stream", RANDOM)
    load = Load(whole_s=BOTH_S)
    both = ("prefill-0", "decode-0")
    with battery.service(*CHUNKED) as service:
        faults = [Fault(both, stage) for stage in stages for _ in range(battery.count(2))]
        under_load(battery, service, result, faults, load)
    return with_leftovers([(result, service)])


def f4(battery: Battery) -> list[Result]:
    """Router, then HTTP server killed. A client of a dead server sees a broken connection and asks again;
    one of a dead router sees nothing."""
    router = _victims(battery, "F4-router", "router killed, at every stage", ["router"], times=2)
    server = _victims(
        battery, "F4-server", "HTTP server killed, at every stage (clients ask again)", ["server"],
        times=2, load=SERVER_AGAIN,
    )  # fmt: skip
    return [*router, *server]


def _victims(
    battery: Battery,
    row: str,
    fault: str,
    victims: Sequence[str],
    *,
    times: int = TIMES,
    load: Load | None = None,
) -> list[Result]:
    result = Result(row, fault)
    with battery.service(*CHUNKED) as service:
        faults = each_stage(victims, battery.count(times), battery.rng(row))
        under_load(battery, service, result, faults, load)
    return with_leftovers([(result, service)])


def with_leftovers(pairs: Sequence[tuple[Result, Service]]) -> list[Result]:
    """Results, with what their services left behind."""
    for result, service in pairs:
        result.problems += service.leftovers
    return [result for result, _ in pairs]
